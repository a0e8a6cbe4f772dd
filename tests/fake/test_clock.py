"""The service that keeps a guest's clock right, and the agent's part in it."""

from __future__ import annotations

import ctypes
import struct
import time
import types
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests._leaks import wait_until
from trio_sandbox.guest.agent.clock import ClockService, step_clock
from trio_sandbox.qemu._clock import GuestClock
from trio_sandbox.wire import ChannelStream, Role, open_channel

_Handler = Callable[[ChannelStream, dict[str, object]], Awaitable[None]]
_SECOND = 10**9


class Guest:
    """A guest whose clock is off."""

    def __init__(self, offset: int, *, deaf_for: int = 0) -> None:
        self.offset = offset
        self.steps = 0
        self._deaf_for = deaf_for

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        step = header.get("step", 0)
        assert isinstance(step, int)
        self.offset += step
        self.steps += bool(step)
        if self._deaf_for:
            # Hears of things, but takes its time.
            self._deaf_for -= 1
            await trio.sleep(0.4)
        await stream.send_all((time.time_ns() + self.offset).to_bytes(8, "big"), end=True)


@asynccontextmanager
async def keep(handler: _Handler) -> AsyncGenerator[GuestClock]:
    clock = GuestClock()
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve() -> None:
        async with open_channel(theirs, role=Role.GUEST, hello={}, handler=handler):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113 - what is sent before it runs waits in the stream
        async with open_channel(ours, role=Role.HOST, hello={}) as channel:
            await nursery.start(clock.serve, channel)  # noqa: ASYNC111 - it ends with the channel
            yield clock
            nursery.cancel_scope.cancel()


async def test_it_is_put_right_and_again_when_it_was_disturbed() -> None:
    guest = Guest(-3600 * _SECOND, deaf_for=2)
    async with keep(guest.serve) as clock:
        assert clock.bound is None
        await wait_until(lambda: clock.bound is not None and clock.bound < 0.2)
        assert abs(guest.offset) < 0.2 * _SECOND
        guest.offset += 5 * _SECOND
        clock.disturb()
        assert clock.bound is None
        await wait_until(lambda: clock.bound is not None and clock.bound < 0.2)
        assert abs(guest.offset) < 0.2 * _SECOND


async def test_what_is_right_is_not_touched() -> None:
    guest = Guest(0)
    async with keep(guest.serve) as clock:
        await wait_until(lambda: clock.bound is not None and clock.bound < 0.02)
        assert guest.steps == 0


@pytest.mark.parametrize("answer", [b"", b"1234567", b"x" * 10_000, None])
async def test_a_guest_that_talks_nonsense_harms_nobody(answer: bytes | None) -> None:
    asked = 0

    async def serve(stream: ChannelStream, header: dict[str, object]) -> None:
        nonlocal asked
        asked += 1
        if answer is None:
            stream.reset("no such service")
        else:
            await stream.send_all(answer, end=True)

    async with keep(serve) as clock:
        await wait_until(lambda: asked > 2)
        assert clock.bound is None


async def test_a_guest_that_tells_wrong_times_is_soon_left_alone(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The host's clock goes as Trio's does.
    now = types.SimpleNamespace(time=trio.current_time, time_ns=lambda: int(trio.current_time() * _SECOND))
    monkeypatch.setattr("trio_sandbox.qemu._clock.time", now)
    asked = 0

    async def serve(stream: ChannelStream, header: dict[str, object]) -> None:
        nonlocal asked
        asked += 1
        await stream.send_all((asked * 3600 * _SECOND).to_bytes(8, "big"), end=True)

    async with keep(serve):
        await trio.sleep(50)
        first = asked
        await trio.sleep(600)
    assert 5 <= first <= 7
    assert asked <= first + 11 * 7


async def test_a_guest_that_is_gone_ends_the_service() -> None:
    clock = GuestClock()
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_hello_and_go, theirs)  # noqa: ASYNC113 - as above
        async with open_channel(ours, role=Role.HOST, hello={}) as channel:
            await nursery.start(clock.serve, channel)  # noqa: ASYNC111 - as above
            await channel.wait_closed()
        assert clock.bound is None


async def _hello_and_go(stream: trio.abc.Stream) -> None:
    async with open_channel(stream, role=Role.GUEST, hello={}):
        await trio.sleep(0.1)


async def test_the_agent_answers_and_refuses() -> None:
    answers = list[bytes | str]()
    ours, theirs = trio.testing.memory_stream_pair()
    service = ClockService(settable=False)  # this process has no clock of its own

    async def serve() -> None:
        async with open_channel(theirs, role=Role.GUEST, hello={}, handler=service.serve):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113 - what is sent before it runs waits in the stream
        async with open_channel(ours, role=Role.HOST, hello={}) as channel:
            for step in (None, 5, "five", 1.5):
                header: dict[str, object] = {"service": "clock"}
                if step is not None:
                    header["step"] = step
                answer = b""
                before = time.time_ns()
                try:
                    async with channel.open_stream(header, flush=True) as stream:
                        while data := await stream.receive_some():
                            answer += data
                    assert before <= int.from_bytes(answer, "big") <= time.time_ns()
                    answers.append("told")
                except trio.BrokenResourceError as exc:
                    answers.append(str(exc))
        nursery.cancel_scope.cancel()
    assert answers[:2] == ["told", "told"]
    assert all("whole number" in str(answer) for answer in answers[2:])


@pytest.mark.parametrize(
    ("step", "time_of_it"),
    [(1, (0, 1)), (-1, (-1, 999_999_999)), (-3600 * _SECOND, (-3600, 0)), (1_500_000_000, (1, 500_000_000))],
)
def test_the_kernel_adds_a_step_by_itself(
    step: int, time_of_it: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `struct timex` of adjtimex(2) has it, on 64 bits."""
    requests = list[bytes]()

    def adjtimex(request: ctypes.Array[ctypes.c_char]) -> int:
        requests.append(request.raw)
        return 0

    monkeypatch.setattr("trio_sandbox.guest.agent.clock._libc", types.SimpleNamespace(adjtimex=adjtimex))
    step_clock(step)
    (request,) = requests
    assert len(request) == 208
    assert int.from_bytes(request[:4], "little") == 0x0100 | 0x2000  # ADJ_SETOFFSET, ADJ_NANO
    assert struct.unpack_from("qq", request, 72) == time_of_it
    assert not any(request[4:72] + request[88:])


def test_a_step_that_no_clock_can_make() -> None:
    with pytest.raises(OverflowError, match="more than a clock can be set"):
        step_clock(10**30)
