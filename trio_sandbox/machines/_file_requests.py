"""What a machine that makes a layer is asked to do with files: by our own file helper, as root, and by no program of the image."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from .._errors import ImageBuildError
from .._quote import quote_guest
from ..client import FileSession, Machine, guest_failures, join_request

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
        session = FileSession(vm, _ROOT, what, limit=_LONGEST_ANSWER)
        try:
            await session.send(join_request(map(os.fsencode, request)), end=True)
            if said := await session.reply():
                raise session.violation(f"{said[:80]!r} where nothing was expected")
        except OSError as exc:
            why = "this is no part of the image's disk" if exc.errno == errno.EXDEV else exc.strerror
            path = quote_guest(str(exc.filename or request[-1]))
            raise ImageBuildError(f"a step of the image can't be done: {path}: {why}") from None
        finally:
            session.close()
