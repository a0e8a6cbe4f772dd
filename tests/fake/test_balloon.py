"""The balloon client against a scripted peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trio_sandbox import BalloonError, QMPClosedError, Timeouts
from trio_sandbox.constants import BALLOON_INFLATE_TARGET_MIB
from trio_sandbox.qemu import BalloonClient

from ._qmp_peer import Peer, open_pair

MIB = 2**20


class Machine:
    """A machine of 256 MiB with a balloon; the guest follows as far as the test lets it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.actual = 256 * MIB
        self.targets: list[float] = []
        self.asked = trio.Event()
        self.follows = True
        self.no_balloon = False
        self.available = 120 * MIB
        self.reports = True
        self.polled: list[int] = []
        self.last_report = 0

    async def serve(self) -> None:
        while message := await self.peer.receive():
            await self._answer(message)

    async def _answer(self, message: dict[str, Any]) -> None:
        command = message["execute"]
        if command == "query-memory-size-summary":
            await self.peer.reply(message, {"base-memory": 256 * MIB, "plugged-memory": 0})
        elif self.no_balloon:
            await self.peer.refuse(message, "DeviceNotActive", "No balloon device has been activated")
        elif command == "query-balloon":
            await self.peer.reply(message, {"actual": self.actual})
        elif command == "balloon":
            self.targets.append(message["arguments"]["value"] / MIB)
            await self.peer.reply(message)
            self.asked.set()
            if self.follows:
                await self.move(message["arguments"]["value"])
        elif command == "qom-set":
            self.polled.append(message["arguments"]["value"])
            await self.peer.reply(message)
        elif command == "qom-get":
            self.last_report += self.reports
            stats = {"stat-free-memory": 7, "stat-available-memory": self.available}
            await self.peer.reply(message, {"last-update": self.last_report, "stats": stats})
        else:
            await self.peer.refuse(message, "CommandNotFound", command)

    async def move(self, actual: int) -> None:
        self.actual = actual
        await self.peer.event("BALLOON_CHANGE", actual=actual)


@asynccontextmanager
async def open_machine(
    timeouts: Timeouts | None = None, *, shared_memory: bool = False
) -> AsyncGenerator[tuple[BalloonClient, Machine]]:
    async with open_pair() as (channel, peer):
        machine = Machine(peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.serve)  # noqa: ASYNC113 # it may start any time
            yield BalloonClient(channel, timeouts=timeouts, shared_memory=shared_memory), machine
            nursery.cancel_scope.cancel()


async def test_query_is_in_mib() -> None:
    async with open_machine() as (balloon, machine):
        assert await balloon.query() == 256
        machine.actual = 100 * MIB + 4096
        assert await balloon.query() == 100


async def test_machine_without_balloon() -> None:
    async with open_machine() as (balloon, machine):
        machine.no_balloon = True
        assert await balloon.query() is None
        for operation in (balloon.inflate(96), balloon.deflate(128), balloon.wait_actual(96)):
            with pytest.raises(BalloonError, match="no balloon device"):
                await operation
        with pytest.raises(BalloonError, match="DeviceNotActive"):
            await balloon.set_target(96)


async def test_set_target_sends_bytes_and_does_not_wait() -> None:
    async with open_machine() as (balloon, machine):
        machine.follows = False
        await balloon.set_target(96)
        assert machine.targets == [96]
        assert await balloon.query() == 256


async def test_inflate_and_deflate_go_there_and_back() -> None:
    async with open_machine() as (balloon, machine):
        assert await balloon.inflate() == 256
        assert await balloon.query() == BALLOON_INFLATE_TARGET_MIB
        await balloon.deflate(256)
        assert machine.targets == [BALLOON_INFLATE_TARGET_MIB, 256]
        assert await balloon.query() == 256


async def test_a_guest_gives_what_it_can_spare_and_gets_it_again(autojump_clock: trio.testing.MockClock) -> None:
    async with open_machine() as (balloon, machine):
        assert await balloon.query_available() == 120
        assert await balloon.reclaim(spare_mib=20) == 100
        assert machine.targets == [156, 256]
        assert await balloon.query() == 256
        # It is asked for reports only as long as somebody waits for one.
        assert machine.polled == [1, 0, 1, 0]
        assert await balloon.reclaim(spare_mib=120) == 0
        assert machine.targets == [156, 256]


@pytest.mark.parametrize("available", [2**64 - 1, -1, "much", None])
async def test_a_guest_that_does_not_say_what_it_can_spare_is_left_alone(
    autojump_clock: trio.testing.MockClock, available: object
) -> None:
    async with open_machine() as (balloon, machine):
        machine.available = available  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        assert await balloon.query_available() is None
        assert await balloon.reclaim() == 0
        assert machine.targets == []


async def test_a_guest_that_says_too_much_is_asked_for_no_more_than_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_machine() as (balloon, machine):
        machine.available = 2**60
        assert await balloon.reclaim(spare_mib=32) == 223
        assert machine.targets == [33, 256]


async def test_no_report_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    async with open_machine(Timeouts(balloon=3)) as (balloon, machine):
        machine.reports = False
        with pytest.raises(BalloonError, match="did not report within 3 s") as caught:
            await balloon.reclaim()
        assert isinstance(caught.value.__cause__, trio.TooSlowError)
        assert (machine.targets, machine.polled) == ([], [1, 0])


