"""The checkpoints of a sandbox, wherever what they keep is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, final

#: What a checkpoint keeps: a snapshot, or the number by which a node knows it.
Kept = TypeVar("Kept")


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


@final
class Checkpoints(Generic[Kept]):
    """The checkpoints of one sandbox, in the order in which they were made."""

    def __init__(self) -> None:
        self._kept: dict[Checkpoint, Kept] = {}

    def __len__(self) -> int:
        return sum(not checkpoint.discarded for checkpoint in self._kept)

    def add(self, kept: Kept, discard: Callable[[], object]) -> Checkpoint:
        """Return a new checkpoint, whose end is *discard*; those that were discarded are forgotten."""
        checkpoint = Checkpoint(discard)
        self._kept = {each: known for each, known in self._kept.items() if not each.discarded}
        self._kept[checkpoint] = kept
        return checkpoint

    def find(self, checkpoint: Checkpoint | None) -> Kept:
        """Return what is kept by the checkpoint to go back to: the newest if none is named.

        Raises:
          ValueError: if there is none, or it was discarded or is another sandbox's.
          TypeError: if it is something else.

        """
        if checkpoint is None:
            kept = [known for each, known in self._kept.items() if not each.discarded]
            if not kept:
                raise ValueError("there is nothing to revert to: call `await sandbox.checkpoint()` first")
            return kept[-1]
        if not isinstance(checkpoint, Checkpoint):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`checkpoint` must be what `Sandbox.checkpoint` returned, not {checkpoint!r}")
        if checkpoint.discarded:
            raise ValueError(
                "this checkpoint was discarded; revert to another, or make one with `await sandbox.checkpoint()`"
            )
        if checkpoint not in self._kept:
            raise ValueError("this checkpoint is another sandbox's; revert to one that this sandbox has made")
        return self._kept[checkpoint]

    def discard_all(self) -> None:
        """Discard all of them."""
        for checkpoint in self._kept:
            checkpoint.discard()
