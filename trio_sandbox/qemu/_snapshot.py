"""A snapshot: the state of a machine at one moment, to restore others from, while the machine itself continues.

While the agent holds still and QEMU has the machine stopped, the devices' state is written to a file, what the RAM's
file does not have is added to a copy of that which was made before, and the disk gets a new overlay: the one before
is written to by nobody any more, and is a layer under this machine's disk and under those of all machines restored from it.

Where the kernel does not let us read QEMU's memory, the RAM is in one stream with the devices' state, which each
machine restored from it has to read.

Sources: ``migration.json`` and ``block-core.json`` of QEMU's ``qapi``. `xen-save-devices-state` has nothing to do
with Xen but that it was the first to want the state without the RAM.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import attrs
import trio

from .._errors import QMPCommandError, QMPError, SnapshotError
from .._observe import part_logger
from .._quote import quote_guest
from ..wire import Channel, ChannelStream, StreamResetError, receive_all, receive_up_to
from ._machine import WRITABLE, DiskNode, MachineConfig, added_overlay, lock_disk
from ._migration import save_with_memory
from ._qmp import QMPChannel
from ._ram import FROZEN_MODE, PrivateRam, copy_data
from ._read_only_view import ReadOnlyView

_log = part_logger("snapshot")

#: RAMs that are copied at a time.
_COPIES: Final = 2
_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("copying")

#: Bytes of free room with which a disk is full for us: more than the devices' state takes.
_FULL: Final = 2**20

#: What the agent says when it holds still; see `trio_sandbox.guest.agent.snapshot`.
_FROZEN: Final = b"frozen"
_MEMORY, _DEVICES, _MOUNTS = "memory", "devices", "mounts"


@final
@attrs.frozen
class SavedState:
    """Where a machine's state was saved, but for what its config has: the RAM's file and the frozen disks."""

    devices: Path
    """The file that `Vm.save` or `Vm.snapshot` wrote."""
    marker: bytes = attrs.field(repr=False)
    """What the agent was told to wait for; see `wire.PortStream.skip_past`."""
    with_memory: bool = False
    """The RAM is in `devices`, too."""


@final
@attrs.frozen
class Snapshot:
    """The state of a machine at one moment, from which any number of others can go on, now and later.

    All its files are in one directory of its own; `discard` removes them.
    """

    directory: Path
    """Where its files are."""
    config: MachineConfig
    """The machine. Each restored from here needs an overlay of its own, over the last of the layers, and a copy of
    the RAM's file of its own where that is `memory_shared`."""
    saved: SavedState
    """Its state."""
    pause: float
    """Seconds that the machine stood still for it."""
    memory_time: int | None = None
    """When the RAM's file was written to last, in nanoseconds; None: nobody knows."""

    def check_memory(self) -> None:
        """Make sure that nobody has written to the RAM's file since.

        QEMU can't; who may write to the directory can.

        Raises:
          SnapshotError: if somebody has.
          OSError: if it is gone.

        """
        if self.memory_time is None or self.config.memory_file is None:
            return
        if os.stat(self.config.memory_file).st_mtime_ns != self.memory_time:
            raise SnapshotError(
                "the memory that was saved has been written to since, and nothing starts from it: a retry does not help; "
                "open another sandbox"
            )

    def discard(self) -> None:
        """Remove its files. Machines that were restored from it have links to its layers, and are not disturbed."""
        shutil.rmtree(self.directory, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """Give a file that never changes any more a second name, which keeps it there; a copy where that can't be.

    Raises:
      OSError: if there is no such file, or no room for a copy.

    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def copy_memory(source: Path, target: Path) -> None:
    """Copy a RAM's file, for a machine that is to have one of its own. Run it in a thread of Trio's; errors as `copy_data`."""
    with open(source, "rb") as old, open(target, "xb") as new:
        os.ftruncate(new.fileno(), os.fstat(old.fileno()).st_size)
        # QEMU, which runs as another user, opens it anew. Nobody else gets at it, by its directory.
        os.fchmod(new.fileno(), 0o666)
        copy_data(old.fileno(), new.fileno())


@asynccontextmanager
async def hold_still(guest: Channel, marker: bytes, patience: float) -> AsyncGenerator[None]:
    """Have the agent hold still for a block, and say nothing to it meanwhile; it goes on after it, however it is left.

    Args:
      guest: The channel to it.
      marker: What its machine's copies will be called by.
      patience: Seconds that it has for getting ready, and again for going on.

    Raises:
      SnapshotError: if it does not get ready, or gives up.
      trio.TooSlowError: if it does not go on.
      WireError: if it says what no agent of ours says.
      trio.BrokenResourceError, trio.ClosedResourceError, StreamLimitError: as streams do.

    """
    token = secrets.token_bytes(16)
    header = {"service": "snapshot", "marker": marker.hex(), "token": token.hex()}
    with closing(guest.open_stream(header)) as stream:
        ready = False
        try:
            async with AsyncExitStack() as silence:
                with trio.move_on_after(patience) as waiting:
                    await _wait_frozen(stream)
                    ready = True
                    await silence.enter_async_context(guest.hold_writes())
                if waiting.cancelled_caught:
                    raise SnapshotError(f"the guest did not get ready to be saved within {patience:g} s")
                yield
        finally:
            # In any case: it may be just about to hold still for what is not wanted any more.
            with trio.fail_after(patience, shield=True):
                try:
                    await stream.send_all(token)
                    if ready:
                        await receive_all(stream, 0)
                except StreamResetError as exc:
                    # Before it was ready it has said no, which is on its way to the caller.
                    if ready:
                        raise SnapshotError(
                            f"the guest gave up while its state was saved: {quote_guest(exc.reason)}"
                        ) from exc


async def _wait_frozen(stream: ChannelStream) -> None:
    try:
        answer = await receive_up_to(stream, len(_FROZEN))
    except StreamResetError as exc:
        raise SnapshotError(f"the guest can't be saved: {quote_guest(exc.reason)}") from exc
    if answer != _FROZEN:
        raise SnapshotError(f"the guest did not get ready to be saved, but said {answer!r:.80}")


def note_full_disk(directory: Path) -> str:
    """Return what to add to QEMU's "An IO error has occurred" where the disk of *directory* is full; else ""."""
    with suppress(OSError):
        status = os.statvfs(directory)
        if status.f_bavail * status.f_frsize < _FULL:
            return f"; the disk of {directory} is full"
    return ""


class MonitorLostError(Exception):
    """QEMU did not answer, and nobody knows what it has done; or it does not let the machine go on."""


@final
class Taking:
    """One snapshot, from its files to the machine's going on. A context manager: its descriptors are closed with the block.

    Args:
      qmp: The machine's.
      config: The machine.
      node: Its overlay, as QEMU knows it.
      overlay: What it is to write to from now on: a new and empty qcow2 file of the size of its disk.
      directory: An empty directory for the snapshot's files.
      files: Where QEMU gets what it may only read.
      marker: What the agent is told to wait for.
      patience: Seconds for QEMU to answer one command.

    """

    def __init__(
        self,
        qmp: QMPChannel,
        config: MachineConfig,
        node: DiskNode,
        *,
        overlay: Path,
        directory: Path,
        files: ReadOnlyView,
        marker: bytes,
        patience: float,
    ) -> None:
        self.config: MachineConfig = config
        """The machine as it is now: with the new overlay once that is in its place."""
        self.node: DiskNode = node
        """Its overlay as it is now."""
        self.lost: MonitorLostError | None = None
        """Why QEMU is not asked for anything more."""
        self._qmp = qmp
        self._overlay = overlay
        self._directory = directory
        self._files = files
        self._marker = marker
        self._patience = patience
        self._stack = ExitStack()
        self._layers: tuple[Path, ...] = ()
        self._devices = self._new_overlay = self._frozen_overlay = self._memory = -1
        self._copy_ram: Callable[[], object] | None = None

    def __enter__(self) -> Taking:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def prepare(self, pid: int, memory: int) -> None:
        """Make the files, and do what can be done while the machine runs. Cancelled: files are left.

        Args:
          pid: QEMU's process id.
          memory: A descriptor of the RAM's file.

        Raises:
          OSError: if there is no room for them.

        """
        layers = (*self.config.layers, self.config.overlay)
        self._layers = tuple(self._directory / f"layer{number}.qcow2" for number in range(len(layers)))
        for layer, link in zip(layers, self._layers, strict=True):
            link_file(layer, link)
        if self.config.mounts is not None:
            link_file(self.config.mounts, self._directory / _MOUNTS)
        self._devices = self._open(self._directory / _DEVICES, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.fchmod(self._devices, 0o600)
        self._new_overlay = self._open(self._overlay, os.O_RDWR)
        lock_disk(self._new_overlay)
        self._frozen_overlay = self._files.open(self._overlay)
        self._stack.callback(os.close, self._frozen_overlay)
        if self.config.memory_file is None or self.config.memory_shared:
            self._memory = self._make_memory()
            # It changes for as long as the machine runs.
            self._copy_ram = partial(copy_data, memory, self._memory)
            await trio.lowlevel.checkpoint()
            return
        try:
            ram = self._stack.enter_context(PrivateRam(pid, memory))
        except (OSError, ValueError) as exc:
            _log.info("QEMU's memory can't be read, and snapshots take longer: %s", exc)
            await trio.lowlevel.checkpoint()
        else:
            self._memory = self._make_memory()
            self._copy_ram = partial(ram.copy, self._memory)
            await trio.to_thread.run_sync(copy_data, memory, self._memory, limiter=_copying())

    def _open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
        self._stack.callback(os.close, fd)
        return fd

    def _make_memory(self) -> int:
        fd = self._open(self._directory / _MEMORY, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(fd, self.config.memory_mib * 2**20)
        os.fchmod(fd, FROZEN_MODE)
        return fd

    async def take(self) -> Snapshot:
        """Save the state, while the agent holds still. Shield it: cancelled in the middle, the machine stands still for ever.

        Raises:
          QMPCommandError, MigrationError, OSError: if the state can't be saved; the machine goes on.
          MonitorLostError: if QEMU does not answer, or refuses to let the machine go on.

        """
        config, before = self.config, self.node
        state, disk = (1 << 30 | secrets.randbits(30) for _ in range(2))
        devices, overlay = f"/dev/fdset/{state}", f"/dev/fdset/{disk}"
        node = DiskNode(f"overlay-{secrets.token_hex(4)}", disk)
        try:
            await self._execute("add-fd", {"fdset-id": state}, [self._devices])
            await self._execute("add-fd", {"fdset-id": disk, "opaque": WRITABLE}, [self._new_overlay])
            await self._execute("add-fd", {"fdset-id": disk}, [self._frozen_overlay])
            await self._execute("blockdev-add", added_overlay(node.name, overlay))
            begin = trio.current_time()
            try:
                await self._execute("stop")  # Ctrl-C may come here: it has been said then
                if self._copy_ram is not None:
                    await self._execute("xen-save-devices-state", {"filename": devices, "live": False})
                    await trio.to_thread.run_sync(self._copy_ram, limiter=_copying())
                    await self._change_overlay(node)
                else:
                    # It can't be changed afterwards: then QEMU has given the disks up, until the machine goes on.
                    await self._change_overlay(node)
                    await self._save_with_memory()
            finally:
                if self.lost is None:
                    await self._go_on()  # noqa: ASYNC102 - the caller shields us, and each command is bounded
            pause = trio.current_time() - begin
        finally:
            undo: list[tuple[str, dict[str, object]]] = [("remove-fd", {"fdset-id": state})]
            if self.node is before:
                undo = [("blockdev-del", {"node-name": node.name}), *undo, ("remove-fd", {"fdset-id": disk})]
            for command, arguments in undo if self.lost is None else ():
                with suppress(QMPCommandError):  # it may not be there yet
                    await self._execute(command, arguments)  # noqa: ASYNC102 - as above
            if self.node is not before and self.lost is None:
                await self._forget_writable(before)  # noqa: ASYNC102 - as above
        memory = None if self._memory < 0 else self._directory / _MEMORY
        return Snapshot(
            self._directory,
            attrs.evolve(
                config,
                layers=self._layers,
                mounts=None if config.mounts is None else self._directory / _MOUNTS,
                memory_file=memory,
                memory_shared=config.balloon,
            ),
            SavedState(self._directory / _DEVICES, self._marker, with_memory=memory is None),
            pause,
            None if memory is None else os.fstat(self._memory).st_mtime_ns,
        )

    async def _go_on(self) -> None:
        try:
            await self._execute("cont")
        except QMPCommandError as exc:
            self.lost = MonitorLostError(str(exc))
            raise self.lost from exc

    async def _forget_writable(self, frozen: DiskNode) -> None:
        """Have QEMU close the last descriptor by which it could write to what others stand on from now on."""
        for fdset in await self._execute("query-fdsets"):
            if fdset["fdset-id"] == frozen.fdset:
                for fd in fdset["fds"]:
                    if fd.get("opaque") == WRITABLE:
                        await self._execute("remove-fd", {"fdset-id": frozen.fdset, "fd": fd["fd"]})

    async def _change_overlay(self, node: DiskNode) -> None:
        await self._execute("blockdev-snapshot", {"node": self.node.name, "overlay": node.name})
        self.node = node
        self.config = attrs.evolve(
            self.config, layers=(*self.config.layers, self.config.overlay), overlay=self._overlay
        )

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        with self._bounded(command):
            return await self._qmp.execute(command, arguments, fds)

    async def _save_with_memory(self) -> None:
        with self._bounded("migrate"):
            await save_with_memory(self._qmp, self._devices)

    @contextmanager
    def _bounded(self, command: str) -> Generator[None]:
        try:
            with trio.fail_after(self._patience):
                yield
        except QMPCommandError:
            raise
        except (QMPError, trio.TooSlowError) as exc:
            why = f"no answer within {self._patience:g} s" if isinstance(exc, trio.TooSlowError) else exc
            self.lost = MonitorLostError(f"{command}: {why}")
            raise self.lost from exc


def _copying() -> trio.CapacityLimiter:
    """Return what bounds the threads that copy RAM: more of them would only wait for the same memory."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_COPIES)
        _limiter.set(limiter)
        return limiter
