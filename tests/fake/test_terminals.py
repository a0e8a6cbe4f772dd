"""Processes with a terminal: a real agent in this process, whose terminals are this machine's."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio
import trio.testing

from tests._leaks import nothing_left
from trio_sandbox import GuestProcess, Sandbox, Terminal
from trio_sandbox.guest.agent import children
from trio_sandbox.wire import RecordStream

from ._guest import open_fake_sandbox, receive_json
from ._sandbox import open_local_sandbox


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


class Screen:
    """What a terminal has shown so far."""

    def __init__(self, process: GuestProcess) -> None:
        assert process.stdio is not None
        self.stdio = process.stdio
        self.shown = b""

    async def until(self, text: bytes) -> None:
        """Wait until *text* was shown since the last time."""
        while text not in self.shown:
            data = await self.stdio.receive_some()
            assert data, f"the terminal ended without {text!r} after {self.shown!r}"
            self.shown += data
        self.shown = self.shown.partition(text)[2]

    async def rest(self) -> bytes:
        async for data in self.stdio:
            self.shown += data
        return self.shown


async def test_it_is_the_controlling_terminal_of_a_session_and_all_three_descriptors(sandbox: Sandbox) -> None:
    script = (
        "tty; test -t 0 && test -t 1 && test -t 2 && echo three; echo error >&2; echo mine > /dev/tty; ls /proc/self/fd"
    )
    async with sandbox.open_process(["sh", "-c", script], pty=True) as process:
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        lines = (await Screen(process).rest()).decode().split()
        assert await process.wait() == 0
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:4] == ["three", "error", "mine"]
    assert lines[4:] == ["0", "1", "2", "3"]  # the last is ls's own: ours is not inherited


async def test_what_is_typed_is_echoed_edited_and_read(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["sh", "-c", 'read line; echo "<$line>"'], pty=True) as process:
        screen = Screen(process)
        # An erase takes back one character, of however many bytes.
        await screen.stdio.send_all("a\N{LATIN SMALL LETTER E WITH ACUTE}\x7fb\n".encode())
        await screen.until(b"<ab>")
        assert await process.wait() == 0


async def test_control_characters_are_signals_and_ends(sandbox: Sandbox) -> None:
    script = "trap 'echo interrupted' INT; echo ready; cat; echo ended; exit 5"
    async with sandbox.open_process(["sh", "-c", script], pty=True) as process:
        screen = Screen(process)
        await screen.until(b"ready")
        await screen.stdio.send_all(b"line\n")
        await screen.until(b"line\r\nline\r\n")  # so that cat runs
        await screen.stdio.send_all(b"\x03")
        await screen.until(b"interrupted")
        await screen.until(b"ended")
        assert await process.wait() == 5
    async with sandbox.open_process(["cat"], pty=True) as process:
        assert process.stdio is not None
        await process.stdio.send_all(b"line\n\x04")
        assert (await Screen(process).rest()).count(b"line\r\n") == 2
        assert await process.wait() == 0


async def test_size_and_kind(sandbox: Sandbox) -> None:
    terminal = Terminal(rows=50, columns=132, term="vt220")
    script = "stty size; echo $TERM"
    completed = await sandbox.run_process(script, shell=True, pty=terminal, capture_stdout=True)
    assert completed.stdout == b"50 132\r\nvt220\r\n"
    completed = await sandbox.run_process(
        script, shell=True, pty=True, capture_stdout=True, env={"PATH": "/bin:/usr/bin"}
    )
    assert completed.stdout == b"24 80\r\nxterm-256color\r\n"
    completed = await sandbox.run_process(
        script, shell=True, pty=True, capture_stdout=True, env={"PATH": "/bin:/usr/bin", "TERM": "dumb"}
    )
    assert completed.stdout == b"24 80\r\ndumb\r\n"


async def test_a_new_size_is_told_to_the_foreground(sandbox: Sandbox) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done"
    async with sandbox.open_process(["sh", "-c", script], pty=True) as process:
        screen = Screen(process)
        await screen.until(b"ready")
        process.resize(33, 44)
        await screen.until(b"33 44")


async def test_of_sizes_that_were_not_sent_yet_the_last_one_counts() -> None:
    requests: list[Any] = []
    over = trio.Event()

    async def serve(records: RecordStream) -> None:
        requests.append(await receive_json(records))
        await records.send_json({"started": 77})
        while (request := await receive_json(records)) != {"kill": True}:
            requests.append(request)
        await records.send_json({"exited": {"status": -9}}, end=True)
        over.set()

    async with open_fake_sandbox({"process": serve}) as (sandbox, _):
        async with sandbox.open_process(["vi"], pty=True) as process:
            for columns in range(1, 1000):
                process.resize(10, columns)
            process.send_signal(signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()
            process.resize(11, 12)
            await trio.testing.wait_all_tasks_blocked()
        await over.wait()
    terminal = requests[0].pop("terminal")
    assert terminal.pop("stdio") > 0
    assert terminal == {"rows": 24, "columns": 80, "term": "xterm-256color"}
    assert (requests[0]["stdin"], requests[0]["stdout"], requests[0]["stderr"]) == (None, None, None)
    assert requests[1:] == [{"resize": [10, 999]}, {"signal": signal.SIGHUP}, {"resize": [11, 12]}]


async def test_closing_hangs_up(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["sh", "-c", "echo ready; exec sleep 1000"], pty=True) as process:
        screen = Screen(process)
        await screen.until(b"ready")
        await screen.stdio.aclose()
        assert await process.wait() == -signal.SIGHUP
        with pytest.raises(trio.ClosedResourceError):
            await screen.stdio.receive_some()
        process.resize(1, 1)  # nobody is left to be told


async def test_the_terminal_lives_as_long_as_somebody_has_it_open(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["sh", "-c", "trap '' HUP; sleep 1000 & echo left; exit 3"], pty=True) as process:
        assert await process.wait() == 3
        screen = Screen(process)
        await screen.until(b"left")
        with trio.move_on_after(0.05) as patience:
            await screen.rest()
        assert patience.cancelled_caught
    with pytest.raises(trio.ClosedResourceError):
        await screen.rest()


async def test_typing_to_nobody_is_an_error(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["true"], pty=True) as process:
        assert process.stdio is not None
        assert await Screen(process).rest() == b""
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await process.stdio.send_all(b"x" * 1000)


async def test_much_output_arrives_whole_and_a_stalled_reader_stops_it(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["sh", "-c", "seq 200000; echo done"], pty=True) as process:
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert process.returncode is None
        output = await Screen(process).rest()
        assert output == b"".join(b"%d\r\n" % n for n in range(1, 200001)) + b"done\r\n"
        assert await process.wait() == 0


async def test_run_process(sandbox: Sandbox) -> None:
    completed = await sandbox.run_process(
        ["sh", "-c", "cat; echo error >&2"], stdin=b"typed\n\x04", pty=True, capture_stdout=True
    )
    assert completed.stdout == b"typed\r\ntyped\r\nerror\r\n"
    assert completed.stderr is None
    # Nobody captures it, and yet it does not wait; nor does input that is not wanted keep anybody.
    completed = await sandbox.run_process(["seq", "100000"], stdin=b"x\n" * 1_000_000, pty=True)
    assert (completed.returncode, completed.stdout) == (0, None)
    with pytest.raises(subprocess.CalledProcessError):
        await sandbox.run_process(["false"], pty=True)
    with pytest.raises(ValueError, match="capture_stderr"):
        await sandbox.run_process(["true"], pty=True, capture_stderr=True)


async def test_failures_to_start(sandbox: Sandbox) -> None:
    with nothing_left():
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            await sandbox.run_process(["no-such-program"], pty=True)
        await trio.testing.wait_all_tasks_blocked(0.02)


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"columns": 65536}, {"term": ""}, {"term": "a\0b"}])
def test_terminals_that_can_not_be(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Terminal(**arguments)


@pytest.mark.parametrize("arguments", [{"rows": "24"}, {"columns": True}, {"term": None}])
def test_terminals_of_wrong_types(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(arguments))):
        Terminal(**arguments)


async def test_sizes_that_can_not_be(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["cat"], pty=True) as process:
        with pytest.raises(ValueError, match="rows"):
            process.resize(0, 80)
        with pytest.raises(TypeError, match="columns"):
            process.resize(24, 80.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with sandbox.open_process(["cat"]) as process:
        assert process.stdio is None
        with pytest.raises(ValueError, match="no terminal"):
            process.resize(24, 80)


@pytest.mark.parametrize(
    "terminal",
    [
        True,
        {},
        {"stdio": 1, "rows": 24, "columns": 80},
        {"stdio": 1, "rows": 0, "columns": 80, "term": "x"},
        {"stdio": 1, "rows": 24, "columns": 65536, "term": "x"},
        {"stdio": 99, "rows": 24, "columns": 80, "term": "x"},
    ],
)
async def test_the_guest_checks_terminals_as_well(terminal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.guest.agent.pipes._PATIENCE", 0.01)
    async with open_local_sandbox() as (_, machine):
        async with RecordStream(machine.guest.open_stream({"service": "process"})) as records:
            await records.send_json({"argv": ["true"], "terminal": terminal})
            with pytest.raises(trio.BrokenResourceError, match=r"terminal|pipe"):
                await records.receive()


async def test_a_terminal_that_comes_when_nobody_waits_any_more_is_closed() -> None:
    child = children.Children.__new__(children.Children)
    child._children = {}
    abandoned = child._children[0] = children.Child(child, 0)
    abandoned.abandoned = True
    reader, writer = os.pipe()
    child._dispatch(("started", 0, 77), [reader])
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(reader)
    os.close(writer)
