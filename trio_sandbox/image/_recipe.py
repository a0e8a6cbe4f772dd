"""What the store needs to know about anything that it can build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import attrs

#: Raise it when the builders change in a way that no recipe shows: every store then builds anew.
BUILDER_VERSION = 1


@attrs.frozen(kw_only=True)
class BuildContext:
    """What a build works with."""

    staging: Path
    """An empty directory, removed afterwards; the files to be stored are left in its `output`."""
    report: Callable[[str, float | None], object]
    """Told what is happening, and how much of all is done, from 0 to 1."""
    environment: Mapping[str, str]
    """Goes into the environment of every child process."""

    @property
    def output(self) -> Path:
        """The directory of the files to be stored."""
        return self.staging / "output"


class Recipe(Protocol):
    """How to build one thing; a value, so that equal recipes have equal digests."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that a build leaves in `BuildContext.output`."""
        ...

    def digest(self) -> str:
        """Return a digest of everything that decides what is built."""
        ...

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the files; return what there is to say about them, as JSON values.

        Raises:
          ImageBuildError: if it can't be built.
        """
        ...


def digest_of(value: object) -> str:
    """Return a digest of a JSON value and of the builder's version."""
    text = json.dumps({"builder": BUILDER_VERSION, "value": value}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
