"""`RecordStream` over a channel."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from tests._leaks import count_steps
from trio_sandbox.wire import JSON, STDERR, STDOUT, RecordStream, StreamResetError, WireError, encode_record
from trio_sandbox.wire._records import JOINED_RECORDS, SMALL_RECORDS_IN_TURN

from ._wire import open_pair


async def test_records_in_both_directions() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        ours, theirs = RecordStream(stream), RecordStream(other)
        await ours.send_json({"code": "print('é \udc80')"})
        await ours.send(STDERR, memoryview(b"and this"), end=True)
        assert await theirs.receive_json() == {"code": "print('é \udc80')"}
        assert await theirs.receive() == (STDERR, b"and this")
        assert await theirs.receive() is None
        assert await theirs.receive_json() is None
        await theirs.send_many([(STDOUT, b"1"), (STDOUT, b"")])
        await theirs.send_and_close([(JSON, b"{}")])
        assert [await ours.receive() for _ in range(4)] == [(STDOUT, b"1"), (STDOUT, b""), (JSON, b"{}"), None]
        await ours.aclose()
        await theirs.aclose()


async def test_a_record_larger_than_all_credit() -> None:
    payload = bytes(range(256)) * 4096
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(RecordStream(stream).send_and_close, [(STDOUT, payload)])
            received = RecordStream(other, limit=len(payload))
            assert await received.receive() == (STDOUT, payload)
            assert await received.receive() is None


async def test_several_records_are_one_write() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        writes = pair.guest.statistics().writes
        await RecordStream(other).send_and_close([(STDOUT, b"1"), (STDERR, b"2"), (JSON, b"{}")])
        received = RecordStream(stream)
        assert [(await received.receive() or (b"", b""))[0] for _ in range(4)] == [STDOUT, STDERR, JSON, b""]
        assert pair.guest.statistics().writes == writes + 1


async def test_every_receive_is_a_checkpoint_and_a_cancelled_one_loses_nothing() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await RecordStream(stream).send_many([(STDOUT, b"1"), (STDOUT, b"2"), (STDOUT, b"3")], end=True)
        received = RecordStream(other)
        for expected in (b"1", b"2", b"3"):
            with trio.CancelScope() as scope:
                scope.cancel()
                await received.receive()
            assert scope.cancelled_caught
            with trio.testing.assert_checkpoints():
                assert await received.receive() == (STDOUT, expected)
        assert await received.receive() is None


async def test_who_takes_all_at_once_has_what_is_there_without_a_turn_of_others() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        received = RecordStream(other)
        await RecordStream(stream).send_many([(STDOUT, b"1"), (STDERR, b"2"), (JSON, b"3"), (JSON, b"4")], end=True)
        assert await received.receive(at_once=True) == (STDOUT, b"1")
        assert await count_steps(partial(received.receive, at_once=True)) == 0
        assert await count_steps(received.receive) == 1
        with trio.CancelScope() as scope:
            scope.cancel(reason="a test")
            await received.receive(at_once=True)
        assert scope.cancelled_caught
        assert await received.receive(at_once=True) == (JSON, b"4")
        assert await received.receive(at_once=True) is None


SMALL, LARGE = (JSON, b"x"), (JSON, bytes(1024))


async def test_who_has_many_small_records_leaves_others_their_turn(autojump_clock: trio.testing.MockClock) -> None:
    async def measure(*records: tuple[bytes, bytes]) -> float:
        stream, other = await pair.open_stream()
        await RecordStream(stream).send_many(records, end=True)
        began, received = trio.current_time(), RecordStream(other)
        assert [await received.receive() for _ in records] == list(records)
        assert await received.receive() is None
        return trio.current_time() - began

    async with open_pair() as pair:
        assert await measure(*[SMALL] * (SMALL_RECORDS_IN_TURN - 1)) == 0
        assert await measure(*[LARGE] * 100) == 0
        pauses = 10
        mixed = [SMALL, LARGE, *[SMALL] * (SMALL_RECORDS_IN_TURN - 1)] * pauses
        assert await measure(*mixed) == pytest.approx(pauses * 0.001, rel=0.01)


async def test_small_records_that_are_waited_for_are_not_held_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        ours, theirs = RecordStream(stream), RecordStream(other)
        async with trio.open_nursery() as nursery:
            for _ in range(3 * SMALL_RECORDS_IN_TURN):
                nursery.start_soon(theirs.receive)
                await trio.testing.wait_all_tasks_blocked()
                await ours.send(*SMALL)
                await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 0


async def test_held_up_and_cancelled_it_loses_nothing() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        count = SMALL_RECORDS_IN_TURN + 1
        await RecordStream(stream).send_many([(JSON, b"%d" % number) for number in range(count)], end=True)
        received = RecordStream(other)
        for number in range(count):
            with trio.move_on_after(0) as scope:
                await received.receive()
            assert scope.cancelled_caught
            assert await received.receive() == (JSON, b"%d" % number)


async def test_what_is_a_stream_of_bytes_is_received_as_one() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await RecordStream(stream).send_many([(STDOUT, b"a")] * 100 + [(JSON, b"{}")], end=True)
        received = RecordStream(other, joined=STDOUT)
        lengths: list[int] = []
        while (record := await received.receive()) and record[0] == STDOUT:
            lengths.append(len(record[1]))
        assert lengths == [JOINED_RECORDS] * 3 + [100 - 3 * JOINED_RECORDS]
        assert record == (JSON, b"{}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode_record(STDOUT, bytes(101)), "record of 101 bytes; at most 100 are allowed"),
        (encode_record(STDOUT, bytes(50))[:-1], "the stream ended within a record"),
        (b"O\0", "the stream ended within a record"),
    ],
)
async def test_a_violation_resets_the_stream_and_nothing_else(data: bytes, message: str) -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await stream.send_all(data, end=True)
        received = RecordStream(other, limit=100)
        with pytest.raises(WireError, match=message):
            await received.receive()
        with pytest.raises((WireError, trio.ClosedResourceError)):
            await received.receive()
        with pytest.raises(StreamResetError, match=message):
            await stream.receive_some()
        assert pair.host.failure is pair.guest.failure is None


@pytest.mark.parametrize(
    ("tag", "payload", "message"),
    [
        (STDOUT, b"{}", "record with tag b'O' where JSON was expected"),
        (JSON, b"[]", "record is JSON, but not an object"),
        (JSON, b"{", "record is not JSON"),
    ],
)
async def test_what_is_not_a_json_object(tag: bytes, payload: bytes, message: str) -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await RecordStream(stream).send(tag, payload)
        with pytest.raises(WireError, match=message):
            await RecordStream(other).receive_json()
        with pytest.raises(StreamResetError):
            await stream.receive_some()


async def test_what_can_not_be_json_is_refused_before_anything_is_sent() -> None:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        with pytest.raises(ValueError, match="not JSON compliant"):
            await RecordStream(stream).send_json({"x": float("inf")})
        with pytest.raises(TypeError):
            await RecordStream(stream).send_json({"x": b""})
        await stream.send_eof()
        assert await other.receive_some() == b""
