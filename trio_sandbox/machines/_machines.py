"""Machines that a task holds, so that they can be given up, and replaced, before their owner's block is left."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar, final

import trio

from .._nurseries import Services

VmT = TypeVar("VmT")


@final
class HeldMachine(Generic[VmT]):
    """A machine whose block is a task's. Made by `hold_machine`.

    Args:
      machine: To be opened in the task.
      contained: A failure to leave the machine's block is told by `close` only, and is not the task's.

    """

    def __init__(self, machine: AbstractAsyncContextManager[VmT], *, contained: bool = False) -> None:
        self._machine = machine
        self._contained = contained
        self._vm: VmT | None = None
        self._given_up = trio.Event()
        self._closed = trio.Event()
        self._failure: Exception | None = None

    @property
    def vm(self) -> VmT:
        """The machine; it is gone once `closed`."""
        assert self._vm is not None
        return self._vm

    @property
    def closed(self) -> bool:
        """Whether the machine's block was left, by whomever."""
        return self._closed.is_set()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC910 - waiting is a checkpoint
        """Open the machine, and keep it until it is given up or this is cancelled."""
        try:
            async with self._machine as self._vm:
                task_status.started()
                await self._given_up.wait()
        except Exception as exc:
            # What ends the machine is told once: to whoever asked for the end.
            if self._vm is None or not (self._contained or self._given_up.is_set()):
                raise
            self._failure = exc
        finally:
            self._closed.set()

    def give_up(self) -> None:
        """Have the machine's block left, and don't wait for that; again is no error."""
        self._given_up.set()

    async def close(self) -> None:
        """Leave the machine's block, and wait for that; again, or after the owner did it, is no error.

        Cancelled, it goes on to the end: the machine's own cleanup bounds how long that takes.

        Raises:
          Exception: what leaving the block raised, in the first call only.

        """
        self.give_up()
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            await self._closed.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


async def hold_machine(services: Services, machine: AbstractAsyncContextManager[VmT]) -> HeldMachine[VmT]:
    """Open *machine* in a task of *services*, which closes it when their block is left, if nobody does earlier.

    Cancelled, it leaves no machine.

    Raises:
      trio.ClosedResourceError: if the block was left, or is left meanwhile; there is no machine.
      Exception: what opening it raised.

    """
    held = HeldMachine(machine)
    await services.start(held.serve)
    return held
