"""A conversation with a process in the guest that touches files as some user would: the service "file".

`guest/helpers/file_helper.py` describes the protocol. Whatever comes from there is what a hostile guest may say.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import final

import trio

from .._errors import GuestProtocolError
from ..wire import DEFAULT_RECORD_LIMIT, RecordStream, StreamResetError, encode_record
from ._failures import Machine, guest_failures, open_stream

REQUEST = b"Q"
REPLY = b"R"
ERROR = b"X"

#: Seconds that a cancelled transfer waits for the guest to remove what there is of it. It does so in any case.
_TAKE_BACK_PATIENCE = 2.0
#: Bytes of a path with its NUL that the guest's kernel takes.
_PATH_MAX = 4096
_HIGHEST_ERRNO = 4095
#: Bytes of a file's name that the guest sent, in an error of ours.
_LONGEST_NAME = 4096


def encode_request(operation: str, *fields: object) -> bytes:
    """Return the record of one request.

    Raises:
      ValueError: if a field holds a NUL, which no path does.
      OSError: ENAMETOOLONG, if one is longer than any path.

    """
    texts = [os.fsencode(str(field)) for field in (operation, *fields)]
    for text in texts:
        if len(text) >= _PATH_MAX:  # what the guest's kernel would say
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(text))
        if b"\0" in text:
            raise ValueError(f"a path must not hold a NUL character: {os.fsdecode(text)[:80]!r}")
    return join_request(texts)


def join_request(texts: Iterable[bytes]) -> bytes:
    """Return the record of one request: an operation and its fields, as they are."""
    return encode_record(REQUEST, b"\0".join(texts))


@final
class FileSession:
    """A conversation with one file helper, which serves one request after the other.

    Args:
      vm: Where the helper is.
      user: Whose rights it has; None for the guest's ordinary user.
      what: What it is for, in messages.
      limit: The longest payload that it may send, in bytes.

    """

    def __init__(self, vm: Machine, user: str | int | None, what: str, *, limit: int = DEFAULT_RECORD_LIMIT) -> None:
        self.machine: Machine = vm
        """Where the helper is."""
        self._records = RecordStream(open_stream(vm, {"service": "file", "user": user}, what), limit=limit)
        self._what = what
        self.failed: bool = False
        """The guest said that something went wrong, which ends what it was doing."""

    def close(self) -> None:
        """End it; what is incomplete is taken back."""
        self._records.stream.close()

    def failures(self) -> AbstractAsyncContextManager[None]:
        """Translate what goes wrong in a block; see `guest_failures`."""
        return guest_failures(self.machine, self._what)

    async def send(self, data: bytes, *, end: bool = False) -> None:
        """Send encoded records; where the guest does not want them, it has said why: see `receive`."""
        try:
            await self._records.stream.send_all(data, end=end)
        except StreamResetError:
            # The helper ended the session, which it does after an error. Without one, receiving raises this again.
            await trio.lowlevel.checkpoint()

    async def receive(self) -> tuple[bytes, bytes]:
        """Return the next record that is no error.

        Raises:
          OSError: what the guest says went wrong.
          GuestProtocolError: if there is none.

        """
        record = await self.receive_record()
        if record[0] == ERROR:
            self.failed = True
            raise parse_error(record[1], self._what)
        return record

    async def receive_record(self) -> tuple[bytes, bytes]:
        """Return the next record, whatever it is; `GuestProtocolError` if there is none."""
        record = await self._records.receive()
        if record is None:
            raise GuestProtocolError(f"the guest did not finish its answer to {self._what}")
        return record

    async def receive_raw(self) -> bytes:
        """Return encoded records as they come, in pieces of any size; ``b""`` at the end."""
        return await self._records.stream.receive_some()

    async def reply(self) -> bytes:
        """Return the result of a request.

        Raises:
          OSError: what the guest says went wrong.
          GuestProtocolError: if it sent something else.

        """
        tag, payload = await self.receive()
        if tag != REPLY:
            raise self.violation(f"a record {tag!r} where a result was expected")
        return payload

    async def ask(self, operation: str, *fields: object, end: bool = False) -> bytes:
        """Send a request and return its result."""
        await self.send(encode_request(operation, *fields), end=end)
        return await self.reply()

    async def finish(self) -> None:
        """Wait until the guest has ended it too: then the helper is free for the next session."""
        with contextlib.suppress(StreamResetError):
            await self._records.send_eof()
        while await self._records.stream.receive_some():
            pass  # after an error, what was on its way before it

    @property
    def what(self) -> str:
        """What it is for, in messages."""
        return self._what

    def violation(self, message: str) -> GuestProtocolError:
        """Return the error of a guest that says what it may not say."""
        return GuestProtocolError(f"in answer to {self._what} the guest sent {message}")

    async def take_back(self) -> None:  # noqa: ASYNC910 - it cleans up after an exception
        """End an incomplete transfer, and give the guest a moment to remove what there is of it."""
        with trio.move_on_after(_TAKE_BACK_PATIENCE, shield=True):  # noqa: ASYNC912 - where it is gone there is no need
            try:
                await self._records.send_eof()
                while await self._records.stream.receive_some():
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # it is gone, and all that it had with it


def parse_error(payload: bytes, what: str) -> OSError:
    """Return what a file helper of the guest's says went wrong with *what*.

    Raises:
      GuestProtocolError: if that is no error.

    """
    number, *names = payload.split(b"\0")
    if not 0 < len(number) <= len("4095") or not number.isdigit() or not 0 < int(number) <= _HIGHEST_ERRNO:
        raise GuestProtocolError(f"in answer to {what} the guest sent something that is not an error: {payload[:80]!r}")
    filename, second = ([os.fsdecode(name[:_LONGEST_NAME]) for name in names] + ["", ""])[:2]
    error = int(number)
    return OSError(error, os.strerror(error), filename or None, None, second or None)
