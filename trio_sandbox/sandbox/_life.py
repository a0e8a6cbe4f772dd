"""What a sandbox needs of whoever cares for its machine, on this machine or on another."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from ._checkpoints import Checkpoint
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
