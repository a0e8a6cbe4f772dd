"""The service "idle": what is just ending is waited for, and what goes on is not idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from trio_sandbox.guest.agent.snapshot import IdleService, Machine

from ._wire import open_pair


class Guest:
    """A control group with some processes in it, of which some are the host's."""

    def __init__(self, directory: Path, *, processes: int, children: int, idle: int) -> None:
        self.directory, self.children, self.idle = directory, children, idle
        self.set_processes(processes)
        machine = Machine(-1, str(directory))
        self.service = IdleService(machine, lambda: self.children, lambda: self.idle, lambda: True)

    def set_processes(self, count: int) -> None:
        for name in ("cgroup.procs", "cgroup.threads"):
            (self.directory / name).write_text("1\n" * count)

    async def ask(self) -> bytes:
        async with open_pair() as pair:
            stream, theirs = await pair.open_stream()
            await self.service.serve(theirs, {})
            return await stream.receive_some()


@pytest.mark.parametrize(
    ("processes", "children", "idle", "answer"),
    [
        (1, 1, 1, b"idle"),
        (2, 1, 1, b"busy"),  # a run has left something: nobody's end is waited for
        (2, 2, 1, b"busy"),  # a helper that hangs
    ],
)
async def test_whether_something_goes_on(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    processes: int,
    children: int,
    idle: int,
    answer: bytes,
) -> None:
    assert await Guest(tmp_path, processes=processes, children=children, idle=idle).ask() == answer


@pytest.mark.parametrize("how", ["it ends", "it is idle again"])
async def test_what_is_about_to_end_is_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, how: str
) -> None:
    guest = Guest(tmp_path, processes=2, children=2, idle=1)

    async def end() -> None:
        await trio.sleep(0.3)
        if how == "it ends":
            guest.set_processes(1)
            guest.children = 1
        else:
            guest.idle = 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        assert await guest.ask() == b"idle"
