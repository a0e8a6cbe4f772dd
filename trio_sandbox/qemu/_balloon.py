"""The memory balloon: what a guest gives back to the host, and gets again."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, final

import trio

from .._config import Timeouts
from .._errors import BalloonError, QMPClosedError, QMPCommandError, QMPError
from .._observe import part_logger
from ..constants import BALLOON_INFLATE_TARGET_MIB, BALLOON_SPARE_MIB
from ._qmp import QMPChannel
from ._qmp_codec import QMPEvent

_log = part_logger("balloon")

_MIB: Final = 2**20
#: Where the balloon is among QEMU's objects; see `machine_argv`.
_PATH: Final = "/machine/peripheral/balloon0"
#: Seconds between two of the guest's reports; whole ones only.
_REPORTS: Final = 1
#: The class of QEMU's error where a machine has no balloon.
_NO_BALLOON: Final = "DeviceNotActive"


@final
class BalloonClient:
    """Moves the balloon of one machine; sizes are in MiB and count what the guest *has*.

    So inflating the balloon makes the size smaller, as in QEMU's own commands.

    Args:
      channel: The machine's QMP channel.
      timeouts: `Timeouts.balloon` bounds the guest's following, `qmp_command` each command.
      shared_memory: True for a machine whose RAM is a private mapping of a file that others map
        as well. Its balloon must not move: what the guest gives back is discarded by punching
        holes into that file, under everyone.

    """

    def __init__(self, channel: QMPChannel, *, timeouts: Timeouts | None = None, shared_memory: bool = False) -> None:
        self._channel = channel
        self._timeouts = Timeouts() if timeouts is None else timeouts
        self._shared_memory = shared_memory
        self._memory_mib: int | None = None
        self._moving = False

    async def query(self) -> int | None:
        """Give the size that the guest has now, in MiB; None if the machine has no balloon.

        Raises:
          BalloonError: if QEMU can't tell, or not within `Timeouts.qmp_command`.
          QMPClosedError: if the machine is gone.

        Source: QMP ``query-balloon`` (QEMU's qapi/machine.json).

        """
        status = None
        try:
            status = await self._execute("query-balloon")
        except BalloonError as exc:
            if not (isinstance(exc.__cause__, QMPCommandError) and exc.__cause__.error_class == _NO_BALLOON):
                raise
        return None if status is None else _mib(status["actual"])  # noqa: ASYNC910 # `_execute` is a checkpoint

    async def set_target(self, mib: int) -> None:
        """Ask the guest to have *mib* MiB, and don't wait for it.

        Cancelled, the target may have been set.

        Raises:
          ValueError: if *mib* is less than 1 or more than the machine's memory.
          BalloonError: if there is no balloon, or it must not be moved.
          QMPClosedError: if the machine is gone.

        Source: QMP ``balloon`` (QEMU's qapi/machine.json).

        """
        await self._check_target(mib)
        await self._execute("balloon", {"value": mib * _MIB})

    async def wait_actual(self, mib: int, *, tolerance_mib: int = 1) -> int:
        """Block until the guest has *mib* MiB, give or take *tolerance_mib*; return what it has.

        Follows QEMU's events; QEMU sends at most one a second. Cancelling leaves the target in force.

        Raises:
          BalloonError: if the guest does not get there within `Timeouts.balloon` (then
            `trio.TooSlowError` is the cause), or there is no balloon.
          QMPClosedError: if the machine is gone.

        Source: QMP ``BALLOON_CHANGE`` (QEMU's qapi/machine.json).

        """
        # Subscribed before the query, so that no change can be missed between the two.
        with self._channel.subscribe("BALLOON_CHANGE") as events:
            return await self._follow(events, mib, tolerance_mib)

    async def inflate(self, mib: int = BALLOON_INFLATE_TARGET_MIB, *, tolerance_mib: int = 1) -> int:
        """Shrink the guest to *mib* MiB, and wait for it; return what it had before, for `deflate`.

        A guest that has no more than that already is left alone. A guest that does not follow
        gets its old target again, and so does one whose caller is cancelled.

        Raises:
          ValueError: if *mib* is less than 1 or more than the machine's memory.
          BalloonError: if the guest does not follow within `Timeouts.balloon` (then
            `trio.TooSlowError` is the cause), or if there is no balloon, or it must not be moved.
          QMPClosedError: if the machine is gone.
          trio.BusyResourceError: if another task is moving this balloon.

        """
        with self._one_mover():
            await self._check_target(mib)
            previous = await self._require_size()
            if previous > mib:
                await self._move(previous, mib, tolerance_mib)
            return previous

    async def deflate(self, mib: int, *, tolerance_mib: int = 1) -> None:
        """Let the guest have *mib* MiB again, and wait for it.

        A guest that has as much already is left alone. Failing and cancelling are as for `inflate`.

        Raises:
          ValueError, BalloonError, QMPClosedError, trio.BusyResourceError: as `inflate`.

        """
        with self._one_mover():
            await self._check_target(mib)
            previous = await self._require_size()
            if previous < mib:
                await self._move(previous, mib, tolerance_mib)

    async def query_available(self) -> int | None:
        """Give the MiB that the guest says it has for whoever wants them, caches included; None if it does not say so.

        The guest is asked for a report, which takes a second or two. It is the guest's word: nothing else speaks for it.

        Raises:
          BalloonError: if there is no balloon, or no report within `Timeouts.balloon` (then `trio.TooSlowError` is the cause).
          QMPClosedError: if the machine is gone.

        Source: QEMU's docs/interop/virtio-balloon-stats.rst.

        """
        polling = {"path": _PATH, "property": "guest-stats-polling-interval"}
        await self._execute("qom-set", {**polling, "value": _REPORTS})
        try:
            before = (await self._statistics())["last-update"]
            with trio.fail_after(self._timeouts.balloon):
                while True:
                    await trio.sleep(_REPORTS / 4)
                    report = await self._statistics()
                    if report["last-update"] != before:
                        break
        except trio.TooSlowError as exc:
            raise BalloonError(f"the guest did not report within {self._timeouts.balloon:g} s") from exc
        finally:
            with trio.move_on_after(self._timeouts.qmp_command, shield=True):  # noqa: ASYNC912 # `execute` is a checkpoint
                with suppress(QMPError):
                    await self._channel.execute("qom-set", {**polling, "value": 0})
        available = report["stats"].get("stat-available-memory", -1)
        # QEMU's word for "not told" is the largest number there is.
        return _mib(available) if isinstance(available, int) and 0 <= available < 2**63 else None

    async def _statistics(self) -> Any:
        return await self._execute("qom-get", {"path": _PATH, "property": "guest-stats"})

    async def reclaim(self, *, spare_mib: int = BALLOON_SPARE_MIB) -> int:
        """Have the guest give back what it does not need, and let it have it again; return how many MiB that was.

        The host does not hold what the guest has got back until the guest writes to it: caches are gone, and free memory
        is what it was. Takes some seconds. Failing and cancelling are as for `inflate`.

        Args:
          spare_mib: What the guest keeps, in MiB, of what is available in it.

        Raises:
          BalloonError, QMPClosedError, trio.BusyResourceError: as `inflate` and `query_available`.

        """
        available = await self.query_available()
        full = await self._require_size()
        given = min(available or 0, full - 1) - spare_mib
        if given <= 0:
            return 0
        await self.inflate(full - given)
        # Whatever comes now: until then the guest has too little.
        with trio.CancelScope(shield=True):
            await self.set_target(full)
        await self.wait_actual(full)
        return given

    async def _move(self, previous: int, mib: int, tolerance_mib: int) -> None:
        with self._channel.subscribe("BALLOON_CHANGE") as events:
            try:
                await self._execute("balloon", {"value": mib * _MIB})
                await self._follow(events, mib, tolerance_mib)
            except QMPClosedError:
                raise  # Nobody is there to be told.
            except BaseException as exc:
                with trio.move_on_after(self._timeouts.process_exit, shield=True):  # noqa: ASYNC912 # `execute` is one
                    try:
                        await self._channel.execute("balloon", {"value": previous * _MIB})
                        exc.add_note(f"the balloon's target was put back to {previous} MiB")
                    except QMPError:
                        _log.warning("the balloon's target could not be put back to %d MiB", previous, exc_info=True)
                raise

    async def _follow(self, events: trio.MemoryReceiveChannel[QMPEvent], mib: int, tolerance_mib: int) -> int:
        actual = None
        try:
            with trio.fail_after(self._timeouts.balloon):
                actual = await self._require_size()
                while abs(actual - mib) > tolerance_mib:
                    try:
                        actual = _mib((await events.receive()).data["actual"])
                    except trio.EndOfChannel:
                        # The machine is gone; asking it raises the error that says so.
                        actual = await self._require_size()
                return actual
        except trio.TooSlowError as exc:
            raise BalloonError(
                f"the guest has {actual} MiB and not {mib} MiB after {self._timeouts.balloon:g} s"
            ) from exc

    async def _require_size(self) -> int:
        size = await self.query()
        if size is None:
            raise BalloonError("the machine has no balloon device")
        return size

    async def _check_target(self, mib: int) -> None:
        if not isinstance(mib, int) or isinstance(mib, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the size must be a number of MiB, not {mib!r}")
        if mib < 1:
            raise ValueError(f"the size must be at least 1 MiB, not {mib}")
        if self._shared_memory:
            raise BalloonError("the machine's memory is shared with others; its balloon must not be moved")
        if self._memory_mib is None:
            summary = await self._execute("query-memory-size-summary")
            self._memory_mib = _mib(summary["base-memory"] + summary.get("plugged-memory", 0))
        else:
            await trio.lowlevel.checkpoint()
        if mib > self._memory_mib:
            raise ValueError(f"the size must be at most {self._memory_mib} MiB, the machine's memory, not {mib}")

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        try:
            with trio.fail_after(self._timeouts.qmp_command):
                return await self._channel.execute(command, arguments)
        except trio.TooSlowError as exc:
            raise BalloonError(f"QEMU did not answer {command} within {self._timeouts.qmp_command:g} s") from exc
        except QMPCommandError as exc:
            raise BalloonError(str(exc)) from exc

    @contextmanager
    def _one_mover(self) -> Generator[None]:
        if self._moving:
            raise trio.BusyResourceError("another task is moving this balloon")
        self._moving = True
        try:
            yield
        finally:
            self._moving = False


def _mib(size: int) -> int:
    return round(size / _MIB)
