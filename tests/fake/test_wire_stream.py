"""`ChannelStream`: Trio's own conformance suite, and what goes beyond it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from trio_sandbox.wire import PIECE_SIZE, ChannelStream, PeerGoneError, StreamResetError
from trio_sandbox.wire._framing import CREDIT, INITIAL_CREDIT, Kind, frame

from . import _wire
from ._wire import open_pair, port_pair


@pytest.fixture(params=["memory", "port"], autouse=True)
def _transports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test over a transport that the writer's task writes to, and one that senders write to."""
    if request.param == "port":
        monkeypatch.setattr(_wire, "make_transports", port_pair)


async def test_conformance() -> None:
    async with open_pair() as pair:
        await trio.testing.check_half_closeable_stream(pair.open_stream, pair.open_clogged)


async def test_conformance_of_streams_that_the_guest_sends_on() -> None:
    async with open_pair() as pair:

        async def turned() -> tuple[ChannelStream, ChannelStream]:
            stream, other = await pair.open_stream()
            return other, stream

        await trio.testing.check_half_closeable_stream(turned, None)


async def receive_all(stream: ChannelStream, max_bytes: int | None = None) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some(max_bytes):
        data += piece
    return bytes(data)


@pytest.mark.parametrize("max_bytes", [None, 1, 1000, 65536])
async def test_more_than_the_credit_goes_through_in_order(max_bytes: int | None) -> None:
    size = INITIAL_CREDIT * 3 if max_bytes != 1 else 3000
    message = bytes(i * i % 251 for i in range(1000)) * (size // 1000)
    async with open_pair() as pair:
        stream, other = await pair.open_stream()

        async def send() -> None:
            await stream.send_all(message, end=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await receive_all(other, max_bytes) == message


async def test_unread_data_is_bounded() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(2**20))
            await trio.testing.wait_all_tasks_blocked()
            assert len(await other.receive_some()) == INITIAL_CREDIT
            nursery.cancel_scope.cancel()


async def test_a_stalled_stream_does_not_stall_the_others() -> None:
    async with open_pair() as pair:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                stalled, _ = await pair.open_stream()
                nursery.start_soon(stalled.send_all, bytes(2**20))
            await trio.testing.wait_all_tasks_blocked()
            stream, other = await pair.open_stream()
            nursery.start_soon(stream.send_all, b"through")
            assert await other.receive_some() == b"through"
            assert await pair.host.ping() >= 0
            await stream.send_eof()
            assert await other.receive_some() == b""
            nursery.cancel_scope.cancel()


async def test_what_is_opened_and_sent_at_once_is_one_write() -> None:
    async with open_pair() as pair:
        before = pair.host.statistics()
        stream = pair.host.open_stream({"service": "echo"})
        await stream.send_all(b"request", end=True)
        other = await pair.accepted.receive()
        assert await receive_all(other) == b"request"
        assert pair.host.statistics().writes - before.writes == 1
        await other.send_and_close(b"answer")
        assert await receive_all(stream) == b"answer"
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert pair.guest.statistics().writes - before.writes == 1
        assert pair.host.statistics().writes - before.writes == 1
        assert pair.host.statistics().open_streams == pair.guest.statistics().open_streams == 0


async def test_a_request_that_stays_open_is_answered_and_closed_without_more_writes() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        before, guest_before = pair.host.statistics(), pair.guest.statistics()
        await other.send_and_close(b"answer")
        assert await receive_all(stream) == b"answer"
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert pair.host.statistics().writes == before.writes
        assert pair.guest.statistics().writes - guest_before.writes == 1
        # What the host owes goes with the next thing it says.
        await pair.host.ping()
        assert pair.guest.statistics().open_streams == 0


async def test_data_before_a_close_is_complete() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(b"all of it")
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_all(other) == b"all of it"
        with pytest.raises(StreamResetError, match="the peer reset the stream: 'closed'") as caught:
            await other.send_all(b"x")
        assert caught.value.reason == "closed"


async def test_a_reset_drops_what_was_not_read() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(b"never read")
        stream.reset("changed my mind")
        await trio.testing.wait_all_tasks_blocked()
        for attempt in (other.receive_some, other.send_eof, other.wait_send_all_might_not_block):
            with pytest.raises(StreamResetError, match="changed my mind"):
                await attempt()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        assert "reset by the peer" in repr(other)
        assert "closed" in repr(stream)


async def test_a_reset_wakes_both_directions() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(bytes(INITIAL_CREDIT))

        async def expect_reset(operation: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(StreamResetError):
                await operation()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_reset, stream.receive_some)
            nursery.start_soon(expect_reset, lambda: stream.send_all(b"x"))
            await trio.testing.wait_all_tasks_blocked()
            other.reset()


async def test_a_reset_stops_a_send_that_waits_for_credit_and_a_reader_keeps_what_ended() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await other.send_all(b"complete", end=True)
        await other.aclose()  # "closed" only stops what the host sends
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError):
            await stream.send_all(b"x")
        assert await receive_all(stream) == b"complete"


