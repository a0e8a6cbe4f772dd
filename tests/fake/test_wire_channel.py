"""`open_channel`: hello, handlers, failure and its one route, hostile peers, leaving the block."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from trio_sandbox.wire import (
    Channel,
    ChannelStream,
    PeerGoneError,
    PeerSilentError,
    Role,
    StreamHandler,
    StreamLimitError,
    StreamResetError,
    WireError,
    open_channel,
)
from trio_sandbox.wire._framing import HEADER, MAX_STREAMS, Kind, frame
from trio_sandbox.wire._pace import FRAMES_IN_TURN, IDLE_FRAMES, IDLE_RATE

from ._wire import HELLO, RawPeer, open_pair, port_pair


def opened(stream_id: int) -> bytes:
    return frame(Kind.OPEN, stream_id, b"{}")


@asynccontextmanager
async def open_raw(
    handler: StreamHandler | None = None,
    silence_timeout: float = math.inf,
) -> AsyncGenerator[tuple[Channel, RawPeer]]:
    """Open the host's channel to a peer that the test plays, hellos done."""
    host_end, peer_end = trio.testing.memory_stream_pair()
    peer = RawPeer(peer_end)
    await peer.say(HELLO)
    async with open_channel(
        host_end, role=Role.HOST, hello={}, handler=handler, silence_timeout=silence_timeout
    ) as channel:
        assert await peer.next_frame() == (Kind.HELLO, 0, b'{"version":1}')
        yield channel, peer


async def run_handler(handler: StreamHandler) -> None:
    async with open_raw(handler) as (_, peer):
        await peer.say(opened(2))
        await trio.sleep_forever()


# --- Hello ---


async def test_both_hellos_are_there_when_the_block_starts() -> None:
    async with open_pair() as pair:
        assert pair.host.peer_hello == {"side": "guest", "version": 1}
        assert pair.guest.peer_hello == {"side": "host", "version": 1}


async def test_a_peer_that_says_something_else_first() -> None:
    host_end, peer_end = trio.testing.memory_stream_pair()
    await peer_end.send_all(b"GET / HTTP/1.1\r\n")
    with pytest.raises(WireError, match="frame of unknown kind"):
        async with open_channel(host_end, role=Role.HOST, hello={}):
            raise AssertionError("the block must not start")
    with pytest.raises(trio.ClosedResourceError):
        await host_end.send_all(b"x")


async def test_a_peer_that_leaves_before_hello() -> None:
    host_end, peer_end = trio.testing.memory_stream_pair()
    await peer_end.send_eof()
    with pytest.raises(PeerGoneError, match="the peer closed the connection"):
        async with open_channel(host_end, role=Role.HOST, hello={}):
            raise AssertionError("the block must not start")


async def test_a_peer_that_says_nothing_is_for_the_caller_to_bound(autojump_clock: trio.testing.MockClock) -> None:
    host_end, _peer_end = trio.testing.memory_stream_pair()
    with trio.move_on_after(5) as scope:
        async with open_channel(host_end, role=Role.HOST, hello={}):
            raise AssertionError("the block must not start")
    assert scope.cancelled_caught
    with pytest.raises(trio.ClosedResourceError):
        await host_end.send_all(b"x")


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
async def test_bad_arguments_are_refused_before_anything_is_started(timeout: float) -> None:
    host_end, _ = trio.testing.memory_stream_pair()
    with pytest.raises(ValueError, match="`silence_timeout` must be a positive number of seconds"):
        async with open_channel(host_end, role=Role.HOST, hello={}, silence_timeout=timeout):
            pass
    with pytest.raises(ValueError, match="hello says version 7"):
        async with open_channel(host_end, role=Role.HOST, hello={"version": 7}):
            pass
    await host_end.send_all(b"still open")


# --- Handlers ---


async def test_without_a_handler_streams_of_the_peer_are_refused() -> None:
    async with open_pair() as pair:
        stream = pair.guest.open_stream({})
        assert stream.id == 2
        with pytest.raises(StreamResetError, match="refused"):
            await stream.receive_some()


async def test_a_stream_opened_right_after_hello_finds_the_handler() -> None:
    headers: list[dict[str, object]] = []

    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        headers.append(header)

    host_end, peer_end = trio.testing.memory_stream_pair()
    await peer_end.send_all(HELLO + frame(Kind.OPEN, 2, b'{"a":1}'))
    async with open_channel(host_end, role=Role.HOST, hello={}, handler=handler):
        await trio.testing.wait_all_tasks_blocked()
    assert headers == [{"a": 1}]


