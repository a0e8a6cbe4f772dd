"""What happens to one path when a directory is brought back from a guest."""

from __future__ import annotations

from typing import Literal, final

import attrs

from ._metadata import mark_public
from ._quote import quote_guest

ChangeKind = Literal["added", "changed", "removed"]


@final
@attrs.frozen
class WorkspaceChange:
    """One thing that `Sandbox.pull` does, or would do if it could."""

    path: str
    """Relative to the directory."""
    kind: ChangeKind
    """What happens to the path on the host."""
    conflict: str = ""
    """Why that can't be done, or not without losing something; "" where nothing is against it."""

    def __str__(self) -> str:
        # The guest has chosen the name.
        return f"{self.kind} {quote_guest(self.path)}" + (f": {self.conflict}" if self.conflict else "")


mark_public(__name__, globals())
