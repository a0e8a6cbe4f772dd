"""What `trio-sandbox ps` and `kill` print, and how they fail."""

from __future__ import annotations

import io
import json
import sys

import attrs
import pytest

from trio_sandbox import SandboxError
from trio_sandbox.cli import _ps, main
from trio_sandbox.cli._ps import age, table
from trio_sandbox.machines import RunningSandbox

ONE = RunningSandbox(
    id="0123abcd4567",
    image="python",
    state="running",
    opened=1000.0,
    memory_mib=256,
    vcpus=1,
    accelerator="kvm",
    qemu_pid=11,
    owner_pid=10,
    owner_command="python3 agent.py --verbose",
)
TWO = attrs.evolve(ONE, id="f" * 12, image="data", state="hibernated", qemu_pid=None)
#: Another container's, and with a name that a guest's author could have chosen.
THREE = attrs.evolve(
    ONE, id="0" * 12, state="ended", image="a\x1b[2J\nb", qemu_pid=None, owner_pid=None, owner_command=""
)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have three sandboxes run; those that are ended are in the list."""
    ended: list[str] = []

    def kill(name: str) -> bool:
        if name == TWO.id:
            raise SandboxError("it hibernates")
        ended.append(name)
        return name == ONE.id

    monkeypatch.setattr(_ps, "running_sandboxes", lambda: ([ONE, TWO, THREE], ["a file is damaged\x1b"]))
    monkeypatch.setattr(_ps, "kill_sandbox", kill)
    return ended


def test_a_table() -> None:
    assert table([ONE, TWO, THREE], now=1090).splitlines() == [
        "ID            IMAGE       STATE       AGE   MEMORY   ACCELERATOR  OWNER  COMMAND",
        "0123abcd4567  python      running     90 s  256 MiB  kvm          10     python3 agent.py --verbose",
        "ffffffffffff  data        hibernated  90 s  256 MiB  kvm          10     python3 agent.py --verbose",
        "000000000000  a\\x1b[2J b  ended       90 s  256 MiB  kvm          -      -",
    ]
    assert {len(line) for line in table([ONE, TWO, THREE], now=1090, columns=20).splitlines()} == {20}
    assert table([], now=0) == "no sandbox of this user runs on this machine"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0.9, "0 s"),
        (119.9, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_800, "2 d"),
        (1e9, "11574 d"),
    ],
)
def test_an_age(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_ps(running: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["ID", ONE.id, TWO.id, THREE.id]
    assert captured.err == "trio-sandbox: a file is damaged\\x1b\n"


def test_what_standard_output_can_not_encode_is_escaped(running: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    one = attrs.evolve(ONE, owner_command="python \xfcbung.py")
    monkeypatch.setattr(_ps, "running_sandboxes", lambda: ([one], problems))
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert main(["ps"]) == 0
    assert output.getvalue().endswith(b"python \\xfcbung.py\n")


def test_ps_as_json(running: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [attrs.asdict(each) for each in (ONE, TWO, THREE)]


def test_nothing_can_be_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> object:
        raise SandboxError("it is somebody else's")

    monkeypatch.setattr(_ps, "running_sandboxes", fail)
    for command in (["ps"], ["kill", "--all"]):
        assert main(command) == 1
        assert capsys.readouterr() == ("", "trio-sandbox: it is somebody else's\n")


def test_kill(running: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kill", ONE.id, THREE.id, ONE.id]) == 0
    assert running == [ONE.id, THREE.id], "each once"
    assert capsys.readouterr().out == f"{ONE.id}: ended\n{THREE.id}: its virtual machine was gone already\n"
    assert main(["kill", TWO.id, ONE.id, "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [{"id": ONE.id, "ended": True}], "the others are ended all the same"
    assert captured.err == "trio-sandbox: it hibernates\n"


def test_kill_all_that_run(running: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kill", "--all"]) == 0
    assert running == [ONE.id]
    assert capsys.readouterr().err == "trio-sandbox: a file is damaged\\x1b\n"


@pytest.mark.parametrize("arguments", [[], ["--all", ONE.id]])
def test_what_to_kill_must_be_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["kill", *arguments])
    assert raised.value.code == 2
    assert "--all" in capsys.readouterr().err
