"""The protocol engine of the guest channel: what it accepts, what it refuses, and what it says itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from trio_sandbox.wire import Role, StreamLimitError, WireError
from trio_sandbox.wire._connection import CREDIT_STEP, LAZY_LIMIT, QUANTUM, WRITE_LIMIT, Connection
from trio_sandbox.wire._events import (
    CreditReceived,
    DataReceived,
    EndReceived,
    Event,
    HelloReceived,
    PongReceived,
    ResetReceived,
    StreamOpened,
)
from trio_sandbox.wire._framing import (
    CREDIT,
    HEADER,
    HEADER_SIZE,
    INITIAL_CREDIT,
    MAX_CREDIT,
    MAX_OPEN_HEADER,
    MAX_PAYLOAD,
    MAX_REASON,
    MAX_STREAMS,
    Kind,
    frame,
)
from trio_sandbox.wire._pace import FRAMES_IN_TURN

HELLO = frame(Kind.HELLO, 0, b'{"version":1}')


def opened(stream_id: int) -> bytes:
    return frame(Kind.OPEN, stream_id, b"{}")


def credit(stream_id: int, size: int) -> bytes:
    return frame(Kind.CREDIT, stream_id, CREDIT.pack(size))


def host() -> Connection:
    """Return the host's side after both hellos."""
    connection = Connection(Role.HOST, {})
    connection.next_write()
    assert list(connection.receive(HELLO)) == [HelloReceived({"version": 1})]
    return connection


def parse(data: bytes | bytearray) -> list[tuple[Kind, int, bytes]]:
    """Cut output into frames, in a way of its own."""
    frames: list[tuple[Kind, int, bytes]] = []
    while data:
        length, kind, stream_id = HEADER.unpack_from(data)
        frames.append((Kind(kind), stream_id, bytes(data[HEADER_SIZE : HEADER_SIZE + length])))
        assert len(data) >= HEADER_SIZE + length
        data = data[HEADER_SIZE + length :]
    return frames


def written(connection: Connection) -> list[tuple[Kind, int, bytes]]:
    return parse(connection.next_write()[0])


