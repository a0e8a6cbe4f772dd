"""Undoing all that happens in a sandbox in a block that raises: `Sandbox.transaction`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio

from .._errors import SandboxError
from .._observe import part_logger
from ._checkpoints import Checkpoint
from ._life import Life
from ._observed import operation

_log = part_logger("sandbox")


@asynccontextmanager
async def transaction(life: Life[Any], patience: float) -> AsyncGenerator[None]:
    """What `Sandbox.transaction` does; going back is given up after *patience* seconds."""
    with operation("checkpoint", life.slot.id):
        checkpoint = await life.checkpoint()
    try:
        try:
            yield
        except BaseException:
            with operation("revert", life.slot.id), trio.move_on_after(patience, shield=True):
                await _go_back(life, checkpoint)
            raise
    finally:
        checkpoint.discard()


async def _go_back(life: Life[Any], checkpoint: Checkpoint) -> None:
    reverted = False
    try:
        await life.revert(checkpoint)
        reverted = True
    except SandboxError as exc:
        _log.warning("a transaction could not be reverted: %s", exc)
    finally:
        if not reverted:
            # Whoever goes on must not take the state for the one before.
            life.slot.machine.retire("a transaction in it failed, and it could not be reverted")
    await trio.lowlevel.checkpoint()