async def test_a_handler_that_returns_closes_its_stream() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        await stream.send_all(b"done")

    async with open_raw(handler) as (_, peer):
        await peer.say(opened(2))
        assert await peer.next_frame() == (Kind.DATA, 2, b"done")
        assert await peer.next_frame() == (Kind.END, 2, b"")
        assert await peer.next_frame() == (Kind.RESET, 2, b"closed")


async def test_a_handler_may_have_served_its_stream_when_it_is_called() -> None:
    def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        stream.send_and_close_nowait(b"done")

    async with open_raw(handler) as (channel, peer):
        await peer.say(opened(2))
        assert await peer.next_frame() == (Kind.DATA, 2, b"done")
        assert await peer.next_frame() == (Kind.END, 2, b"")
        assert await peer.next_frame() == (Kind.RESET, 2, b"")
        await peer.say(frame(Kind.RESET, 2))
        await trio.testing.wait_all_tasks_blocked()
        assert channel.statistics().open_streams == 0


async def test_a_bug_in_what_a_handler_does_when_it_is_called_comes_out_of_the_block() -> None:
    def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await run_handler(handler)


async def test_a_bug_in_a_handler_comes_out_of_the_block() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await run_handler(handler)


async def test_a_handler_that_lets_a_broken_stream_pass_is_no_bug() -> None:
    async def read(stream: ChannelStream) -> None:
        while await stream.receive_some():
            pass

    async def write_later(stream: ChannelStream) -> None:
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(b"x")

    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        if header.get("nursery"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, stream)
                nursery.start_soon(write_later, stream)
        else:
            await read(stream)

    async with open_raw(handler) as (channel, peer):
        await peer.say(opened(2), frame(Kind.OPEN, 4, b'{"nursery":1}'), frame(Kind.RESET, 2), frame(Kind.RESET, 4))
        await peer.say(opened(6), frame(Kind.OPEN, 8, b'{"nursery":1}'))
        await trio.testing.wait_all_tasks_blocked()
        await peer.transport.aclose()
        assert isinstance(await channel.wait_closed(), PeerGoneError)
        await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("bug", [False, True])
async def test_a_stream_that_breaks_while_its_handler_is_cancelled_is_no_bug(bug: bool) -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        cancelled = trio.Event()

        async def read() -> None:
            try:
                await stream.receive_some()
            except trio.BrokenResourceError:
                # Late: when the block is left already, as its owner may be quicker.
                with trio.CancelScope(shield=True):
                    await cancelled.wait()
                if bug:
                    raise ZeroDivisionError from None
                raise

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

    async def leave_when_the_peer_is_gone() -> None:
        async with open_raw(handler) as (channel, peer):
            await peer.say(opened(2))
            await trio.testing.wait_all_tasks_blocked()
            await peer.transport.aclose()
            await channel.wait_closed()

    if bug:
        with pytest.RaisesGroup(ZeroDivisionError):
            await leave_when_the_peer_is_gone()
    else:
        await leave_when_the_peer_is_gone()


async def test_a_bug_beside_a_broken_stream_is_still_a_bug() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        try:
            await stream.receive_some()
        except trio.BrokenResourceError as exc:
            raise ExceptionGroup("both", [exc, ZeroDivisionError()]) from None

    async def reset_at_once() -> None:
        async with open_raw(handler) as (_, peer):
            await peer.say(opened(2), frame(Kind.RESET, 2))
            await trio.sleep_forever()

    with pytest.RaisesGroup(StreamResetError, ZeroDivisionError):
        await reset_at_once()


async def test_a_broken_resource_of_its_own_is_a_handlers_bug() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        raise trio.BrokenResourceError("something else broke")

    with pytest.raises(trio.BrokenResourceError, match="something else broke"):
        await run_handler(handler)


async def test_handlers_end_with_the_block_while_the_channel_still_works() -> None:
    said: list[str] = []

    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await stream.send_all(b"goodbye")
                said.append("goodbye")

    async with open_raw(handler) as (_, peer):
        await peer.say(opened(2))
        await trio.testing.wait_all_tasks_blocked()
    assert said == ["goodbye"]
    assert await peer.next_frame() == (Kind.DATA, 2, b"goodbye")
    assert await peer.next_frame() == (Kind.RESET, 2, b"cancelled")
    assert await peer.next_frame() is None


