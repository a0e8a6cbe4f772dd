"""What programs that were killed have left in the cache: states that were being made or saved, each as large as a guest's RAM."""

from __future__ import annotations

import logging

from ._named import NamedTemplateStore
from ._templates import TemplateStore

_log = logging.getLogger("trio_sandbox.machines")


def remove_leftovers(templates: TemplateStore | None, named: NamedTemplateStore) -> None:
    """Remove them. What somebody is making has a lock, and stays; so does what can't be removed, and what is not ours."""
    try:
        freed = named.prune() + (0 if templates is None else templates.remove_leftovers())
    except OSError as exc:
        _log.warning("what a dead program left in the cache can't be removed: %s", exc)
    else:
        if freed:
            _log.warning("removed %d MiB that a dead program left in the cache", freed // 2**20)
