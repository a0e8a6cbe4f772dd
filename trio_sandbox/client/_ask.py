"""Questions that a guest answers with a word."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import trio

from .._errors import OutcomeUnknownError
from ..wire import receive_all
from ._failures import Machine, guest_failures, open_stream


async def ask(
    vm: Machine, header: Mapping[str, object], what: str, *, most: int, patience: float, data: bytes = b""
) -> bytes:
    """Open a stream with *header* and return all that the guest says on it until it ends that.

    A guest that says more, or is late, is not ours any more: its machine is ended, so that nobody else waits for it.

    Args:
      vm: The machine.
      header: The request.
      what: What it is for, in messages.
      most: Bytes that the answer may have.
      patience: Seconds until its end.
      data: What follows the request, and then its end; b"": nothing, and no end.

    Raises:
      GuestProtocolError: if the answer is longer.
      OutcomeUnknownError: if the guest is late, gone, or gave the request up; `__cause__` says why.
      SandboxClosedError, OSError: as `open_stream`; nothing was sent.

    """
    with trio.move_on_after(patience):
        async with guest_failures(vm, what):
            with closing(open_stream(vm, header, what, flush=True)) as stream:
                if data:
                    await stream.send_all(data, end=True)
                return await receive_all(stream, most)
    vm.retire(f"its guest did not answer within {patience:g} s when it was asked for {what}")
    raise OutcomeUnknownError(
        f"the guest did not answer within {patience:g} s when it was asked for {what}, and its virtual machine was ended"
    ) from vm.failure