async def test_the_bodys_and_a_handlers_errors_come_out_together() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, KeyError) as caught:
        async with open_raw(handler) as (_, peer):
            await peer.say(opened(2))
            await trio.testing.wait_all_tasks_blocked()
            raise KeyError
    assert "open_channel(): more than one of its tasks failed" in caught.value.__notes__


# --- Failure ---


async def test_a_violation_fails_the_channel_and_leaves_the_body_alone() -> None:
    async with open_raw() as (channel, peer):
        stream = channel.open_stream({})
        ping_errors: list[BaseException | None] = []

        async def ping() -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await channel.ping()
            ping_errors.append(caught.value.__cause__)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping)
            await trio.testing.wait_all_tasks_blocked()
            await peer.say(frame(Kind.DATA, 1, b"good"), HEADER.pack(5, Kind.END, 1))
            failure = await channel.wait_closed()
        assert isinstance(failure, WireError)
        assert failure is channel.failure
        assert ping_errors == [failure]
        assert await stream.receive_some() == b"good"
        with pytest.raises(trio.BrokenResourceError, match="END frame of 5 bytes") as caught:
            channel.open_stream({})
        assert caught.value.__cause__ is failure
        assert "failed (END frame of 5 bytes" in repr(channel)
        # The peer learns that it was given up.
        while await peer.next_frame() is not None:
            pass
        await trio.lowlevel.checkpoint()
    with pytest.raises(trio.ClosedResourceError):
        channel.open_stream({})
    assert await channel.wait_closed() is failure


