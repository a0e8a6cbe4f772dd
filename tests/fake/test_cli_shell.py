"""`trio-sandbox shell` between a terminal that plays a script and a real agent in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from trio_sandbox import HostConfig, Sandbox, SandboxConfig
from trio_sandbox.cli import _shell
from trio_sandbox.cli._shell import RESET_MODES, ShellRequest, StandardTerminal, run_shell
from trio_sandbox.cli._signals import end_on_signal

from ._guest import FakeMachine
from ._sandbox import open_local_sandbox


class FakeTerminal:
    """Types what the test sends to `keys`, and keeps what is shown."""

    def __init__(self) -> None:
        self.rows_columns: tuple[int, int] = (24, 80)
        self.shown = b""
        self.log: list[str] = []
        self.keys, self._typed = trio.open_memory_channel[bytes](100)
        self._changed = trio.Event()

    def size(self) -> tuple[int, int]:
        return self.rows_columns

    async def read(self) -> bytes:
        try:
            return await self._typed.receive()
        except trio.EndOfChannel:
            return b""

    async def write(self, data: bytes | bytearray) -> None:
        await trio.lowlevel.checkpoint()
        self.shown += data
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, text: bytes) -> None:
        while text not in self.shown:
            await self._changed.wait()

    @contextlib.contextmanager
    def raw(self) -> Generator[None]:
        self.log.append("raw")
        try:
            yield
        finally:
            self.log.append("restored")

    def reset_modes(self) -> None:
        self.log.append("reset")


@attrs.define(eq=False)
class LocalHost:
    """A host whose one sandbox is on this machine."""

    sandbox: Sandbox

    async def prepare(self, image: str) -> None:
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def open_sandbox(self, image: str, config: SandboxConfig) -> AsyncGenerator[Sandbox]:
        yield self.sandbox


@asynccontextmanager
async def open_shell(
    *command: str, quiet: bool = True
) -> AsyncGenerator[tuple[FakeTerminal, trio.Nursery, list[object], FakeMachine]]:
    """Run the command in the background; how it ended is in the list once the nursery is done."""
    ended: list[object] = []
    terminal = FakeTerminal()
    async with open_local_sandbox() as (sandbox, machine):

        @asynccontextmanager
        async def open_host(config: HostConfig) -> AsyncGenerator[LocalHost]:
            yield LocalHost(sandbox)

        request = ShellRequest(
            command=("sh", "-c", *command), image="python", host=HostConfig(), sandbox=SandboxConfig(), quiet=quiet
        )

        async def run() -> None:
            ended.append(await end_on_signal(lambda: run_shell(request, terminal, open_host=open_host)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield terminal, nursery, ended, machine


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL), ("true", 0)])
async def test_the_status_is_the_shells(script: str, status: int) -> None:
    async with open_shell(f"stty size; {script}") as (terminal, _, ended, _):
        pass
    assert ended == [status]
    assert terminal.shown == b"24 80\r\n"
    assert terminal.log == ["raw", "restored"]


async def test_keys_before_the_detach_key_are_typed_and_those_after_it_are_not() -> None:
    async with open_shell("trap '' HUP INT; cat") as (terminal, _, ended, _):
        await terminal.keys.send(b"one\r")
        await terminal.until(b"one\r\none\r\n")
        await terminal.keys.send(b"two\r\x1dthree\r")
    assert ended == [128 + signal.SIGHUP]
    assert b"three" not in terminal.shown
    assert terminal.log == ["raw", "reset", "restored"]


async def test_a_terminal_that_goes_away_ends_it() -> None:
    async with open_shell("cat") as (terminal, _, ended, _):
        await terminal.keys.send(b"one\r")
        await terminal.until(b"one\r\none\r\n")
        terminal.keys.close()
    assert ended == [128 + signal.SIGHUP]


async def test_sizes_are_followed() -> None:
    async with open_shell("trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done") as (
        terminal,
        _,
        ended,
        _,
    ):
        await terminal.until(b"ready")
        terminal.rows_columns = (50, 100)
        os.kill(os.getpid(), signal.SIGWINCH)
        await terminal.until(b"50 100")
    assert ended == [0]


async def test_it_does_not_wait_for_what_the_shell_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shell, "DRAIN_SECONDS", 0.05)
    async with open_shell("trap '' HUP; sleep 1000 & echo last; exit 3") as (terminal, _, ended, _):
        pass
    assert ended == [3]
    assert terminal.shown == b"last\r\n"


async def test_a_signal_ends_it_and_restores_the_terminal() -> None:
    async with open_shell("echo ready; sleep 1000") as (terminal, _, ended, _):
        await terminal.until(b"ready")
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]
    assert terminal.log == ["raw", "reset", "restored"]


async def test_a_machine_that_ends_is_a_failure_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async with open_shell("echo ready; sleep 1000") as (terminal, _, ended, machine):
        await terminal.until(b"ready")
        machine.retire("the test says so")
    assert ended == [125]
    assert terminal.log == ["raw", "reset", "restored"]
    assert "the test says so" in capsys.readouterr().err


async def test_the_detach_key_is_told_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    async with open_shell("true", quiet=False):
        pass
    assert "Ctrl-]" in capsys.readouterr().err


# --- A real terminal in place of our own ---


@contextlib.contextmanager
def standard_terminal() -> Generator[int]:
    """Make descriptors 0 and 1 a new terminal, and yield its other end."""
    # Not a fixture: pytest's capturing puts its own descriptors back between a fixture and its test.
    master, slave = os.openpty()
    saved = [os.dup(0), os.dup(1)]
    for descriptor in (0, 1):
        os.dup2(slave, descriptor)
    try:
        yield master
    finally:
        for descriptor, copy in enumerate(saved):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(master)
        os.close(slave)


async def test_the_standard_terminal() -> None:
    terminal = StandardTerminal()
    with standard_terminal() as other_end:
        before = termios.tcgetattr(0)
        assert terminal.size() == (24, 80)  # it does not know
        with pytest.raises(ZeroDivisionError), terminal.raw():
            os.write(other_end, b"\x03\x1a\r")
            assert await terminal.read() == b"\x03\x1a\r"
            await terminal.write(b"a\nb")
            assert os.read(other_end, 100) == b"a\nb"
            raise ZeroDivisionError
        assert termios.tcgetattr(0) == before
        terminal.reset_modes()
        assert os.read(other_end, 100) == RESET_MODES