def merged(events: Iterable[Event]) -> list[Event]:
    """Join the pieces of data, whose cut depends on how the bytes came."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, DataReceived) and isinstance(last, DataReceived) and last.stream_id == event.stream_id:
            result[-1] = DataReceived(event.stream_id, bytes(last.data) + event.data)
        else:
            result.append(event)
    return result


def feed(connection: Connection, pieces: Iterable[bytes]) -> tuple[list[Event], str | None]:
    """Return the events, and the violation if there was one."""
    events: list[Event] = []
    try:
        for piece in pieces:
            for event in connection.receive(piece):
                if event is not None:
                    events.append(event)  # noqa: PERF401 - those before the violation count
    except WireError as exc:
        return merged(events), str(exc)
    return merged(events), None


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# --- Hello ---


def test_hello_comes_first_and_carries_the_version() -> None:
    connection = Connection(Role.GUEST, {"agent": "1.2", "features": ["code"]})
    connection.open_stream({})
    (kind, stream_id, payload), (second, _, _) = written(connection)
    assert (kind, stream_id, second) == (Kind.HELLO, 0, Kind.OPEN)
    assert json.loads(payload) == {"version": 1, "agent": "1.2", "features": ["code"]}


def test_hello_with_another_version_is_refused_here() -> None:
    with pytest.raises(ValueError, match="hello says version 2, and this is version 1"):
        Connection(Role.HOST, {"version": 2})


def test_hello_that_does_not_fit_is_refused_here() -> None:
    with pytest.raises(ValueError, match="at most 65536 fit"):
        Connection(Role.HOST, {"x": "y" * MAX_PAYLOAD})
    with pytest.raises(ValueError, match="not JSON compliant"):
        Connection(Role.HOST, {"x": float("nan")})


# --- What the peer must not do ---

VIOLATIONS: dict[str, tuple[bytes, str]] = {
    "no hello": (opened(2), "OPEN before HELLO"),
    "data before hello": (frame(Kind.DATA, 1, b"x"), "DATA before HELLO"),
    "second hello": (HELLO + HELLO, "a second HELLO"),
    "hello, no JSON": (frame(Kind.HELLO, 0, b"{]"), "HELLO is not JSON"),
    "hello, no UTF-8": (frame(Kind.HELLO, 0, b"\xff\xfe{\0}\0"), "HELLO is not JSON"),
    "hello, no object": (frame(Kind.HELLO, 0, b"[1]"), "HELLO is JSON, but not an object"),
    "hello, not a number": (frame(Kind.HELLO, 0, b'{"version":NaN}'), "HELLO is not JSON"),
    "hello, nested too deep": (frame(Kind.HELLO, 0, b"[" * MAX_PAYLOAD), "HELLO is not JSON"),
    "hello, number too long": (frame(Kind.HELLO, 0, b'{"version":' + b"1" * 5000 + b"}"), "HELLO is not JSON"),
    "hello without version": (frame(Kind.HELLO, 0, b"{}"), "the peer speaks version None"),
    "hello of another version": (frame(Kind.HELLO, 0, b'{"version":2}'), "the peer speaks version 2"),
    "hello of version true": (frame(Kind.HELLO, 0, b'{"version":true}'), "the peer speaks version True"),
    "hello on a stream": (frame(Kind.HELLO, 2, b"{}"), "HELLO frame for stream 2"),
    "hello too long": (HEADER.pack(MAX_PAYLOAD + 1, Kind.HELLO, 0), "HELLO frame of 65537 bytes; 2 to 65536"),
    "kind 0": (bytes(9), "frame of unknown kind 0"),
    "kind 9": (HEADER.pack(0, 9, 0), "frame of unknown kind 9"),
    "enormous": (HEADER.pack(2**32 - 1, Kind.DATA, 2), "DATA frame of 4294967295 bytes"),
    "open of ours": (HELLO + opened(1), "OPEN of stream 1, which is ours"),
    "open of stream 0": (HELLO + opened(0), "OPEN frame for stream 0"),
    "open again": (HELLO + opened(2) + opened(2), "OPEN of stream 2 after 2"),
    "open of a lower id": (HELLO + opened(8) + opened(6), "OPEN of stream 6 after 8"),
    "id used again": (
        HELLO + opened(2) + frame(Kind.RESET, 2) + opened(2),
        "OPEN of stream 2 after 2",
    ),
    "open without JSON": (HELLO + frame(Kind.OPEN, 2, b"}{"), "OPEN is not JSON"),
    "open too long": (HELLO + HEADER.pack(MAX_OPEN_HEADER + 1, Kind.OPEN, 2), "OPEN frame of 4097 bytes"),
    "open too often": (
        HELLO + b"".join(opened(2 * i + 2) for i in range(MAX_STREAMS + 1)),
        "more than 1024 open streams",
    ),
    "data on no stream": (HELLO + frame(Kind.DATA, 2, b"x"), "DATA for stream 2, which the peer does not have open"),
    "data on stream 0": (HELLO + frame(Kind.DATA, 0, b"x"), "DATA frame for stream 0"),
    "data of 0 bytes": (HELLO + opened(2) + frame(Kind.DATA, 2), "DATA frame of 0 bytes"),
    "data too long": (HELLO + opened(2) + HEADER.pack(MAX_PAYLOAD + 1, Kind.DATA, 2), "DATA frame of 65537 bytes"),
    "data after end": (
        HELLO + opened(2) + frame(Kind.END, 2) + frame(Kind.DATA, 2, b"x"),
        "DATA for stream 2, which the peer does not have open",
    ),
    "data after reset": (
        HELLO + opened(2) + frame(Kind.RESET, 2) + frame(Kind.DATA, 2, b"x"),
        "DATA for stream 2, which the peer does not have open",
    ),
    "data beyond credit": (
        HELLO + opened(2) + frame(Kind.DATA, 2, bytes(MAX_PAYLOAD)) * 4 + frame(Kind.DATA, 2, b"x"),
        "1 bytes on stream 2, and credit for 0",
    ),
    "end on no stream": (HELLO + frame(Kind.END, 2), "END for stream 2, which the peer does not have open"),
    "end twice": (HELLO + opened(2) + frame(Kind.END, 2) * 2, "END for stream 2"),
    "end after reset": (HELLO + opened(2) + frame(Kind.RESET, 2) + frame(Kind.END, 2), "END for stream 2"),
    "end with payload": (HELLO + opened(2) + frame(Kind.END, 2, b"x"), "END frame of 1 bytes; 0 to 0"),
    "reset on no stream": (HELLO + frame(Kind.RESET, 2), "RESET for stream 2, which was never opened"),
    "reset on no stream of ours": (HELLO + frame(Kind.RESET, 1), "RESET for stream 1, which was never opened"),
    "reset, no UTF-8": (HELLO + opened(2) + frame(Kind.RESET, 2, b"\xff"), "the reason for RESET is not UTF-8"),
    "reset, late, no UTF-8": (
        HELLO + opened(2) + frame(Kind.RESET, 2) + frame(Kind.RESET, 2, b"\xff"),
        "the reason for RESET is not UTF-8",
    ),
    "reset too long": (HELLO + opened(2) + HEADER.pack(MAX_REASON + 1, Kind.RESET, 2), "RESET frame of 257 bytes"),
    "credit on no stream": (HELLO + credit(2, 1), "CREDIT for stream 2, which was never opened"),
    "credit of nothing": (HELLO + opened(2) + credit(2, 0), "CREDIT of 0 bytes"),
    "credit without end": (
        HELLO + opened(2) + credit(2, MAX_CREDIT - INITIAL_CREDIT) + credit(2, 1),
        "credit of 2147483648 bytes on stream 2",
    ),
    "credit, short": (HELLO + opened(2) + frame(Kind.CREDIT, 2, b"xyz"), "CREDIT frame of 3 bytes; 4 to 4"),
    "ping, short": (HELLO + frame(Kind.PING, 0, b"short"), "PING frame of 5 bytes; 8 to 8"),
    "ping on a stream": (HELLO + opened(2) + frame(Kind.PING, 2, bytes(8)), "PING frame for stream 2"),
    "pong unasked": (HELLO + frame(Kind.PONG, 0, bytes(8)), "PONG that answers no ping"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_an_error_however_the_bytes_come(name: str) -> None:
    data, message = VIOLATIONS[name]
    whole = Connection(Role.HOST, {})
    events, error = feed(whole, [data])
    assert error is not None
    assert re.search(re.escape(message), error), error
    assert feed(Connection(Role.HOST, {}), one_by_one(data)) == (events, error)
    # And it stays one, whatever comes.
    assert feed(whole, [HELLO]) == ([], error)


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.CREDIT, Kind.PING])
def test_a_host_makes_pauses_and_counts_what_does_nothing(kind: Kind) -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.reset(stream_id)
    list(connection.receive(frame(Kind.RESET, stream_id)))
    assert connection.idle_frames == 0, "each stream may be reset once"
    idle = {
        Kind.RESET: frame(Kind.RESET, stream_id),
        Kind.CREDIT: frame(Kind.CREDIT, stream_id, b"\xff\xff\xff\xff"),
        Kind.PING: frame(Kind.PING, 0, bytes(8)),
    }[kind]
    assert list(connection.receive(idle * 1000)) == [None] * (999 // FRAMES_IN_TURN)
    assert connection.idle_frames == 1000


def test_the_least_of_credit_does_nothing() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    list(connection.receive(frame(Kind.CREDIT, stream_id, b"\0\0\0\1") * 10))
    assert connection.idle_frames == 10
    list(connection.receive(frame(Kind.CREDIT, stream_id, CREDIT_STEP.to_bytes(4, "big"))))
    assert connection.idle_frames == 10


def test_data_in_the_smallest_pieces_comes_with_pauses_and_whole() -> None:
    connection = host()
    list(connection.receive(opened(2)))
    events = list(connection.receive(frame(Kind.DATA, 2, b"x") * 1000))
    assert sum(isinstance(event, DataReceived) for event in events) == 1000
    assert events.count(None) == 999 // FRAMES_IN_TURN
    assert connection.idle_frames == 0


@pytest.mark.parametrize(("header", "in_turn"), [(b"{}", 7), (b'{"x":[%s0]}' % (b"[]," * 1300), 2)])
def test_streams_that_are_opened_count_by_what_they_cost(header: bytes, in_turn: int) -> None:
    connection = host()
    numbers = range(2, 402, 2)
    events = list(connection.receive(b"".join(frame(Kind.OPEN, number, header) for number in numbers)))
    assert events.count(None) == (len(numbers) - 1) // in_turn


def test_a_guest_makes_no_pauses() -> None:
    connection = Connection(Role.GUEST, {})
    list(connection.receive(HELLO))
    assert list(connection.receive(frame(Kind.PING, 0, bytes(8)) * 1000)) == []


def test_a_header_is_refused_before_its_payload_is_stored() -> None:
    connection = host()
    assert feed(connection, [HEADER.pack(MAX_OPEN_HEADER + 1, Kind.OPEN, 2)])[1] is not None
    connection = host()
    list(connection.receive(opened(2)))
    assert feed(connection, [HEADER.pack(MAX_PAYLOAD, Kind.DATA, 4)])[1] is not None


def test_a_wrong_pong_is_a_violation() -> None:
    connection = host()
    connection.ping(b"12345678")
    connection.ping(b"abcdefgh")
    assert feed(connection, [frame(Kind.PONG, 0, b"abcdefgh")]) == (
        [],
        "PONG that answers no ping, or not the oldest",
    )


# --- Arbitrary bytes ---

FRAMES = st.builds(
    frame,
    st.sampled_from(Kind),
    st.sampled_from([0, 1, 1, 2, 2, 3, 4]),
    st.one_of(
        st.sampled_from([b"", b"{}", b'{"version":1}', bytes(8), b"\0\0\0\1", b"\x7f\xff\xff\xff"]),
        st.binary(max_size=12),
    ),
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.binary(max_size=200), st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_arbitrary_bytes(data: bytes, cuts: list[int], greet: bool) -> None:
    data = HELLO * greet + data
    expected = feed(Connection(Role.GUEST, {}), [data])
    assert feed(Connection(Role.GUEST, {}), cut(data, cuts)) == expected


@given(st.lists(FRAMES, max_size=30), st.lists(st.integers(0, 1000), max_size=8), st.integers(0, 3))
@settings(max_examples=300)
def test_arbitrary_frames(frames: list[bytes], cuts: list[int], own_streams: int) -> None:
    def connection() -> Connection:
        made = Connection(Role.HOST, {})
        for _ in range(own_streams):
            made.open_stream({})
        made.ping(bytes(8))
        return made

    data = HELLO + b"".join(frames)
    whole, in_pieces = connection(), connection()
    expected = feed(whole, [data])
    assert feed(in_pieces, cut(data, cuts)) == expected
    assert whole.next_write() == in_pieces.next_write()
    # However mad the peer is, what comes out is well-formed, and no stream talks twice or after its end.
    over: set[int] = set()
    for event in expected[0]:
        if isinstance(event, DataReceived | EndReceived | ResetReceived | CreditReceived):
            assert event.stream_id not in over
        if isinstance(event, ResetReceived):
            over.add(event.stream_id)


# --- Streams ---


def test_opening_streams() -> None:
    connection = host()
    assert [connection.open_stream({"service": "code"}), connection.open_stream({})] == [1, 3]
    assert written(connection) == [(Kind.OPEN, 1, b'{"service":"code"}'), (Kind.OPEN, 3, b"{}")]
    assert list(connection.receive(frame(Kind.OPEN, 6, b'{"a":"\\u00e9"}'))) == [StreamOpened(6, {"a": "é"})]


def test_a_header_that_does_not_fit_is_refused_here_and_nothing_is_sent() -> None:
    connection = host()
    with pytest.raises(ValueError, match="at most 4096 fit"):
        connection.open_stream({"x": "y" * MAX_OPEN_HEADER})
    assert not connection.wants_write
    assert connection.open_stream({}) == 1


def test_as_many_streams_as_allowed() -> None:
    connection = host()
    ids = [connection.open_stream({}) for _ in range(MAX_STREAMS)]
    with pytest.raises(StreamLimitError, match="1024 streams are open"):
        connection.open_stream({})
    connection.reset(ids[5])
    with pytest.raises(StreamLimitError):  # until the peer agrees that it is over
        connection.open_stream({})
    assert list(connection.receive(frame(Kind.RESET, ids[5]))) == []
    assert connection.open_stream({}) == ids[-1] + 2


def test_data_and_end_travel_together() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, b"hello", end=True)
    data, sent = connection.next_write()
    assert parse(data) == [(Kind.OPEN, 1, b"{}"), (Kind.DATA, 1, b"hello"), (Kind.END, 1, b"")]
    assert sent == [stream_id]
    with pytest.raises(RuntimeError, match="can't send now"):
        connection.send(stream_id, b"more")


@pytest.mark.parametrize("typed", [bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("H")])
def test_data_of_other_types(typed: bytearray | memoryview) -> None:
    connection = host()
    connection.send(connection.open_stream({}), typed)
    assert written(connection)[1:] == [(Kind.DATA, 1, b"abcd")]


@pytest.mark.parametrize("peer_goes_on", [True, False])
@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("size", [0, 9, WRITE_LIMIT - HEADER_SIZE, INITIAL_CREDIT])
def test_what_is_sent_and_closed_at_once_is_what_is_sent_otherwise(peer_goes_on: bool, others: bool, size: int) -> None:
    def sent_by(send: Callable[[Connection, int], object]) -> list[tuple[Kind, int, bytes]]:
        connection = host()
        stream_id, other_id = connection.open_stream({}), connection.open_stream({})
        if not peer_goes_on:
            list(connection.receive(frame(Kind.END, stream_id)))
        if others:
            connection.send(other_id, b"x")
        send(connection, stream_id)
        frames: list[tuple[Kind, int, bytes]] = []
        while connection.wants_write:
            for kind, number, payload in written(connection):
                joined = kind == Kind.DATA and bool(frames) and frames[-1][:2] == (kind, number)
                frames.append((kind, number, (frames.pop()[2] if joined else b"") + payload))
        with pytest.raises(RuntimeError, match="can't send now"):
            connection.send_and_close(stream_id, b"more")
        assert connection.open_streams == (2 if peer_goes_on else 1)
        return frames

    frames = sent_by(lambda connection, stream_id: connection.send_and_close(stream_id, bytes(size)))
    assert frames == sent_by(lambda connection, stream_id: connection.send(stream_id, bytes(size), close=True))
    assert sum(len(payload) for kind, stream_id, payload in frames if (kind, stream_id) == (Kind.DATA, 1)) == size


def test_without_credit_for_all_of_it_nothing_is_sent_and_closed() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    assert not connection.send_and_close(stream_id, bytes(INITIAL_CREDIT + 1))
    connection.send(stream_id, b"as before")
    assert written(connection)[1:] == [(Kind.DATA, stream_id, b"as before")]


def test_one_piece_a_stream_at_a_time() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, b"1")
    with pytest.raises(RuntimeError, match="can't send now"):
        connection.send(stream_id, b"2")
    with pytest.raises(RuntimeError, match="still sending"):
        connection.end(stream_id)


def test_sending_stops_when_credit_is_used_up() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    assert connection.can_send(stream_id)
    connection.send(stream_id, bytes(INITIAL_CREDIT + 10), end=True)
    total = 0
    while connection.wants_write:
        data, sent = connection.next_write()
        assert len(data) <= WRITE_LIMIT
        assert sent == []
        total += sum(len(payload) for kind, _, payload in parse(data) if kind == Kind.DATA)
    assert total == INITIAL_CREDIT
    assert not connection.can_send(stream_id)
    assert list(connection.receive(credit(stream_id, 9))) == [CreditReceived(stream_id)]
    assert connection.next_write() == (frame(Kind.DATA, stream_id, bytes(9)), [])
    assert list(connection.receive(credit(stream_id, 100))) == [CreditReceived(stream_id)]
    assert connection.next_write() == (frame(Kind.DATA, stream_id, b"\0") + frame(Kind.END, stream_id), [stream_id])


def test_an_empty_piece_and_end_need_no_credit() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, bytes(INITIAL_CREDIT))
    while connection.wants_write:
        connection.next_write()
    connection.send(stream_id, b"", end=True)
    list(connection.receive(credit(stream_id, 5)))
    assert connection.next_write() == (frame(Kind.END, stream_id), [stream_id])
    assert not connection.wants_write


def test_unsend_tells_whether_a_part_is_gone() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, b"whole")
    assert connection.is_sending(stream_id)
    assert connection.unsend(stream_id) is False
    assert [kind for kind, _, _ in written(connection)] == [Kind.OPEN]
    connection.send(stream_id, bytes(2 * WRITE_LIMIT))
    connection.next_write()
    assert connection.unsend(stream_id) is True
    assert connection.unsend(stream_id) is False
    assert connection.next_write() == (b"", [])


def test_what_goes_at_once_is_a_copy_within_one_write_and_the_credit() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.next_write()
    data = bytearray(b"x" * WRITE_LIMIT)
    taken = connection.send_now(stream_id, memoryview(data))
    assert taken == WRITE_LIMIT - HEADER_SIZE
    assert connection.send_now(stream_id, memoryview(b"more")) == 0, "one write is full"
    data[:] = bytes(WRITE_LIMIT)
    assert written(connection) == [(Kind.DATA, stream_id, b"x" * taken)]
    sent = taken
    while size := connection.send_now(stream_id, memoryview(data)):
        assert connection.wants_write
        assert connection.next_write()[1] == [], "nobody waits for it"
        sent += size
    assert sent == INITIAL_CREDIT
    list(connection.receive(credit(stream_id, 5)))
    assert connection.send_now(stream_id, memoryview(b"0123456789")) == 5
    assert written(connection) == [(Kind.DATA, stream_id, b"01234")]


def test_nothing_goes_at_once_before_what_waits() -> None:
    connection = host()
    first, second = connection.open_stream({}), connection.open_stream({})
    connection.send(first, b"first")
    assert connection.send_now(first, memoryview(b"second")) == 0
    assert connection.send_now(second, memoryview(b"second")) == 0, "another stream's turn comes first"
    connection.next_write()
    assert connection.send_now(second, memoryview(b"second")) == 6
    connection.end(first)
    assert connection.send_now(first, memoryview(b"after the end")) == 0
    assert connection.send_now(99, memoryview(b"to nobody")) == 0
    assert written(connection) == [(Kind.DATA, second, b"second"), (Kind.END, first, b"")]


def test_credit_goes_back_as_data_is_taken() -> None:
    connection = host()
    list(connection.receive(opened(2) + frame(Kind.DATA, 2, bytes(MAX_PAYLOAD)) * 4))
    connection.take(2, CREDIT_STEP - 1)
    assert not connection.wants_write
    connection.take(2, 1)
    assert written(connection) == [(Kind.CREDIT, 2, CREDIT.pack(CREDIT_STEP))]
    assert list(connection.receive(HEADER.pack(MAX_PAYLOAD, Kind.DATA, 2))) == []


def test_no_credit_for_what_has_ended() -> None:
    connection = host()
    list(connection.receive(opened(2) + frame(Kind.DATA, 2, bytes(MAX_PAYLOAD)) * 4 + frame(Kind.END, 2)))
    connection.take(2, 4 * MAX_PAYLOAD)
    assert not connection.wants_write


def test_streams_take_turns_and_control_frames_go_first() -> None:
    connection = host()
    ids = [connection.open_stream({}) for _ in range(3)]
    connection.next_write()
    for stream_id in ids:
        connection.send(stream_id, bytes(100_000))
    connection.ping(b"12345678")
    frames = written(connection)
    assert frames[0][0] == Kind.PING
    assert [stream_id for _, stream_id, _ in frames[1:5]] == [*ids, ids[0]]
    assert all(len(payload) <= QUANTUM for _, _, payload in frames)
    shares = dict.fromkeys(ids, 0)
    while connection.wants_write:
        for _, stream_id, payload in written(connection):
            shares[stream_id] += len(payload)
            assert max(shares.values()) - min(shares.values()) <= 2 * QUANTUM or max(shares.values()) == 100_000


# --- The end of streams ---


def test_both_ends_make_it_over() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.end(stream_id)
    assert connection.open_streams == 1
    assert list(connection.receive(frame(Kind.DATA, 1, b"x") + frame(Kind.END, 1))) == [
        DataReceived(1, b"x"),
        EndReceived(1),
    ]
    assert connection.open_streams == 0
    # These may have crossed our END.
    assert list(connection.receive(frame(Kind.RESET, 1, b"late") + credit(1, 5))) == []
    assert written(connection) == [(Kind.OPEN, 1, b"{}"), (Kind.END, 1, b"")]


def test_a_reset_is_answered_when_something_else_is_written() -> None:
    connection = host()
    connection.open_stream({})
    connection.next_write()
    assert list(connection.receive(frame(Kind.RESET, 1, "nö".encode()))) == [ResetReceived(1, "nö")]
    assert connection.open_streams == 0
    assert not connection.wants_write
    connection.open_stream({})
    assert connection.wants_write
    assert written(connection) == [(Kind.RESET, 1, b""), (Kind.OPEN, 3, b"{}")]


def test_many_answers_are_not_kept_for_ever() -> None:
    connection = host()
    for i in range(LAZY_LIMIT // HEADER_SIZE + 1):
        assert not connection.wants_write
        list(connection.receive(opened(2 * i + 2) + frame(Kind.RESET, 2 * i + 2)))
    assert connection.wants_write


def test_what_comes_after_our_reset_is_counted_and_dropped() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, b"never sent")
    connection.reset(stream_id, "enough")
    connection.reset(stream_id, "again")
    connection.end(stream_id)
    connection.take(stream_id, CREDIT_STEP)
    assert written(connection) == [(Kind.OPEN, 1, b"{}"), (Kind.RESET, 1, b"enough")]
    assert list(connection.receive(frame(Kind.DATA, 1, bytes(MAX_PAYLOAD)) * 4 + credit(1, 7))) == []
    assert connection.open_streams == 1
    assert feed(connection, [frame(Kind.DATA, 1, b"x")])[1] == "1 bytes on stream 1, and credit for 0"


@pytest.mark.parametrize("last", [Kind.END, Kind.RESET])
def test_our_reset_is_over_when_the_peer_ends_or_resets(last: Kind) -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.reset(stream_id)
    assert list(connection.receive(frame(last, stream_id))) == []
    assert connection.open_streams == 0
    assert [kind for kind, _, _ in written(connection)] == [Kind.OPEN, Kind.RESET]


def test_end_then_reset_stops_only_what_we_send() -> None:
    connection = host()
    stream_id = connection.open_stream({})
    connection.send(stream_id, bytes(2 * WRITE_LIMIT))
    connection.next_write()
    assert list(connection.receive(frame(Kind.END, 1) + frame(Kind.RESET, 1, b"closed"))) == [
        EndReceived(1),
        ResetReceived(1, "closed"),
    ]
    assert connection.next_write() == (frame(Kind.RESET, 1), [])
    assert connection.open_streams == 0


def test_send_and_close_is_one_write() -> None:
    connection = host()
    list(connection.receive(opened(2)))
    connection.send(2, b"result", close=True)
    data, sent = connection.next_write()
    assert parse(data) == [(Kind.DATA, 2, b"result"), (Kind.END, 2, b""), (Kind.RESET, 2, b"")]
    assert sent == [2]
    assert list(connection.receive(frame(Kind.DATA, 2, b"ignored"))) == []
    assert list(connection.receive(frame(Kind.RESET, 2))) == []
    assert connection.open_streams == 0


def test_send_and_close_where_the_peer_has_ended() -> None:
    connection = host()
    list(connection.receive(opened(2) + frame(Kind.END, 2)))
    connection.send(2, b"result", close=True)
    assert written(connection) == [(Kind.DATA, 2, b"result"), (Kind.END, 2, b"")]
    assert connection.open_streams == 0


def test_a_long_reason_is_cut_between_characters() -> None:
    connection = host()
    connection.reset(connection.open_stream({}), "é" * MAX_REASON + "\udc80")
    assert written(connection)[1] == (Kind.RESET, 1, ("é" * (MAX_REASON // 2)).encode())


def test_pings() -> None:
    connection = host()
    connection.ping(b"12345678")
    connection.ping(b"abcdefgh")
    assert list(connection.receive(frame(Kind.PONG, 0, b"12345678") + frame(Kind.PING, 0, b"from you"))) == [
        PongReceived(b"12345678")
    ]
    assert written(connection)[2:] == [(Kind.PONG, 0, b"from you")]


def test_the_backlog_counts_answers_but_not_what_is_opened_here() -> None:
    connection = host()
    connection.open_stream({"x": "y" * 1000})
    assert connection.backlog == 0
    list(connection.receive(frame(Kind.PING, 0, bytes(8)) * 10))
    assert connection.backlog == 10 * 17
    connection.next_write()
    assert connection.backlog == 0


def test_two_honest_peers_never_owe_each_other_a_backlog() -> None:
    """Each of all streams may owe at most: credit for all of it, END, and a RESET with the longest reason."""
    from trio_sandbox.wire._connection import BACKLOG_LIMIT

    owed = (HEADER_SIZE + 4) * (INITIAL_CREDIT // CREDIT_STEP) + HEADER_SIZE + HEADER_SIZE + MAX_REASON
    # Ours and theirs, and ours again: those that ended here while the peer has not yet read so.
    assert owed * 3 * MAX_STREAMS < BACKLOG_LIMIT
