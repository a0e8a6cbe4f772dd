"""What programs that were killed have left in the cache: images and states that were being made, each as large as a disk or a guest's RAM."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

import trio

from .._observe import part_logger
from ..image import ImageStore
from ._named import NamedTemplateStore
from ._templates import TemplateStore

_log = part_logger("templates")


async def remove_leftovers(
    images: ImageStore, templates: TemplateStore | None, named: NamedTemplateStore, environment: Mapping[str, str]
) -> None:
    """Remove them, and say so in the log. What somebody is making has a lock, and stays; so does what is not ours.

    What can't be removed is no reason to do without a host: it is told, and tried again by the next one.
    """
    await trio.lowlevel.checkpoint()
    try:
        freed = await images.remove_leftovers(environment)
        freed += await trio.to_thread.run_sync(_remove_states, templates, named)
    except OSError as exc:
        # In a cache that is read-only here it is the affair of those who can write there, and who may be at work.
        level = logging.INFO if exc.errno == errno.EROFS else logging.WARNING
        _log.log(level, "what a dead program left in the cache can't be removed: %s", exc)
    else:
        if freed:
            _log.warning("removed %d MiB that a dead program left in the cache", freed // 2**20)


def _remove_states(templates: TemplateStore | None, named: NamedTemplateStore) -> int:
    return named.prune() + (0 if templates is None else templates.remove_leftovers())
