"""Who stands on an image, or on a layer of one, beyond the store of images: templates, and sandboxes that a user has saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import final

from ..constants import DEFAULT_TEMPLATE_BUDGET_MIB
from ..image import entry_name
from ._named import NamedTemplateStore
from ._templates import TemplateStore


@final
class Dependents:
    """Finds them in the cache that they share with the images. Its methods read small files; making the object reads none.

    Args:
      cache_dir: That cache.

    """

    def __init__(self, cache_dir: Path) -> None:
        self._templates = TemplateStore(cache_dir, budget_mib=DEFAULT_TEMPLATE_BUDGET_MIB)
        self._named = NamedTemplateStore(cache_dir)

    def templates_on(self, entry: Path) -> Sequence[str]:
        """Return the keys of the templates whose disk stands on the entry in that directory itself, and not on a layer above."""
        return sorted(key for key, disk in self._templates.disks_below().items() if _is_same(disk.parent, entry))

    def saved_on(self, entry: Path) -> Sequence[str]:
        """Return the names of the saved sandboxes that stand on it in the same way."""
        return sorted(
            name
            for name, (image, digest) in self._named.images_below().items()
            if entry_name(image, digest) == entry.name
        )

    def any_on(self, entry: Path) -> bool:
        """Tell whether there are any."""
        return bool(self.saved_on(entry) or self.templates_on(entry))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