async def test_half_close_leaves_the_other_direction() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_eof()
        await stream.send_eof()
        assert await receive_all(other) == b""
        assert await receive_all(other) == b""
        with pytest.raises(trio.ClosedResourceError, match="END was sent"):
            await stream.send_all(b"")
        await other.send_all(b"still here", end=True)
        assert await receive_all(stream) == b"still here"


# --- Cancellation ---


async def test_cancelled_before_it_began_a_send_sends_nothing() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.send_all(b"no")
        assert scope.cancelled_caught
        await stream.send_all(b"yes", end=True)
        assert await receive_all(other) == b"yes"


async def test_a_send_cut_short_becomes_a_reset_when_closed() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(INITIAL_CREDIT + 1))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError, match="closed while sending"):
            await other.receive_some()


async def test_a_send_cut_short_stays_so_when_it_could_go_on_at_that_moment() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(INITIAL_CREDIT + 1))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                # The credit for the last byte comes before the sender has its turn: the peer must not have the whole now.
                pair.host.feed(frame(Kind.CREDIT, stream.id, CREDIT.pack(1)))
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError, match="closed while sending"):
            await other.receive_some()


async def test_a_close_during_a_send_is_a_reset() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(INITIAL_CREDIT + 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError):
            await other.receive_some()


async def test_a_send_that_waited_and_was_cancelled_whole_tears_nothing() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(bytes(INITIAL_CREDIT))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, b"none of this")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await stream.aclose()
        assert await receive_all(other) == bytes(INITIAL_CREDIT)


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.receive_some)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await stream.send_all(b"kept")
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await other.receive_some()
        assert scope.cancelled_caught
        assert await other.receive_some() == b"kept"


async def test_send_and_close_cancelled_is_closed_and_reset() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_and_close, bytes(INITIAL_CREDIT + 1))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError):
            await other.receive_some()


async def test_what_is_sent_and_closed_without_waiting_is_complete() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        before = pair.host.statistics()
        assert stream.send_and_close_nowait(b"all of it")
        assert repr(stream) == f"<ChannelStream {stream.id}: closed>"
        with pytest.raises(trio.ClosedResourceError):
            stream.send_and_close_nowait(b"more")
        assert await receive_all(other) == b"all of it"
        assert pair.host.statistics().writes - before.writes == 1
        await other.aclose()
        await pair.guest.ping()
        assert pair.host.statistics().open_streams == 0


async def test_without_credit_nothing_is_sent_and_closed() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        assert not stream.send_and_close_nowait(bytes(INITIAL_CREDIT + 1))
        await stream.send_all(b"as before")
        assert await other.receive_some() == b"as before"


async def test_nothing_is_sent_and_closed_on_a_stream_that_was_reset() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        other.reset("enough")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamResetError, match="enough"):
            stream.send_and_close_nowait(b"late")


# --- The channel's end ---


async def test_when_the_channel_fails_what_came_can_be_read() -> None:
    host_end, guest_end = trio.testing.memory_stream_pair()
    async with open_pair((host_end, guest_end)) as pair:
        stream, other = await pair.open_stream()
        ended, other_ended = await pair.open_stream()
        waiting, _ = await pair.open_stream()
        await other.send_all(b"the last words")
        await other_ended.send_all(b"complete", end=True)
        await trio.testing.wait_all_tasks_blocked()

        async def expect_broken() -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await waiting.receive_some()
            assert isinstance(caught.value.__cause__, PeerGoneError)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_broken)
            await trio.testing.wait_all_tasks_blocked()
            await guest_end.aclose()
        assert await stream.receive_some() == b"the last words"
        assert await receive_all(ended) == b"complete"
        for attempt in (stream.receive_some, stream.send_eof, lambda: stream.send_all(b"x")):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await attempt()
            assert caught.value.__cause__ is pair.host.failure
        assert "broken" in repr(stream)


