"""What a sandbox needs of whoever cares for its machine, on this machine or on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar, final

from ._network import SandboxNetwork
from ._slot import Slot
from ._usage import Usage

#: What a fork is to its user: a sandbox of its own.
ChildT_co = TypeVar("ChildT_co", covariant=True)


class ImageFacts(Protocol):
    """What a sandbox needs to know of its image; an `image.BuiltImage` says it."""

    @property
    def language(self) -> str:
        """The language that it is for; "" if it has none."""
        ...

    @property
    def command(self) -> tuple[str, ...]:
        """What it runs unless it is told otherwise; () if nothing is said."""
        ...


@final
class Checkpoint:
    """An earlier state of a sandbox, for `Sandbox.revert`. Made by `Sandbox.checkpoint`."""

    def __init__(self, discard: Callable[[], object]) -> None:
        self._discard = discard
        self._discarded = False

    def __repr__(self) -> str:
        return f"<trio_sandbox.Checkpoint: {'discarded' if self._discarded else 'kept'}>"

    @property
    def discarded(self) -> bool:
        """Whether it was discarded: the sandbox can't go back to it any more."""
        return self._discarded

    def discard(self) -> None:
        """Free its space on the host's disk; the end of the sandbox does so, too. Doing it again does nothing."""
        if not self._discarded:
            self._discarded = True
            self._discard()


def find_checkpoint(checkpoint: Checkpoint | None, ours: Iterable[Checkpoint]) -> Checkpoint:
    """Return the checkpoint to go back to: the newest of *ours* if none is named.

    Raises:
      ValueError: if there is none, or it was discarded or is another sandbox's.
      TypeError: if it is something else.

    """
    if checkpoint is None:
        kept = [each for each in ours if not each.discarded]
        if not kept:
            raise ValueError("there is nothing to revert to: call `await sandbox.checkpoint()` first")
        return kept[-1]
    if not isinstance(checkpoint, Checkpoint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`checkpoint` must be what `Sandbox.checkpoint` returned, not {checkpoint!r}")
    if checkpoint.discarded:
        raise ValueError("this checkpoint was discarded")
    if checkpoint not in ours:
        raise ValueError("this checkpoint is another sandbox's")
    return checkpoint


class Life(Protocol[ChildT_co]):
    """What becomes of a sandbox's machine besides requests. `Lifecycle` is one, for a machine of this host."""

    @property
    def slot(self) -> Slot:
        """Where the sandbox's machine is."""
        ...

    @property
    def network(self) -> SandboxNetwork:
        """What the guest may reach."""
        ...

    @property
    def reverts(self) -> int:
        """How often the sandbox went back to a checkpoint."""
        ...

    @property
    def hibernations(self) -> int:
        """How often it fell asleep."""
        ...

    @property
    def hibernated(self) -> bool:
        """Whether it is asleep."""
        ...

    @property
    def checkpoints(self) -> int:
        """How many checkpoints there are to go back to."""
        ...

    @property
    def last_pause(self) -> float | None:
        """Seconds that its guest stood still for the last snapshot."""
        ...

    @property
    def clock_error(self) -> float | None:
        """Seconds that the guest's clock is off at most; None: unknown."""
        ...

    def usage(self) -> Usage:
        """What `Sandbox.usage` does."""
        ...

    async def checkpoint(self) -> Checkpoint:
        """What `Sandbox.checkpoint` does."""
        ...

    async def revert(self, checkpoint: Checkpoint | None) -> None:
        """What `Sandbox.revert` does."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """What `Sandbox.transaction` does."""
        ...

    async def save(self, name: str, *, replace: bool) -> None:
        """What `Sandbox.save` does."""
        ...

    def fork(self, count: int) -> AbstractAsyncContextManager[tuple[ChildT_co, ...]]:
        """What `Sandbox.fork` does."""
        ...

    async def hibernate(self) -> None:
        """What `Sandbox.hibernate` does."""
        ...

    async def resume(self) -> None:
        """What `Sandbox.resume` does."""
        ...
