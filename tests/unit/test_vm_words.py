"""How the end of a virtual machine is put into words."""

from __future__ import annotations

import pytest

from trio_sandbox.qemu._console import describe_end, excerpt

PANIC = "[    1.5] Kernel panic - not syncing: Attempted to kill init!\n"


@pytest.mark.parametrize(
    ("returncode", "output", "console", "words"),
    [
        (0, "", "...", "the guest shut down or rebooted"),
        (0, "", f"...\n{PANIC}...", "the guest's kernel panicked: Kernel panic - not syncing: Attempted to kill init!"),
        (1, "qemu: no\n", "", "QEMU exited with status 1: qemu: no"),
        (-9, "", "...", "QEMU was ended by SIGKILL"),
        (-7, "", "", "QEMU was ended by SIGBUS: the disk that its RAM's file is on is full, or that file was cut off"),
    ],
)
def test_describe_end(returncode: int, output: str, console: str, words: str) -> None:
    assert describe_end(returncode, output, console) == words


def test_an_excerpt_is_the_end() -> None:
    assert excerpt("") == ""
    assert excerpt("one\ntwo\n\n") == "one\ntwo"
    assert excerpt("".join(f"{number}\n" for number in range(100))).splitlines() == [str(n) for n in range(60, 100)]


def test_an_excerpt_is_around_a_panic() -> None:
    console = "before\n" * 100 + PANIC + "trace\n" * 100
    lines = excerpt(console).splitlines()
    assert len(lines) == 40
    assert lines.index(PANIC.strip()) == 10


def test_a_panic_near_the_end_does_not_cut_it_off() -> None:
    assert excerpt("before\n" * 100 + PANIC + "end").splitlines()[-2:] == [PANIC.strip(), "end"]