async def test_a_transport_that_breaks_is_the_cause() -> None:
    class Broken(trio.abc.Stream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError("pulled the plug")

        async def wait_send_all_might_not_block(self) -> None:
            await trio.lowlevel.checkpoint()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.sleep_forever()
            return b""

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    with pytest.raises(PeerGoneError, match="the connection broke") as caught:
        async with open_channel(Broken(), role=Role.HOST, hello={}):
            raise AssertionError("the block must not start")
    assert isinstance(caught.value.__cause__, trio.BrokenResourceError)


async def test_a_bug_in_the_transport_is_not_hidden() -> None:
    async def explode() -> None:
        raise ZeroDivisionError

    send, receive = trio.testing.MemorySendStream(send_all_hook=explode), trio.testing.MemoryReceiveStream()
    with pytest.raises(ZeroDivisionError):
        async with open_channel(trio.StapledStream(send, receive), role=Role.HOST, hello={}):
            raise AssertionError("the block must not start")


async def test_after_the_block_wait_closed_tells_nothing_went_wrong() -> None:
    async with open_raw() as (channel, _):
        pass
    assert await channel.wait_closed() is None
    with pytest.raises(trio.ClosedResourceError):
        await channel.ping()
    assert "closed" in repr(channel)


# --- Ping and silence ---


async def test_ping(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw() as (channel, peer), trio.open_nursery() as nursery:

        async def answer() -> None:
            for _ in range(2):
                said = await peer.next_frame()
                assert said is not None
                await trio.sleep(3)
                await peer.say(frame(Kind.PONG, 0, said[2]))

        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.ping()
        with trio.move_on_after(1):
            nursery.start_soon(answer)
            await channel.ping()
        # The late answer to the first is not taken for that to the second.
        assert await channel.ping() == pytest.approx(5)


async def test_a_silent_peer_fails_the_channel(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw(silence_timeout=60) as (channel, peer):
        start = trio.current_time()
        failure = await channel.wait_closed()
        assert isinstance(failure, PeerSilentError)
        assert "unanswered for 60 seconds" in str(failure)
        assert trio.current_time() - start == pytest.approx(90)
        said = await peer.next_frame()
        assert said is not None
        assert said[0] == Kind.PING


async def test_a_peer_that_answers_is_not_silent(autojump_clock: trio.testing.MockClock) -> None:
    async with open_raw(silence_timeout=60) as (channel, peer), trio.open_nursery() as nursery:

        async def answer() -> None:
            while said := await peer.next_frame():
                await trio.sleep(50)
                await peer.say(frame(Kind.PONG, 0, said[2]))

        nursery.start_soon(answer)
        await trio.sleep(1000)
        assert channel.failure is None
        nursery.cancel_scope.cancel()


# --- Peers that want to do harm ---


@pytest.mark.parametrize(
    "kinds", [frame(Kind.RESET, 1), frame(Kind.CREDIT, 1, b"\0\0\0\1"), frame(Kind.PING, 0, bytes(8)), b""]
)
async def test_a_flood_of_frames_without_effect_is_a_violation_and_others_go_on(kinds: bytes) -> None:
    async with open_raw() as (channel, peer), trio.open_nursery() as nursery:
        stream = channel.open_stream({})
        stream.reset()
        await peer.say(frame(Kind.RESET, 1))
        if kinds:
            flood = kinds * (2 * IDLE_FRAMES)
        else:
            flood = b"".join(opened(number) + frame(Kind.RESET, number) for number in range(2, 4 * IDLE_FRAMES, 2))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(count_turns)
        nursery.start_soon(peer.say, flood)
        failure = await channel.wait_closed()
        assert "frames without any effect" in str(failure)
        # The frames that it took to see that were no one turn of the event loop.
        assert turns > IDLE_FRAMES / FRAMES_IN_TURN / 2
        nursery.cancel_scope.cancel()


async def test_frames_without_effect_are_no_violation_at_a_slow_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("trio_sandbox.wire._pace.perf_counter", lambda: now)
    async with open_raw() as (channel, peer):
        for _ in range(5):
            await peer.say(frame(Kind.PING, 0, bytes(8)) * IDLE_RATE)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(50):
            now += 1.0
            await peer.say(frame(Kind.PING, 0, bytes(8)) * IDLE_RATE)
            await trio.testing.wait_all_tasks_blocked()
        assert channel.failure is None
        now += 3600.0
        await peer.say(frame(Kind.PING, 0, bytes(8)) * (2 * IDLE_FRAMES))
        assert isinstance(await channel.wait_closed(), WireError)


async def test_a_peer_that_asks_and_does_not_read_stalls_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real socket pair, because the memory streams of tests take everything."""
    limit = 2**15
    monkeypatch.setattr("trio_sandbox.wire._channel.BACKLOG_LIMIT", limit)
    ends = socket.socketpair()
    host_end, peer_end = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in ends)
    async with peer_end:
        await peer_end.send_all(HELLO)
        async with open_channel(host_end, role=Role.HOST, hello={}) as channel, trio.open_nursery() as nursery:
            flood = (opened(2) + frame(Kind.END, 2)) + frame(Kind.PING, 0, bytes(8)) * (IDLE_FRAMES - 1000)
            nursery.start_soon(peer_end.send_all, flood)
            # Real sockets: "all tasks blocked" may be a moment between two readiness events, so ask twice in a row.
            seen = -1
            while seen != channel.statistics().bytes_received:
                seen = channel.statistics().bytes_received
                await trio.testing.wait_all_tasks_blocked(0.05)
            statistics = channel.statistics()
            assert statistics.bytes_received < len(flood)
            assert limit < statistics.backlog < limit + 2 * 65536
            assert channel.failure is None
            nursery.cancel_scope.cancel()


async def test_a_flood_of_streams_is_a_violation() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        await trio.sleep_forever()

    async with open_raw(handler) as (channel, peer):
        await peer.say(*(opened(2 * i + 2) for i in range(MAX_STREAMS)))
        await trio.testing.wait_all_tasks_blocked()
        assert channel.failure is None
        await peer.say(opened(2 * MAX_STREAMS + 2))
        failure = await channel.wait_closed()
        assert "more than 1024 open streams" in str(failure)


async def test_as_many_own_streams_as_allowed() -> None:
    async with open_pair() as pair:
        streams = [pair.host.open_stream({}) for _ in range(MAX_STREAMS)]
        with pytest.raises(StreamLimitError):
            pair.host.open_stream({})
        for stream in streams:
            stream.close()
        await pair.host.ping()
        while pair.host.statistics().open_streams:
            await pair.host.ping()
        pair.host.open_stream({})


@given(data=st.binary(max_size=300), valid=st.booleans())
@settings(max_examples=100)
def test_arbitrary_bytes_fail_the_channel_or_do_nothing(data: bytes, valid: bool) -> None:
    """Whatever comes: one failure of the right kind, and everybody who waited knows it."""

    async def main() -> None:
        async with open_raw() as (channel, peer):
            stream = channel.open_stream({})
            outcomes: list[object] = []

            async def receive() -> None:
                try:
                    while await stream.receive_some():
                        pass
                    outcomes.append("end")
                except trio.BrokenResourceError as exc:
                    outcomes.append(exc)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await peer.say(frame(Kind.PING, 0, bytes(8)) * valid + data)
                await peer.transport.aclose()
                failure = await channel.wait_closed()
            assert isinstance(failure, WireError | PeerGoneError)
            (outcome,) = outcomes
            assert outcome == "end" or isinstance(outcome, StreamResetError) or outcome.__cause__ is failure  # type: ignore[attr-defined]

    trio.run(main)


# --- Leaving the block ---


async def test_leaving_resets_open_streams_and_flushes() -> None:
    async with open_raw() as (channel, peer):
        stream = channel.open_stream({})
        await stream.send_all(b"data")
    assert [await peer.next_frame() for _ in range(4)] == [
        (Kind.OPEN, 1, b"{}"),
        (Kind.DATA, 1, b"data"),
        (Kind.RESET, 1, b"the channel was closed"),
        None,
    ]


async def test_leaving_waits_only_so_long_for_a_peer_that_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    host_end, peer_end = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer_end.send_all, HELLO)
        start = trio.current_time()
        async with open_channel(host_end, role=Role.HOST, hello={}):
            pass
        assert trio.current_time() - start == pytest.approx(1)


async def test_an_error_of_the_body_comes_out_bare() -> None:
    with pytest.raises(KeyError):
        async with open_raw():
            raise KeyError


async def test_cancelled_from_outside_the_body_can_still_talk() -> None:
    async def handler(stream: ChannelStream, header: dict[str, object]) -> None:
        await stream.send_and_close(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        host_end, guest_end = trio.testing.memory_stream_pair()
        answers: list[bytes] = []

        async def guest() -> None:
            async with open_channel(guest_end, role=Role.GUEST, hello={}, handler=handler) as channel:
                await channel.wait_closed()

        nursery.start_soon(guest)
        with trio.CancelScope() as scope:
            async with open_channel(host_end, role=Role.HOST, hello={}) as channel:
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        stream = channel.open_stream({})
                        await stream.send_all(b"last wish")
                        answers.append(await stream.receive_some())
        assert scope.cancelled_caught
    assert answers == [b"last wish"]


@pytest.mark.parametrize("ports", [False, True])
async def test_cancelled_at_any_moment_nothing_is_left(ports: bool) -> None:
    """Cancel after each number of turns of the scheduler, through opening, a stream both ways, and closing."""

    async def echo(stream: ChannelStream, header: dict[str, object]) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def guest(transport: trio.abc.Stream) -> None:
        try:
            async with open_channel(transport, role=Role.GUEST, hello={}, handler=echo) as channel:
                assert isinstance(await channel.wait_closed(), PeerGoneError)
        except PeerGoneError:
            pass  # before the host's hello was there

    completed = False
    turns = 0
    while not completed:
        turns += 1
        host_end, guest_end = port_pair() if ports else trio.testing.memory_stream_pair()
        scope = trio.CancelScope()

        async def cancel(scope: trio.CancelScope = scope, turns: int = turns) -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest, guest_end)
            nursery.start_soon(cancel)
            with scope:
                async with open_channel(host_end, role=Role.HOST, hello={}) as channel:
                    async with channel.open_stream({}) as stream:
                        await stream.send_all(b"x" * 100_000)
                        await stream.send_eof()
                        received = b"".join([data async for data in stream])
                        assert received == b"x" * 100_000
                    await channel.ping()
                completed = True
        for transport in (host_end, guest_end):
            with pytest.raises(trio.ClosedResourceError):
                await transport.send_all(b"x")
    assert turns > 10


async def test_statistics() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(b"12345")
        assert await other.receive_some() == b"12345"
        ours, theirs = pair.host.statistics(), pair.guest.statistics()
        assert ours.bytes_sent == theirs.bytes_received
        assert ours.writes == theirs.reads == 3
        assert ours.open_streams == theirs.open_streams == 1
        assert ours.backlog == theirs.backlog == 0
