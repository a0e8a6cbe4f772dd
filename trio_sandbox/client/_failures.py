"""From "a stream broke" to what the user needs to know: whose fault, and is a retry safe."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, final

import trio

from .._errors import GuestProtocolError, NodeLostError, OutcomeUnknownError, SandboxClosedError
from .._quote import quote_guest
from ..qemu import Accelerator
from ..wire import Channel, ChannelStream, StreamHandler, StreamLimitError, StreamResetError, WireError

#: Seconds between a broken channel and QEMU's exit, or its being killed for that.
EXIT_PATIENCE = 10.0


class Machine(Protocol):
    """What requests need of a virtual machine; `qemu.Vm` is one, tests bring another."""

    @property
    def guest(self) -> Channel:
        """The channel to the guest's agent."""
        ...

    @property
    def accelerator(self) -> Accelerator:
        """What runs the guest."""
        ...

    @property
    def pid(self) -> int:
        """The process id of what runs it."""
        ...

    @property
    def failure(self) -> Exception | None:
        """Why the machine is gone, or None while it is there."""
        ...

    @property
    def closed(self) -> bool:
        """Whether its block was left."""
        ...

    @property
    def guest_handler(self) -> StreamHandler | None:
        """What serves the streams that the guest opens; None: they are refused."""
        ...

    @guest_handler.setter
    def guest_handler(self, handler: StreamHandler | None) -> None: ...

    def retire(self, reason: str) -> None:
        """End the machine: nothing that its guest says from now on is believed."""
        ...

    async def wait_ended(self) -> Exception | None:
        """Wait until the machine is gone or its block left, and return `failure`."""
        ...

    def console(self) -> str:
        """Return the last lines of the guest's console."""
        ...

    def qmp_log(self) -> str:
        """Return the end of the conversation with QEMU's monitor."""
        ...


#: What streams of the guest channel raise once the guest is gone, or the sandbox's block was left in another task. For who serves
#: a request on the side that is no error: who waits for the request's end is told, and one failure has one route.
STREAM_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


def guest_failures(vm: Machine, what: str) -> AbstractAsyncContextManager[None]:
    """Translate what goes wrong in a block between a request's being sent and its answer.

    A guest that broke the protocol is retired on the spot: nothing it says later is believed.

    Raises:
      GuestProtocolError: if the guest sent what no guest of ours sends.
      OutcomeUnknownError: if the guest is gone or gave the request up; `__cause__` says why.

    """
    return _GuestFailures(vm, what)


@final
class _GuestFailures(AbstractAsyncContextManager[None]):
    # Not a generator: a run has several of these blocks, and a generator for each would be felt.

    def __init__(self, vm: Machine, what: str) -> None:
        self._vm = vm
        self._what = what

    async def __aenter__(self) -> None:  # noqa: ASYNC910 - the block waits
        return None

    async def __aexit__(  # noqa: ASYNC910 - the block has waited
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            return  # noqa: ASYNC910 - the block has waited
        vm, what = self._vm, self._what
        match exc:
            case GuestProtocolError():
                vm.retire(str(exc))
            case WireError():
                vm.retire(f"it broke the guest protocol: {exc}")
                raise GuestProtocolError(f"the guest broke the protocol during {what}: {exc}") from exc
            case StreamResetError():
                raise OutcomeUnknownError(f"the guest broke off {what}: {quote_guest(exc.reason)}") from exc
            case trio.BrokenResourceError():
                cause = exc.__cause__
                if isinstance(cause, WireError):
                    vm.retire(f"it broke the guest protocol: {cause}")
                    raise GuestProtocolError(f"the guest broke the protocol during {what}: {cause}") from cause
                # The channel breaks a moment before QEMU's exit is seen, and the exit tells more.
                with trio.move_on_after(EXIT_PATIENCE, shield=True):
                    await vm.wait_ended()
                raise _ended(vm, what) from (vm.failure or cause or exc)
            case trio.ClosedResourceError():
                if vm.failure is not None:  # it was ended, and its channel closed before those who wait had their turn
                    raise _ended(vm, what) from vm.failure
                raise OutcomeUnknownError(f"the sandbox was closed during {what}") from exc
            case _:
                pass


def _ended(vm: Machine, what: str) -> OutcomeUnknownError:
    return OutcomeUnknownError(f"the virtual machine{_where(vm)} ended during {what}, which may have had its effect")


def _where(vm: Machine) -> str:
    return f" on node {vm.failure.node}" if isinstance(vm.failure, NodeLostError) else ""


def check_open(vm: Machine, what: str) -> None:
    """Refuse a request that can't be sent any more.

    Raises:
      SandboxClosedError: if the sandbox was left, or its virtual machine is gone (`__cause__`).

    """
    # The channel fails a moment before the machine's end is known.
    if gone := vm.failure or vm.guest.failure:
        raise SandboxClosedError(f"{what} was not sent: the sandbox's virtual machine{_where(vm)} is gone") from gone
    if vm.closed:
        raise SandboxClosedError(f"{what} was not sent: the sandbox's block has exited; open another sandbox")


def open_stream(vm: Machine, header: Mapping[str, object], what: str, *, flush: bool = False) -> ChannelStream:
    """Open a stream to a service of the guest, for the request *what*; *flush* if its header is all of that.

    Raises:
      SandboxClosedError: as `check_open`.
      OSError: EMFILE, if as many streams are open as may be.

    """
    check_open(vm, what)
    try:
        return vm.guest.open_stream(header, flush=flush)
    except StreamLimitError as exc:
        raise OSError(errno.EMFILE, f"{what} was not sent: too many streams to it are open; close some") from exc
