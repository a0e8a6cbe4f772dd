"""How QEMU's confinement is proved, with programs that do not do what they are told."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from trio_sandbox import SandboxError
from trio_sandbox.qemu import Confinement, _confinement, prove_confinement, require_program

#: What stands in for setpriv does with its arguments, and what is said of it. The last two do their work as root only.
SETPRIVS = {
    "BusyBox's": ('sys.exit(f"setpriv: unrecognized option: {arguments[0]}")', "unrecognized option: --reuid="),
    "one that does nothing": ("del arguments[: arguments.index('--') + 1]", r"Uid is '\d+\\t"),
    "one that leaves groups": (
        "arguments = [setpriv, *(word.replace('--clear-groups', '--groups=4') for word in arguments)]",
        "Groups is '4' and not ''",
    ),
    "one that leaves capabilities": (
        "arguments = [setpriv, *(word for word in arguments if 'bounding' not in word)]",
        "CapBnd is '[0-9a-f]*[1-9a-f]",
    ),
}
ROOT_ONLY = ("one that leaves groups", "one that leaves capabilities")


@pytest.fixture(autouse=True)
def nothing_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_confinement, "_proved", {})


def put_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    (directory / name).write_text(script, encoding="utf-8")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.parametrize("kind", SETPRIVS)
async def test_root_s_qemu_is_not_started_unless_it_becomes_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    code, why = SETPRIVS[kind]
    root = os.geteuid() == 0
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    real = require_program("setpriv")
    script = f"#!{sys.executable} -IS\nimport os, sys\nsetpriv, arguments = {real!r}, sys.argv[1:]\n{code}\n"
    put_on_path(tmp_path, monkeypatch, "setpriv", f"{script}os.execvp(arguments[0], arguments)\n")
    with pytest.raises(SandboxError, match="QEMU would run as root, and is not started") as caught:
        await prove_confinement({})
    # Who is not root is refused all the same, as the real one can't do its part either.
    assert re.search(why if root or kind not in ROOT_ONLY else "not permitted", str(caught.value))
    assert "Install util-linux" in str(caught.value)
    assert "as an ordinary user" in str(caught.value)


async def test_what_is_done_without_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_on_path(tmp_path, monkeypatch, "unshare", "#!/bin/sh\necho not permitted >&2; exit 1\n")
    proved = await prove_confinement({})
    assert not proved.network_namespace
    assert proved.other_user == (os.geteuid() == 0)
    assert "in this process's network namespace" in caplog.text
    assert "to change that, " in caplog.text
    caplog.clear()
    assert await prove_confinement({}) is proved
    assert caplog.text == "", "it is said once"


async def test_an_unshare_that_does_nothing_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
    put_on_path(tmp_path, monkeypatch, "unshare", script)
    assert not (await prove_confinement({})).network_namespace


async def test_no_program_but_the_shell_is_needed_for_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There are systems that have /bin/sh, and nothing else, where others have their programs."""
    monkeypatch.setattr(_confinement, "minimal_environment", lambda: {"PATH": str(tmp_path)})
    await prove_confinement({})


def test_each_weakness_has_a_way_out() -> None:
    strong = Confinement(network_namespace=True, other_user=True, uid_per_vm=True, no_new_privileges=True, limits=True)
    assert strong.weaknesses() == []
    weak = Confinement(network_namespace=False, other_user=True, uid_per_vm=False, no_new_privileges=False)
    assert len(weak.weaknesses()) == 4
    assert all(weakness and way_out for weakness, way_out in weak.weaknesses())
