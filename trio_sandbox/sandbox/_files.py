"""Requests of the service "file": to a process in the guest that touches files as some user would.

`guest/file_helper.py` describes the protocol. Whatever comes from there is what a hostile guest may say.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import PurePosixPath
from typing import final

import trio

from .._errors import GuestProtocolError
from ..client import Machine, guest_failures, open_stream, parse_error as parse_error
from ..guest.trees import HEADER
from ..wire import RecordStream, StreamResetError
from ._slot import Slot

REQUEST = b"Q"
REPLY = b"R"
ERROR = b"X"
CONTENT = b"D"
END = b"E"

#: Seconds that a cancelled transfer waits for the guest to remove what there is of it. It does so in any case.
_TAKE_BACK_PATIENCE = 2.0
#: Bytes of a path with its NUL that the guest's kernel takes, and of one that links lead to, which may be longer.
_PATH_MAX, _PATH_LIMIT = 4096, 2**14
#: Variables of a process's environment, which no image of ours has a hundredth of.
_MOST_VARIABLES = 4096


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
    payload = b"\0".join(texts)
    return HEADER.pack(REQUEST, len(payload)) + payload


@final
class FileSession:
    """A conversation with one file helper, which serves one request after the other."""

    def __init__(self, vm: Machine, user: str | int | None, what: str) -> None:
        self.machine: Machine = vm
        """Where the helper is."""
        self._records = RecordStream(open_stream(vm, {"service": "file", "user": user}, what))
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


@asynccontextmanager
async def open_session(slot: Slot, user: str | int | None, what: str) -> AsyncGenerator[FileSession]:
    """Open a session for a block.

    Args:
      slot: Where the machine is.
      user: Whose rights it has; None for the guest's ordinary user.
      what: What it is for, in messages.

    Raises:
      SandboxClosedError: if the sandbox is closed or its VM gone; nothing was sent.
      OutcomeUnknownError: if the VM ended meanwhile, or the helper did.
      GuestProtocolError: if the guest broke the protocol; its VM was ended.

    """
    vm = await slot.resolve(what)
    async with guest_failures(vm, what):
        session = FileSession(vm, user, what)
        try:
            try:
                yield session
            except OSError:
                if session.failed:
                    await session.finish()  # noqa: ASYNC120 - a caller that is cancelled wants no answer
                raise
            await session.finish()
        finally:
            session.close()


async def call(slot: Slot, user: str | int | None, what: str, operation: str, *fields: object) -> bytes:
    """Make one request in a session of its own.

    A caller that is cancelled leaves it done or not done, but not under way: another helper, which serves the next request, would
    overtake this one.
    """
    request = encode_request(operation, *fields)
    async with open_session(slot, user, what) as session:
        try:
            await session.send(request, end=True)
            return await session.reply()
        except trio.Cancelled:
            await session.take_back()  # noqa: ASYNC102, ASYNC120 - it is shielded and bounded by itself
            raise


async def read_environment(slot: Slot, user: str | int | None) -> dict[str, str]:
    """What `Sandbox.environment` does."""
    what = "the environment of processes"
    async with open_session(slot, user, what) as session:
        return parse_environment(await session.ask("environment", end=True))


def parse_environment(payload: bytes) -> dict[str, str]:
    """Return the variables that the guest says processes have."""
    fields = payload.split(b"\0") if payload else []
    if len(fields) > _MOST_VARIABLES:
        raise GuestProtocolError(f"the guest sent {len(fields)} variables, of which {_MOST_VARIABLES} are allowed")
    variables: dict[str, str] = {}
    for field in fields:
        name, equals, value = field.partition(b"=")
        if not name or not equals:
            raise GuestProtocolError(f"the guest sent something that is not a variable: {field[:80]!r}")
        variables[os.fsdecode(name)] = os.fsdecode(value)
    return variables


def parse_path(payload: bytes) -> PurePosixPath:
    """Return the path that the guest says something leads to.

    Raises:
      GuestProtocolError: if it is none.
      OSError: ENAMETOOLONG, if it is too long to be looked at; code in the guest can have made it so.

    """
    if not payload or b"\0" in payload:
        raise GuestProtocolError(f"the guest sent something that is not a path: {payload[:80]!r}")
    if len(payload) > _PATH_LIMIT:
        raise OSError(errno.ENAMETOOLONG, f"it leads to a path of {len(payload)} bytes")
    return PurePosixPath(os.fsdecode(payload))
