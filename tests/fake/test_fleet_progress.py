"""What nodes say of their long work is told to `HostConfig.progress`, where the fleet was opened."""

from __future__ import annotations

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import HostConfig, Progress
from trio_sandbox.fleet._progress import ProgressNotes

from ._fleet import LocalHost, open_fake_fleet


async def test_it_is_told_where_the_fleet_was_opened() -> None:
    host, told = LocalHost(), list[Progress]()
    async with open_fake_fleet("one", one=host, host_config=HostConfig(progress=told.append)):
        host.notes(Progress("image python", "fetching", 0.1))
        host.notes(Progress("image python", "fetching", 0.2))
        host.notes(Progress("image node", "building"))
        await wait_until(lambda: len(told) == 2)
        assert told == [
            Progress("node one: image python", "fetching", 0.2),
            Progress("node one: image node", "building"),
        ]


async def test_what_is_told_raises_as_it_would_here() -> None:
    host = LocalHost()

    def fail(progress: Progress) -> None:
        raise RuntimeError(f"no more of {progress.stage}")

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no more of node one: x"), flatten_subgroups=True):
        async with open_fake_fleet("one", one=host, host_config=HostConfig(progress=fail)):
            host.notes(Progress("x", "y"))
            await trio.sleep_forever()


def test_nobody_can_say_so_much_that_it_is_too_much() -> None:
    notes = ProgressNotes()
    for number in range(1000):
        notes(Progress(f"stage {number}", "begun"))
    notes(Progress("stage 0", "done"))
    taken = notes.take()
    assert len(taken) == 100
    assert taken[0].message == "done"
    assert notes.take() == ()
