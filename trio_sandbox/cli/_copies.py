"""What ``trio-sandbox run`` copies: files and directories of ours, and of the guest's."""

from __future__ import annotations

import posixpath
from pathlib import Path

import attrs


@attrs.frozen
class Upload:
    """A file or directory of ours, and what to call it in the guest; relative: to the working directory."""

    local: Path
    remote: str


@attrs.frozen
class Download:
    """A file or directory of the guest's, relative to the working directory, and what to call it here."""

    remote: str
    local: Path
    """Where it goes, under its own name where that is a directory which is there."""

    def resolve(self) -> Download:
        """Give it its name here, as long as nothing was started.

        Raises:
          OSError: if there is no directory to put it in.
        """
        local = self.local
        if local.is_dir():
            local /= posixpath.basename(posixpath.normpath(self.remote))
        if not local.parent.is_dir():
            raise NotADirectoryError(f"there is no directory {str(local.parent)!r} to download to")
        return Download(self.remote, local)
