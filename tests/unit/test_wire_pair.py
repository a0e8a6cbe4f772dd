"""Two engines that talk to each other, through all the orders that Hypothesis can think of."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trio_sandbox.wire import Role
from trio_sandbox.wire._connection import Connection
from trio_sandbox.wire._events import (
    DataReceived,
    EndReceived,
    HelloReceived,
    PongReceived,
    ResetReceived,
    StreamOpened,
)
from trio_sandbox.wire._framing import INITIAL_CREDIT


class HalfStream:
    """What one side knows of a stream."""

    def __init__(self) -> None:
        self.given = bytearray()  # everything that was handed to send()
        self.sending = False
        self.ended = False
        self.closing = False  # it is reset once what is being sent is: until then the peer's data still comes
        self.reset = False
        self.unsent = False  # something was taken back: `given` is only an upper bound from then on
        self.received = bytearray()
        self.taken = 0
        self.end_received = False
        self.reset_received = False


class Side:
    def __init__(self, role: Role) -> None:
        self.role = role
        self.connection = Connection(role, {"role": role.name})
        self.peer: Side
        self.wire = bytearray()  # written, and not yet read by the peer
        self.streams: dict[int, HalfStream] = {}
        self.pings = 0
        self.pongs = 0
        self.greeted = False

    def write(self) -> None:
        data, sent = self.connection.next_write()
        self.wire += data
        for stream_id in sent:
            stream = self.streams[stream_id]
            stream.sending = False
            stream.reset = stream.reset or stream.closing

    def read(self, size: int) -> None:
        data = bytes(self.peer.wire[:size])
        del self.peer.wire[:size]
        for event in self.connection.receive(data):
            match event:
                case StreamOpened(stream_id, header):
                    assert header == {"n": stream_id}
                    self.streams[stream_id] = HalfStream()
                case DataReceived(stream_id, piece):
                    stream = self.streams[stream_id]
                    assert not stream.end_received
                    assert not stream.reset_received
                    assert not stream.reset
                    stream.received += piece
                case EndReceived(stream_id):
                    assert not self.streams[stream_id].end_received
                    self.streams[stream_id].end_received = True
                case ResetReceived(stream_id):
                    stream = self.streams[stream_id]
                    assert not stream.reset_received
                    stream.reset_received = True
                    stream.sending = False
                case PongReceived(payload):
                    self.pongs += 1
                    assert int.from_bytes(payload, "big") == self.pongs
                case HelloReceived(hello):
                    assert hello["role"] == self.peer.role.name
                    self.greeted = True
                case _:
                    pass


class TwoEngines(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        host, guest = Side(Role.HOST), Side(Role.GUEST)
        host.peer, guest.peer = guest, host
        self.sides = host, guest

    def pick(self, data: st.DataObject, side: Side) -> tuple[int, HalfStream]:
        stream_id = data.draw(st.sampled_from(sorted(side.streams)))
        return stream_id, side.streams[stream_id]

    def has_streams(self) -> bool:
        return all(side.streams for side in self.sides)

    @rule(which=st.integers(0, 1))
    def open_stream(self, which: int) -> None:
        side = self.sides[which]
        own = [stream_id for stream_id in side.streams if stream_id % 2 == side.role.value % 2]
        expected = max(own, default=side.role.value - 2) + 2
        stream_id = side.connection.open_stream({"n": expected})
        assert stream_id == expected
        side.streams[stream_id] = HalfStream()

    @precondition(has_streams)
    @rule(
        which=st.integers(0, 1),
        size=st.one_of(st.integers(0, 10), st.integers(0, 400_000)),
        last=st.sampled_from(["", "", "", "end", "close"]),
        data=st.data(),
    )
    def send(self, which: int, size: int, last: str, data: st.DataObject) -> None:
        side = self.sides[which]
        stream_id, stream = self.pick(data, side)
        if stream.sending or stream.ended or stream.reset or stream.reset_received:
            return
        piece = (len(stream.given) % 251).to_bytes(1, "big") * size
        stream.given += piece
        stream.sending = True
        stream.ended = last != ""
        stream.closing = last == "close"
        side.connection.send(stream_id, piece, end=last == "end", close=last == "close")

    @precondition(has_streams)
    @rule(which=st.integers(0, 1), data=st.data())
    def unsend(self, which: int, data: st.DataObject) -> None:
        side = self.sides[which]
        stream_id, stream = self.pick(data, side)
        if stream.sending:
            side.connection.unsend(stream_id)
            side.connection.reset(stream_id, "cut short")
            stream.sending = stream.ended = False
            stream.reset = stream.unsent = True

    @precondition(has_streams)
    @rule(which=st.integers(0, 1), data=st.data())
    def end(self, which: int, data: st.DataObject) -> None:
        side = self.sides[which]
        stream_id, stream = self.pick(data, side)
        if not stream.sending and not stream.reset and not stream.reset_received:
            side.connection.end(stream_id)
            stream.ended = True

    @precondition(has_streams)
    @rule(which=st.integers(0, 1), data=st.data())
    def reset(self, which: int, data: st.DataObject) -> None:
        side = self.sides[which]
        stream_id, stream = self.pick(data, side)
        side.connection.reset(stream_id, "no")
        stream.unsent = stream.unsent or stream.sending
        stream.ended = stream.ended and not stream.sending
        stream.sending = False
        stream.reset = True

    @precondition(has_streams)
    @rule(which=st.integers(0, 1), data=st.data(), everything=st.booleans())
    def take(self, which: int, data: st.DataObject, everything: bool) -> None:
        side = self.sides[which]
        stream_id, stream = self.pick(data, side)
        available = len(stream.received) - stream.taken
        size = available if everything else data.draw(st.integers(0, available))
        side.connection.take(stream_id, size)
        stream.taken += size

    @rule(which=st.integers(0, 1))
    def ping(self, which: int) -> None:
        side = self.sides[which]
        side.pings += 1
        side.connection.ping(side.pings.to_bytes(8, "big"))

    @rule(which=st.integers(0, 1))
    def write(self, which: int) -> None:
        self.sides[which].write()

    @rule(which=st.integers(0, 1), size=st.one_of(st.integers(1, 30), st.integers(1, 500_000)))
    def read(self, which: int, size: int) -> None:
        self.sides[which].read(size)

    @invariant()
    def what_comes_is_what_was_sent(self) -> None:
        for side in self.sides:
            for stream_id, stream in side.streams.items():
                assert len(stream.received) - stream.taken <= INITIAL_CREDIT
                other = side.peer.streams.get(stream_id)
                if other is not None:
                    assert stream.given.startswith(other.received)
                    if other.end_received:
                        assert stream.ended
                        assert stream.given == other.received

    def teardown(self) -> None:
        """Let everything arrive, and see that nothing is lost and nothing is left."""
        if not hasattr(self, "sides"):
            return
        self.settle()
        for side in self.sides:
            assert side.greeted
            assert side.pongs == side.pings
            for stream_id, stream in side.streams.items():
                other = side.peer.streams[stream_id]
                if not (stream.reset or stream.reset_received or other.reset):
                    assert other.received == stream.given
                    assert other.end_received == stream.ended
                if not stream.reset_received:
                    side.connection.end(stream_id)
        self.settle()
        for side in self.sides:
            assert side.connection.open_streams == 0
            assert side.connection._open_count == 0  # pyright: ignore[reportPrivateUsage]
            assert side.connection._peer_open_count == 0  # pyright: ignore[reportPrivateUsage]

    def settle(self) -> None:
        while True:
            for side in self.sides:
                side.write()
            if not any(side.wire for side in self.sides):
                break
            for side in self.sides:
                side.read(10_000_000)
                for stream_id, stream in side.streams.items():
                    side.connection.take(stream_id, len(stream.received) - stream.taken)
                    stream.taken = len(stream.received)


TwoEngines.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestTwoEngines = TwoEngines.TestCase
