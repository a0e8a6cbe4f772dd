"""Another version of the library at the same cache: what it left is refused or made anew, and never taken for ours, nor removed.

The other version is a copy of the package in which every number of a version is another one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair

import trio_sandbox
from tests._leaks import HANG_LIMIT
from trio_sandbox import TemplateUnusableError
from trio_sandbox.machines._ledger import LedgerEntry, open_ledger
from trio_sandbox.qemu import _accelerator
from trio_sandbox.wire import Role, WireError, open_channel

from ._versions import use_cache

#: Where versions are written down, and how.
VERSIONS = {
    "image/_recipe.py": "BUILDER_VERSION = 1",
    "machines/_templates.py": "_FORMAT: Final = 1",
    "machines/_named.py": "_FORMAT: Final = 1",
    "machines/_ledger.py": "FORMAT: Final = 1",
    "machines/_roster.py": "FORMAT: Final = 1",
    "wire/_framing.py": "PROTOCOL_VERSION = 1",
}


@pytest.fixture(scope="module", params=[0, 2], ids=["older", "newer"])
def other_version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with another version of the library."""
    directory = tmp_path_factory.mktemp("other")
    package = directory / "trio_sandbox"
    shutil.copytree(Path(trio_sandbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in VERSIONS.items():
        text = (package / name).read_text()
        assert text.count(f"{line}\n") == 1, name
        (package / name).write_text(text.replace(f"{line}\n", f"{line[:-1]}{request.param}\n"))
    shutil.copy(Path(__file__).with_name("_versions.py"), directory)
    return directory


@contextmanager
def other_process(version: Path, *arguments: Path) -> Generator[subprocess.Popen[str]]:
    """Run `_versions` with that version of the library; it goes on with each line that it gets."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _versions; _versions.main(*sys.argv[2:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(version), *map(str, arguments)],
        cwd=version,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Have it do all once more, and return what came of that."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


async def test_two_versions_use_one_cache_at_the_same_time(
    other_version: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, ledgers = tmp_path / "cache", tmp_path / "ledgers"
    with open_ledger(ledgers) as ledger, other_process(other_version, cache, ledgers) as other:
        ledger.publish(LedgerEntry(pid=1, memory_total=100, memory_reserved=7))
        theirs = ask(other)
        assert theirs["built"] == theirs["made"] == 1
        ours = await use_cache(cache, "ours")
        assert ours["built"] == ours["made"] == 1, "theirs is nothing that we could use"
        assert ours["image"] != theirs["image"]
        assert ours["template"] != theirs["template"]
        again = ask(other)
        assert again["built"] == again["made"] == 0, "and there it is still"
        assert (again["image"], again["template"]) == (theirs["image"], theirs["template"])
        assert (await use_cache(cache, "ours"))["made"] == 0
        # What is no cache, a user has saved.
        with pytest.raises(TemplateUnusableError, match=r"'theirs' was saved by another version of trio-sandbox"):
            await use_cache(cache, "theirs", save=False)
        assert "another version" in ask(other)["refused"]
        # Neither counts what it can't read, and both say so.
        assert ledger.others() == []
        assert "this version of trio-sandbox reads 1 only" in caplog.text
        assert ask(other)["elsewhere"] == 0


def hello_of(version: Path, role: str) -> list[str]:
    """Return the command of a process that prints what that version says first."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from trio_sandbox.wire._connection import Connection, Role; "
        "sys.stdout.buffer.write(Connection(Role[sys.argv[2]], {}).next_write()[0])"
    )
    return [sys.executable, "-c", code, str(version), role]


async def test_the_other_s_agent_is_refused_with_a_word_about_versions(other_version: Path) -> None:
    for role, other_role in ((Role.HOST, "GUEST"), (Role.GUEST, "HOST")):
        ours, theirs = memory_stream_pair()
        greeting = (await trio.run_process(hello_of(other_version, other_role), capture_stdout=True)).stdout
        await theirs.send_all(greeting)
        number = re.search(rb'"version":(\d)', greeting)
        assert number is not None
        with trio.fail_after(HANG_LIMIT), pytest.raises(WireError) as caught:
            async with open_channel(ours, role=role, hello={}):
                pytest.fail("it speaks another version")
        assert f"speaks version {number[1].decode()} of the protocol, and this is version 1" in str(caught.value)
        assert "another version of trio-sandbox" in str(caught.value)


@pytest.mark.parametrize(
    "content", ['{"format": 2, "verdicts": []}', '{"key": ["k"], "version": 2, "failure": {}}', "[]"]
)
def test_a_verdict_on_the_accelerator_of_another_version_is_found_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "accelerator.json").write_text(content)
    assert _accelerator._read_cache(tmp_path, "k") is None  # pyright: ignore[reportPrivateUsage]
