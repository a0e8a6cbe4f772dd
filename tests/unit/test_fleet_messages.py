"""What travels between a node and its user: whole or in pieces, and nothing but what is ours."""

from __future__ import annotations

import enum
import os
import pickle
import struct
import subprocess

import pytest
import trio

from trio_sandbox import (
    Image,
    LinkProtocolError,
    MissingProgramError,
    OutcomeUnknownError,
    SandboxConfig,
    SandboxError,
    Usage,
    VmDiedError,
    WheelMissingError,
)
from trio_sandbox._errors import directory_refused
from trio_sandbox.fleet._keeper import without_known
from trio_sandbox.fleet._messages import MAX_MESSAGE, Answered, Ask, Decoder, Failure, Open, Status, decode_all, encode

MESSAGES = (
    Open(Image("python").packages("idna"), SandboxConfig(memory_mib=512, warmup="import json"), None),
    Ask(3, "revert", (7,)),
    Answered({"a": [1, 2.5, None, b"\0", "text"]}),
    "watch",
)


def test_messages_come_whole_however_they_are_cut() -> None:
    data = b"".join(map(encode, MESSAGES))
    for size in (1, 2, 7, len(data)):
        decoder = Decoder()
        received: list[object] = []
        for start in range(0, len(data), size):
            received += decoder.feed(data[start : start + size])
        assert tuple(received) == MESSAGES


class _Size(enum.IntEnum):
    LARGE = 512


class _Name(enum.StrEnum):
    PYTHON = "python"


class _Seconds(float):
    pass


def test_text_and_numbers_of_somebodys_own_kind_arrive_as_what_they_are() -> None:
    config = SandboxConfig(memory_mib=_Size.LARGE, warmup=_Name.PYTHON, reclaim_after=_Seconds(2))
    message = Open(Image(_Name.PYTHON), config, _Name.PYTHON)
    (there,) = decode_all(encode(message))
    assert there == message
    parts = there.template, there.image.name, there.config.memory_mib, there.config.reclaim_after
    assert [type(part).__name__ for part in parts] == ["str", "str", "int", "float"]


class _Call:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        _Call(os.unlink, "true"),
        _Call(eval, "1"),
        _Call(getattr, "", "join"),
        _Call(subprocess.Popen, ["true"]),
        print,
    ],
    ids=["unlink", "eval", "getattr", "Popen", "a function"],
)
def test_what_is_none_of_ours_is_refused(value: object) -> None:
    body = pickle.dumps(Answered(value), protocol=5)
    with pytest.raises(LinkProtocolError, match="none of ours"):
        Decoder().feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize(
    "name", ["_config.os", "host.os.system", "_quote.quote_lines", "fleet._messages.pickle", "fleet._messages.encode"]
)
def test_what_our_modules_only_use_is_refused_as_well(name: str) -> None:
    module, _, attribute = f"trio_sandbox.{name}".rpartition(".")
    for where, what in ((module, attribute), ("trio_sandbox", name)):
        body = b"\x80\x04" + b"\x8c%c%b\x8c%c%b\x93." % (len(where), where.encode(), len(what), what.encode())
        with pytest.raises(LinkProtocolError):
            Decoder().feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize("body", [b"", b"\x80\x04", b"no pickle", b"\x80\x05K\x01"])
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(LinkProtocolError):
        Decoder().feed(struct.pack(">I", len(body)) + body)


def test_messages_are_bounded_on_both_sides() -> None:
    with pytest.raises(LinkProtocolError, match="are allowed"):
        Decoder().feed(struct.pack(">I", MAX_MESSAGE + 1))
    with pytest.raises(ValueError, match="may have"):
        encode(Answered(b"x" * MAX_MESSAGE))


@pytest.mark.parametrize(
    "error",
    [
        MissingProgramError("qemu", "qemu-system-x86"),
        VmDiedError("it died", console="the last words"),
        WheelMissingError("no wheel", package="a", version="1"),
        FileNotFoundError(2, "No such file", "/srv/data"),
        directory_refused(2, "No such file", "/srv/data"),
        trio.BusyResourceError("busy"),
        ValueError("wrong", 1),
        ExceptionGroup("two", [ValueError("one"), TypeError("two")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_they_are(error: Exception) -> None:
    error.__cause__ = OutcomeUnknownError("since")
    error.add_note("a note")
    (message,) = decode_all(encode(Failure(error)))
    there = message.error
    assert type(there) is type(error)
    assert str(there) == str(error)
    for name in ("console", "package", "version", "program", "errno", "filename"):
        assert getattr(there, name, None) == getattr(error, name, None)
    assert there.__notes__ == ["a note"]
    assert (type(there.__cause__), str(there.__cause__)) == (OutcomeUnknownError, "since")


class _ForeignError(Exception):
    def __init__(self, lock: object) -> None:
        super().__init__("something else")
        self.lock = lock


def test_errors_of_others_arrive_as_what_they_say() -> None:
    (message,) = decode_all(encode(Failure(_ForeignError(trio.Lock))))
    assert type(message.error) is SandboxError
    assert str(message.error) == "_ForeignError: something else"


def test_an_error_that_is_its_own_cause_arrives() -> None:
    error = ValueError("round")
    error.__cause__ = error
    (message,) = decode_all(encode(Failure(error)))
    assert str(message.error) == "round"


def test_long_texts_travel_when_they_change() -> None:
    def status(cpu: float, console: str, log: str) -> Status:
        usage = Usage(cpu_seconds=cpu, memory_bytes=0, disk_bytes=0, network_bytes_sent=0, network_bytes_received=0)
        return Status(sandbox=1, usage=usage, clock_error=None, last_pause=None, console=console, qmp_log=log)

    last = status(1.0, "console" * 1000, "log" * 1000)
    same = without_known(status(2.0, "console" * 1000, "log" * 1000), last)
    assert (same.console, same.qmp_log) == (None, None)
    assert len(encode(same)) < 400
    other = without_known(status(2.0, "new", "log" * 1000), last)
    assert (other.console, other.qmp_log) == ("new", None)
