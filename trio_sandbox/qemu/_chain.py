"""The layers under a machine's disk, of which each snapshot adds one: made few again while the machine runs.

What the layers have is copied into the overlay that the machine writes to (QEMU's `block-stream`), which can then do without
them. The layers themselves are only read: a snapshot that stands on them, or another machine, has links to them of its own.

Source: ``block-core.json`` and ``job.json`` of QEMU's ``qapi``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, final

import trio

from .._errors import QMPCommandError, QMPError
from .._observe import part_logger
from ._machine import DiskNode
from ._qmp import QMPChannel
from ._qmp_codec import QMPEvent

_log = part_logger("snapshot")

#: With so many layers under its disk a machine's next snapshot begins with making them one. Each costs QEMU some memory and
#: each read of what is in none of them a look, and each takes what the guest has overwritten since of the host's disk.
MOST_LAYERS: Final = 16
_EVENTS: Final = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


@final
class Merging:
    """One copying of layers into the overlay above them.

    Args:
      qmp: The machine's.
      overlay: What it writes to.
      layers: The layers under that, the lowest first. That one stays: as a rule it is a template's, which all machines of
        that have in common.
      patience: Seconds for QEMU to answer a command, or to copy anything at all.

    """

    def __init__(self, qmp: QMPChannel, overlay: DiskNode, layers: Sequence[DiskNode], *, patience: float) -> None:
        self.done: bool = False
        """Whether the overlay stands on the lowest layer now. That may be so also if `run` was cancelled, or failed."""
        self._qmp = qmp
        self._overlay = overlay
        self._layers = layers
        self._patience = patience
        self._job = f"merge-{secrets.token_hex(4)}"

    async def run(self) -> None:
        """Copy. Cancelled or failed, it ends the copying; what was copied does no harm.

        Raises:
          QMPCommandError: if QEMU can't do it.
          trio.TooSlowError: if it does not go on.
          QMPError: if QEMU is gone.

        """
        with self._qmp.subscribe(*_EVENTS) as events:
            ended = False
            try:
                await self._execute(
                    "block-stream",
                    {
                        "job-id": self._job,
                        "device": self._overlay.name,
                        "base-node": self._layers[0].name,
                        # What goes into the header, where nobody reads it. The base's own name could be too long for that.
                        "backing-file": "base",
                    },
                )
                await self._follow(events)
                ended = True
            finally:
                with trio.move_on_after(2 * self._patience, shield=True):  # noqa: ASYNC912 - each command is one
                    if not ended:
                        await self._cancel(events)
                    if self.done:
                        await self._forget_layers()

    async def _follow(self, events: trio.MemoryReceiveChannel[QMPEvent]) -> None:
        copied: object = -1
        while True:
            with trio.move_on_after(self._patience):
                await self._wait_ended(events)
                return
            jobs = await self._execute("query-block-jobs")
            now = next((job["offset"] for job in jobs if job["device"] == self._job), copied)
            if now == copied:
                raise trio.TooSlowError(f"nothing was copied for {self._patience:g} s")
            copied = now

    async def _wait_ended(self, events: trio.MemoryReceiveChannel[QMPEvent]) -> None:
        async for event in events:
            if event.data.get("device") == self._job:
                if "error" in event.data:
                    raise QMPCommandError("block-stream", "GenericError", str(event.data["error"]))
                self.done = event.name == "BLOCK_JOB_COMPLETED"
                return
        await self._execute("query-status")  # the connection is lost, and this says why

    async def _cancel(  # noqa: ASYNC910 - each command is a checkpoint
        self, events: trio.MemoryReceiveChannel[QMPEvent]
    ) -> None:
        with suppress(QMPError, trio.TooSlowError):  # it may have ended, or not have begun
            await self._execute("block-job-cancel", {"device": self._job, "force": True})
            await self._wait_ended(events)

    async def _forget_layers(self) -> None:  # noqa: ASYNC910 - as above
        """Have QEMU close what it does not need any more."""
        for layer in reversed(self._layers[1:]):
            # The machine's first nodes have names for their files, too.
            commands: list[tuple[str, dict[str, object]]] = [
                ("blockdev-del", {"node-name": layer.name}),
                ("blockdev-del", {"node-name": f"{layer.name}-file"}),
                ("remove-fd", {"fdset-id": layer.fdset}),
            ]
            for command, arguments in commands:
                try:
                    await self._execute(command, arguments)
                except QMPCommandError as exc:
                    _log.debug("%s", exc)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        with trio.fail_after(self._patience):
            return await self._qmp.execute(command, arguments)
