"""What a machine that makes a layer is asked to do with files: by our own file helper, as root, and by no program of the image."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from .._errors import GuestProtocolError, ImageBuildError
from .._quote import quote_guest
from ..client import Machine, guest_failures, open_stream, parse_error
from ..wire import RecordStream

_REQUEST, _REPLY, _ERROR = b"Q", b"R", b"X"
_ROOT: Final = 0
#: Bytes of an answer: an error with two paths.
_LONGEST_ANSWER: Final = 2**15


async def ask_file_helper(vm: Machine, request: Sequence[str]) -> None:
    """Have the guest's file helper do something, and wait until it is done, which nobody bounds.

    Args:
      vm: The machine.
      request: An operation of `guest/helpers/file_helper.py` that answers with nothing, and its arguments.

    Raises:
      ImageBuildError: if it can't be done.
      GuestProtocolError, OutcomeUnknownError, SandboxClosedError: as all requests raise them.

    """
    what = "a step of the image"
    async with guest_failures(vm, what):
        records = RecordStream(open_stream(vm, {"service": "file", "user": _ROOT}, what), limit=_LONGEST_ANSWER)
        try:
            await records.send(_REQUEST, b"\0".join(map(os.fsencode, request)), end=True)
            answer = await records.receive()
        finally:
            records.stream.close()
        match answer:
            case (tag, b"") if tag == _REPLY:
                return
            case (tag, payload) if tag == _ERROR:
                error = parse_error(payload, what)
            case _:
                raise GuestProtocolError(f"the guest answered {what} with {answer!r:.80}")
    why = "this is no part of the image's disk" if error.errno == errno.EXDEV else error.strerror
    raise ImageBuildError(
        f"a step of the image can't be done: {quote_guest(str(error.filename or request[-1]))}: {why}"
    )
