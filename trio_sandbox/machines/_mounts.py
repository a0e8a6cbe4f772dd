"""The host's directories in a guest: `SandboxConfig.mounts`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import trio

from .._errors import GuestProtocolError, MountError
from .._quote import quote_guest
from ..client import Failed, Machine, Mounted, guest_failures, open_stream, receive_message
from ..image import Place
from ..wire import RecordStream


async def mount(vm: Machine, places: Sequence[Place], *, patience: float) -> None:
    """Have the guest mount what is on its third disk, before any code of the sandbox runs in it.

    Args:
      vm: A machine in which it has not been done yet.
      places: What is there.
      patience: Seconds for the guest to do it.

    Raises:
      MountError: if the guest can't.

    """
    what = "mounting"
    stream = open_stream(vm, {"service": "mounts"}, what)
    try:
        with trio.fail_after(patience):
            async with guest_failures(vm, what):
                records = RecordStream(stream)
                wanted = [{"target": place.target, "offset": place.offset, "size": place.size} for place in places]
                await records.send_json({"mounts": wanted}, end=True)
                answer = await receive_message(records)
    except trio.TooSlowError as exc:
        raise MountError(f"the guest did not mount what it should within {patience:g} s") from exc
    finally:
        stream.close()
    if isinstance(answer, Failed):
        where = quote_guest(answer.filename or "what it should")
        raise MountError(
            f"the guest can't mount {where}: {os.strerror(answer.errno) if answer.errno else answer.reason}"
        )
    if answer != Mounted(len(places)):
        raise GuestProtocolError(f"the guest answered a request to mount with {answer!r}")
