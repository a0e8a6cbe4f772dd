"""The QMP codec: bytes in, values out, and nothing else."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_sandbox import QMPCommandError, QMPProtocolError
from trio_sandbox.qemu._qmp_codec import (
    QMPConnection,
    QMPEvent,
    QMPGreeting,
    QMPMessage,
    QMPReply,
    QMPState,
    encode_command,
)

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, '
    b'"package": "Debian 1:7.2"}, "capabilities": ["oob"]}}\r\n'
)
EVENT = (
    b'{"timestamp": {"seconds": 12, "microseconds": 500000}, '
    b'"event": "BALLOON_CHANGE", "data": {"actual": 268435456}}\r\n'
)


def greeted(**arguments: int) -> QMPConnection:
    connection = QMPConnection(**arguments)
    connection.receive(GREETING)
    return connection


def send(connection: QMPConnection, command: str, arguments: dict[str, object] | None = None) -> tuple[int, Any]:
    number, data = connection.send(command, encode_command(command, arguments))
    assert data.endswith(b"}\n")
    assert data.count(b"\n") == 1
    return number, json.loads(data)


def test_greeting_is_parsed() -> None:
    connection = QMPConnection()
    assert connection.receive(GREETING) == [QMPGreeting((7, 2, 22), "Debian 1:7.2", ("oob",))]
    assert connection.state is QMPState.RUNNING


def test_command_has_name_arguments_and_id() -> None:
    connection = greeted()
    assert send(connection, "stop") == (0, {"execute": "stop", "id": 0})
    assert send(connection, "balloon", {"value": 1}) == (1, {"execute": "balloon", "arguments": {"value": 1}, "id": 1})
    assert connection.in_flight == 2


def test_command_has_no_byte_too_many() -> None:
    """QEMU reads byte by byte, so blanks and escapes cost time."""
    connection = greeted()
    _, data = connection.send("x", encode_command("x", {"a": ["ü", 1]}))
    assert data.decode() == '{"execute":"x","arguments":{"a":["ü",1]},"id":0}\n'


def test_ids_are_unique_while_in_flight_and_stay_small() -> None:
    connection = greeted()
    for _ in range(3):
        numbers = [send(connection, "stop")[0] for _ in range(5)]
        assert sorted(numbers) == [0, 1, 2, 3, 4]
        for number in numbers[::-2]:
            connection.receive(b'{"return": {}, "id": %d}\n' % number)
        more = [send(connection, "stop")[0] for _ in range(3)]
        assert sorted(more) == sorted(numbers[::-2])
        for number in range(5):
            connection.receive(b'{"return": {}, "id": %d}\n' % number)


def test_return_settles_the_command() -> None:
    connection = greeted()
    number, _ = send(connection, "query-status")
    (reply,) = connection.receive(b'{"return": {"status": "running"}, "id": 0}\r\n')
    assert isinstance(reply, QMPReply)
    assert reply.id == number
    assert reply.result.unwrap() == {"status": "running"}
    assert connection.in_flight == 0


def test_error_settles_the_command_it_belongs_to() -> None:
    connection = greeted()
    send(connection, "one")
    send(connection, "two")
    (reply,) = connection.receive(b'{"error": {"class": "GenericError", "desc": "no"}, "id": 1}\r\n')
    assert isinstance(reply, QMPReply)
    with pytest.raises(QMPCommandError, match="two: no") as caught:
        reply.result.unwrap()
    assert (caught.value.command, caught.value.error_class, caught.value.desc) == ("two", "GenericError", "no")


def test_event_with_and_without_data_and_clock() -> None:
    connection = greeted()
    assert connection.receive(EVENT) == [QMPEvent("BALLOON_CHANGE", {"actual": 2**28}, 12.5)]
    (event,) = connection.receive(b'{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}\n')
    assert event == QMPEvent("STOP", {}, -1.0)


def everything() -> tuple[bytes, list[QMPMessage]]:
    data = GREETING + EVENT + b"\r\n \n" + EVENT
    return data, QMPConnection().receive(data)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_pieces_of_any_size_give_the_same(sizes: list[int]) -> None:
    whole, expected = everything()
    connection, got, rest = QMPConnection(), list[QMPMessage](), whole
    for size in itertools.cycle(sizes):
        got += connection.receive(rest[:size])
        rest = rest[size:]
        if not rest:
            break
    assert got == expected
    assert len(got) == 3


def test_byte_by_byte() -> None:
    whole, expected = everything()
    connection = QMPConnection()
    assert [message for byte in whole for message in connection.receive(bytes([byte]))] == expected


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"7",
        b'"QMP"',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"QMP": {}}',
        b'{"QMP": 7}',
        b'{"QMP": {"version": {"qemu": {"major": Infinity, "minor": 1, "micro": 1}, "package": ""}, "capabilities": []}}',
        b'{"return": {}, "id": 0}',
    ],
)
def test_bad_greeting_breaks_the_connection(line: bytes) -> None:
    connection = QMPConnection()
    with pytest.raises(QMPProtocolError):
        connection.receive(line + b"\n")
    assert connection.state is QMPState.BROKEN
    with pytest.raises(QMPProtocolError, match="earlier"):
        connection.receive(GREETING)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"{}",
        b'{"return": {}}',
        b'{"return": {}, "id": 1}',
        b'{"return": {}, "id": false}',
        b'{"return": {}, "id": 0.0}',
        b'{"return": {}, "id": "0"}',
        b'{"return": {}, "id": [0]}',
        b'{"id": 0}',
        b'{"error": 7, "id": 0}',
        b'{"error": {"desc": "no class"}, "id": 0}',
        b'{"event": 7, "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"event": "A", "data": [], "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"event": "A"}',
        b'{"event": "A", "timestamp": {"seconds": 1e999, "microseconds": 1}}',
        b'{"event": "A", "timestamp": 7}',
        b'{"event": "A", "timestamp": {"seconds": true, "microseconds": 1}}',
        b'{"event": "A", "timestamp": {"seconds": "1", "microseconds": 1}}',
        b'{"event": "A", "timestamp": {"seconds": 1%s, "microseconds": 1}}' % (b"0" * 400),
        b'{"event": "A", "data": {"a": NaN}, "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"error": {"class": "A", "desc": ["no text"]}, "id": 0}',
    ],
)
def test_bad_message_breaks_the_connection(line: bytes) -> None:
    connection = greeted()
    send(connection, "stop")
    with pytest.raises(QMPProtocolError):
        connection.receive(line + b"\n")
    assert connection.state is QMPState.BROKEN
    with pytest.raises(RuntimeError, match="BROKEN"):
        connection.send("stop", encode_command("stop"))


def test_greeting_may_come_twice_but_not_after_a_reply() -> None:
    connection = greeted()
    send(connection, "qmp_capabilities")
    (greeting,) = connection.receive(GREETING)
    assert isinstance(greeting, QMPGreeting)
    connection.receive(b'{"return": {}, "id": 0}\n')
    with pytest.raises(QMPProtocolError):
        connection.receive(GREETING)


def test_second_reply_to_one_command_is_a_violation() -> None:
    connection = greeted()
    send(connection, "stop")
    with pytest.raises(QMPProtocolError):
        connection.receive(b'{"return": {}, "id": 0}\n{"return": {}, "id": 0}\n')


def test_error_without_id_says_what_was_not_understood() -> None:
    connection = greeted()
    with pytest.raises(QMPProtocolError, match="JSON parse error, stray"):
        connection.receive(b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n')


def test_long_garbage_is_shortened_in_the_message() -> None:
    with pytest.raises(QMPProtocolError) as caught:
        QMPConnection().receive(b"x" * 100_000 + b"\n")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_line_limit_holds_before_and_at_the_end_of_a_line(piece: int) -> None:
    padding = b" " * (300 - len(GREETING))
    exact = GREETING[:-1] + padding  # 299 bytes, line end not counted
    for extra, fits in ((b"", True), (b" ", True), (b"  ", False)):
        for end in (b"\n", b""):
            connection = QMPConnection(line_limit=300)
            line = exact + extra + end

            def feed(connection: QMPConnection = connection, line: bytes = line) -> None:
                for start in range(0, len(line), piece):
                    connection.receive(line[start : start + piece])

            if fits:
                feed()
                assert connection.state is (QMPState.RUNNING if end else QMPState.GREETING)
            else:
                with pytest.raises(QMPProtocolError, match="more than 300 bytes"):
                    feed()


def test_nothing_can_be_sent_before_the_greeting() -> None:
    with pytest.raises(RuntimeError, match="GREETING"):
        QMPConnection().send("stop", encode_command("stop"))


@pytest.mark.parametrize(
    ("command", "arguments", "error"),
    [
        (7, None, TypeError),
        ("", None, ValueError),
        ("a\ud800", None, ValueError),
        ("a", [], TypeError),
        ("a", {"b": object()}, TypeError),
        ("a", {"b": b"bytes"}, TypeError),
        ("a", {"b": "\udcff"}, ValueError),
        ("a", {"b": math.nan}, ValueError),
        ("a", {"b": math.inf}, ValueError),
    ],
)
def test_what_json_can_not_express_is_refused(command: Any, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        encode_command(command, arguments)


@given(st.binary())
def test_arbitrary_bytes_are_a_message_or_a_violation(data: bytes) -> None:
    for connection in (QMPConnection(), greeted()):
        try:
            connection.receive(data + b"\n")
        except QMPProtocolError:
            assert connection.state is QMPState.BROKEN


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["QMP", "version", "qemu", "major", "return", "error", "id", "event", "data", "timestamp"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_arbitrary_json_is_a_message_or_a_violation(value: Any) -> None:
    for connection in (QMPConnection(), greeted()):
        try:
            connection.receive(json.dumps(value).encode() + b"\n")
        except QMPProtocolError:
            assert connection.state is QMPState.BROKEN