async def test_after_the_block_streams_are_closed() -> None:
    async with open_pair() as pair:
        stream, _ = await pair.open_stream()
    for attempt in (stream.receive_some, stream.send_eof, lambda: stream.send_all(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await attempt()
    await stream.aclose()
    stream.reset()


async def test_two_tasks_must_not_receive_at_once_even_when_one_is_about_to_be_woken() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        received: list[bytes] = []
        busy = 0

        async def receive() -> None:
            nonlocal busy
            try:
                received.append(await other.receive_some())
            except trio.BusyResourceError:
                busy += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(b"once")
            nursery.start_soon(receive)
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert received == [b"once"]
        assert busy >= 1


@pytest.mark.parametrize("stream_count", [3])
async def test_concurrent_senders_all_get_through(stream_count: int) -> None:
    message = bytes(range(250)) * 4000
    async with open_pair() as pair, trio.open_nursery() as nursery:

        async def check(other: ChannelStream) -> None:
            assert await receive_all(other) == message

        for _ in range(stream_count):
            stream, other = await pair.open_stream()
            nursery.start_soon(stream.send_and_close, message)
            nursery.start_soon(check, other)


async def test_what_is_relayed_comes_in_order_whoever_takes_it() -> None:
    """By the reader as long as it is taken, and what is not by the task; with pauses at whatever place."""
    message = bytes(i * i % 251 for i in range(1000)) * (INITIAL_CREDIT * 4 // 1000)
    taken = bytearray()
    by_task = by_reader = 0

    def take(data: memoryview) -> int:
        nonlocal by_reader
        size = len(data) if len(taken) % 3 else len(data) // 2
        taken.extend(data[:size])
        by_reader += size
        return size

    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(stream.send_all, message, end=True))
            while rest := await other.relay(take):
                await trio.testing.wait_all_tasks_blocked()  # what comes meanwhile must wait for its turn
                taken += rest
                by_task += len(rest)
        assert bytes(taken) == message
        assert by_task
        assert by_reader


async def test_relaying_gives_credit_back() -> None:
    size = 0

    def take(data: memoryview) -> int:
        nonlocal size
        size += len(data)
        return len(data)

    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(stream.send_all, bytes(INITIAL_CREDIT * 8), end=True))
            assert await other.relay(take) == b""
    assert size == INITIAL_CREDIT * 8


async def test_news_are_told_to_who_does_not_wait() -> None:
    news: list[bytes | str] = []

    async with open_pair() as pair:
        stream, other = await pair.open_stream()

        def take() -> None:
            try:
                while True:
                    data = other.receive_nowait(3)
                    news.append(data)
                    if not data:
                        break
            except trio.WouldBlock:
                pass
            except StreamResetError:
                news.append("reset")

        with pytest.raises(trio.WouldBlock):
            other.receive_nowait(1)
        await stream.send_all(b"before")
        await trio.testing.wait_all_tasks_blocked()
        other.call_on_news(take)  # what is there already is told at once
        assert news == [b"bef", b"ore"]
        await stream.send_all(b"four")
        await trio.testing.wait_all_tasks_blocked()
        assert news[2:] == [b"fou", b"r"]
        assert not other.is_given_up
        await stream.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert news[4:] == [b""]
        stream.reset("no more")
        await trio.testing.wait_all_tasks_blocked()
        assert other.is_given_up
        assert news[5:] == [b""]  # the end came before, and counts
        other.call_on_news(None)


async def test_news_of_a_reset_of_a_failure_and_of_none_any_more() -> None:
    told: list[str] = []
    async with open_pair() as pair:
        (reset, its_peer), (quiet, silent), (lost, _) = [await pair.open_stream() for _ in range(3)]
        its_peer.call_on_news(lambda: told.append("reset"))
        silent.call_on_news(lambda: told.append("quiet"))
        silent.call_on_news(None)

        def close_all() -> None:
            told.append("lost")
            for stream in (lost, quiet):  # who hears of a failure may close what else there is
                stream.close()

        lost.call_on_news(close_all)
        reset.reset("gone")
        await quiet.send_all(b"nobody is told")
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["reset"]
        its_peer.close()  # done on this side: no news
        assert told == ["reset"]
        pair.host.feed(b"\xff" * 64)
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["reset", "lost"]


async def test_what_somebody_waits_for_is_not_taken_from_him() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                other.receive_nowait(1)
            await stream.send_all(b"x")


async def test_a_piece_of_its_size_takes_two_writes() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        before = pair.host.statistics().writes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(PIECE_SIZE))
            left = PIECE_SIZE
            while left:
                left -= len(await other.receive_some())
        assert pair.host.statistics().writes == before + 2


async def test_a_relay_that_fails_or_is_cancelled_loses_nothing() -> None:
    def fail(data: memoryview) -> int:
        raise BrokenPipeError

    def refuse(data: memoryview) -> int:
        pytest.fail("nobody waits any more")

    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"one")
            with pytest.raises(BrokenPipeError):
                await other.relay(fail)
        assert await other.receive_some() == b"one"
        with trio.move_on_after(0):
            await other.relay(refuse)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.relay, refuse)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"two")
            assert await other.receive_some() == b"two"
            nursery.start_soon(other.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await other.relay(refuse)
            await stream.send_all(b"three")
        stream.reset("gone")
        with pytest.raises(StreamResetError):
            await other.relay(refuse)


@pytest.mark.parametrize("relayed", [False, True])
async def test_eight_streams_get_fair_shares(relayed: bool) -> None:
    sizes = [0] * 8

    async def receive(number: int, stream: ChannelStream) -> None:
        def take(data: memoryview) -> int:
            sizes[number] += len(data)
            if sum(sizes) > 2**24:
                nursery.cancel_scope.cancel()
            return len(data)

        while True:
            take(memoryview(await (stream.relay(take) if relayed else stream.receive_some())))

    async with open_pair() as pair:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                stream, other = await pair.open_stream()
                # Some send much at once, some little.
                nursery.start_soon(send_for_ever, stream, bytes(2 ** (14 + number)))
                nursery.start_soon(receive, number, other)
    assert min(sizes) >= sum(sizes) / 16


async def send_for_ever(stream: ChannelStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)
