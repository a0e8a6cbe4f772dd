"""Where images are kept unless the user says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_directory() -> Path:
    """Return ``trio-sandbox`` in the user's cache directory; it need not exist.

    Raises:
      RuntimeError: if neither ``XDG_CACHE_HOME`` nor the user's home directory is known.

    Source: the XDG Base Directory Specification, which says to ignore a relative path.

    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "trio-sandbox"
