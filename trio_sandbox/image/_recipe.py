"""What the store needs to know about anything that it can build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import attrs

#: Raise it when the builders, or what a manifest means, change in a way that no recipe shows: every store then builds anew. It is in
#: every digest, so that versions of the library which differ in it share a store, each with entries of its own.
BUILDER_VERSION = 1


@attrs.frozen(kw_only=True)
class BuildContext:
    """What a build works with."""

    staging: Path
    """A directory for it alone, removed afterwards."""
    base: Path | None
    """The files of `Recipe.base`, to be read only."""
    report: Callable[[str, float | None], object]
    """Told what is happening, and how much of all is done, from 0 to 1, where that is known."""
    environment: Mapping[str, str]
    """Goes into the environment of every child process."""

    @property
    def output(self) -> Path:
        """The directory for the files to be stored; it exists."""
        return self.staging / "output"


class Recipe(Protocol):
    """How to build one thing; a value, so that equal recipes have equal digests."""

    @property
    def name(self) -> str:
        """What users call it; part of a file name."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that a build leaves in `BuildContext.output`."""
        ...

    @property
    def base(self) -> Recipe | None:
        """What has to be in the store before this can be built."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that it has an interpreter of, the main one first."""
        ...

    def digest(self) -> str:
        """Return a digest of everything that decides what is built. May read files: call it in a thread."""
        ...

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the files; return what there is to say about them, as JSON values.

        Cancelled, it ends its child processes; what it made is removed by the caller.

        Raises:
          ImageBuildError: if it can't be built.
          MissingProgramError: if a program is not installed.
          OSError: if a file can't be read or written.
        """
        ...


def digest_of(*values: object) -> str:
    """Return a digest of JSON values and of the builder's version."""
    text = json.dumps([BUILDER_VERSION, *values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class StandsAlone:
    """What most recipes have in common that need nothing of the store: what they say of languages comes with the build, if at all."""

    __slots__ = ()

    @property
    def base(self) -> None:
        """Nothing."""
        return

    @property
    def languages(self) -> tuple[str, ...]:
        """None."""
        return ()
