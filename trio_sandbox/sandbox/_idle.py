"""Whether anything goes on in a sandbox: its guest and its streams are asked."""

from __future__ import annotations

import math
from typing import Final

import trio

from ..client import ask, guest_failures
from ..qemu import Vm

#: Seconds for the guest to close its ends of streams whose requests are over, and between two looks.
_STREAMS_PATIENCE: Final = 1.0
_STREAMS_LOOK: Final = 0.01
_IDLE: Final = b"idle"
#: Bytes that a guest may say when it is asked whether it is.
_LONGEST_ANSWER: Final = 16


async def check_idle(vm: Vm, patience: float) -> None:
    """Refuse if something is under way in a sandbox.

    Args:
      vm: The sandbox's machine.
      patience: Seconds for its guest to answer.

    Raises:
      trio.BusyResourceError: if so.

    """
    deadline = trio.current_time() + _STREAMS_PATIENCE
    while await count_streams(vm):
        if trio.current_time() > deadline:
            raise trio.BusyResourceError(
                "a sandbox can't hibernate while a run, a process, a file or a connection is open"
            )
        await trio.sleep(_STREAMS_LOOK)
    answer = await ask(vm, {"service": "idle"}, "hibernating", most=_LONGEST_ANSWER, patience=patience)
    if answer != _IDLE:
        raise trio.BusyResourceError(
            "a sandbox can't hibernate while processes or threads that an earlier run has left behind run in its guest; end them first"
        )


async def check_idle_gently(vm: Vm, patience: float) -> None:
    """Refuse as `check_idle`; but a guest that is late is busy, and not ended: memory that is tight makes it slow, too."""
    with trio.move_on_after(patience):
        await check_idle(vm, math.inf)
        return
    raise trio.BusyResourceError(
        f"a sandbox can't hibernate whose guest does not say within {patience:g} s that it is idle"
    )


async def count_streams(vm: Vm) -> int:
    """Return how many streams are open. With the guest's answer to a ping come its ends of those that are over."""
    if _own_streams(vm):
        async with guest_failures(vm, "hibernating"):
            await vm.guest.ping()
    else:
        await trio.lowlevel.checkpoint()
    return _own_streams(vm)


def _own_streams(vm: Vm) -> int:
    numbers = vm.guest.statistics()
    # What the guest has opened are connections to the outside. They may be kept open for long, and a snapshot breaks them off.
    return numbers.open_streams - numbers.peer_streams