async def test_whoever_is_cancelled_while_a_guest_gives_leaves_it_all_it_had(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_machine() as (balloon, machine):
        machine.follows = False
        with trio.move_on_after(10):
            await balloon.reclaim()
        assert machine.targets == [168, 256]


async def test_guest_that_is_there_already_is_left_alone() -> None:
    async with open_machine() as (balloon, machine):
        machine.actual = 80 * MIB
        assert await balloon.inflate(96) == 80
        await balloon.deflate(64)
        assert machine.targets == []


@pytest.mark.parametrize("wrong", [0, -1, 257, 10**9])
async def test_size_out_of_range_names_the_limit(wrong: int) -> None:
    async with open_machine() as (balloon, machine):
        for operation in (balloon.set_target(wrong), balloon.inflate(wrong), balloon.deflate(wrong)):
            with pytest.raises(ValueError, match=r"at least 1 MiB|at most 256 MiB"):
                await operation
        assert machine.targets == []


@pytest.mark.parametrize("wrong", [1.5, True, "96"])
async def test_size_of_the_wrong_type(wrong: Any) -> None:
    async with open_machine() as (balloon, _):
        with pytest.raises(TypeError, match="number of MiB"):
            await balloon.inflate(wrong)


async def test_shared_memory_must_not_move() -> None:
    async with open_machine(shared_memory=True) as (balloon, machine):
        assert await balloon.query() == 256
        for operation in (balloon.set_target(96), balloon.inflate(96), balloon.deflate(256)):
            with pytest.raises(BalloonError, match="shared"):
                await operation
        assert machine.targets == []


async def test_wait_actual_follows_events_and_asks_once() -> None:
    reached: list[int] = []
    async with open_machine() as (balloon, machine):

        async def wait() -> None:
            reached.append(await balloon.wait_actual(96, tolerance_mib=2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.01)
            machine.actual = 0  # a second query would see this and never get there
            for actual in (200, 150, 99):
                await machine.peer.event("BALLOON_CHANGE", actual=actual * MIB)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert reached == []
            await machine.peer.event("BALLOON_CHANGE", actual=98 * MIB)
        assert reached == [98]


async def test_wait_actual_takes_what_is_there_already() -> None:
    async with open_machine() as (balloon, _):
        assert await balloon.wait_actual(255) == 256  # near enough
        assert await balloon.wait_actual(256) == 256


async def test_guest_that_does_not_follow_gets_its_target_back(autojump_clock: trio.testing.MockClock) -> None:
    async with open_machine(Timeouts(balloon=9)) as (balloon, machine):
        machine.follows = False
        with pytest.raises(BalloonError, match="has 256 MiB and not 96 MiB after 9 s") as caught:
            await balloon.inflate(96)
        assert isinstance(caught.value.__cause__, trio.TooSlowError)
        assert caught.value.__notes__ == ["the balloon's target was put back to 256 MiB"]
        assert machine.targets == [96, 256]


async def test_guest_that_follows_half_way(autojump_clock: trio.testing.MockClock) -> None:
    async with open_machine() as (balloon, machine), trio.open_nursery() as nursery:
        machine.follows = False

        async def guest() -> None:
            await machine.asked.wait()
            await machine.move(180 * MIB)

        nursery.start_soon(guest)
        with pytest.raises(BalloonError, match="has 180 MiB and not 96 MiB"):
            await balloon.inflate(96)
        assert machine.targets == [96, 256]


async def test_cancelled_caller_puts_the_target_back() -> None:
    async with open_machine() as (balloon, machine), trio.open_nursery() as nursery:
        machine.follows = False
        scope = trio.CancelScope()

        async def inflate() -> None:
            with scope:
                await balloon.inflate(96)

        nursery.start_soon(inflate)
        await machine.asked.wait()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert scope.cancelled_caught
        assert machine.targets == [96, 256]
        machine.follows = True
        assert await balloon.inflate(96) == 256  # it is not busy any more


async def test_one_mover_at_a_time() -> None:
    async with open_machine() as (balloon, machine), trio.open_nursery() as nursery:
        machine.follows = False
        nursery.start_soon(balloon.inflate, 96)
        await machine.asked.wait()
        for operation in (balloon.inflate(80), balloon.deflate(256)):
            with pytest.raises(trio.BusyResourceError):
                await operation
        await machine.move(96 * MIB)


async def test_qemu_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pair() as (channel, _):
        balloon = BalloonClient(channel, timeouts=Timeouts(qmp_command=3))
        with pytest.raises(BalloonError, match="did not answer query-balloon within 3 s") as caught:
            await balloon.query()
        assert isinstance(caught.value.__cause__, trio.TooSlowError)


async def test_machine_that_dies_while_we_wait() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        machine = Machine(peer)
        machine.follows = False
        serving = trio.CancelScope()

        async def serve() -> None:
            with serving:
                await machine.serve()
            peer.close()

        async def die() -> None:
            await machine.asked.wait()
            await trio.testing.wait_all_tasks_blocked(0.01)
            serving.cancel()

        nursery.start_soon(serve)
        nursery.start_soon(die)
        balloon = BalloonClient(channel)
        with pytest.raises(QMPClosedError):
            await balloon.inflate(96)
        with pytest.raises(QMPClosedError):
            await balloon.query()
