"""One virtual machine: a QEMU process, its monitor, its console, the channel to its agent."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, final

import attrs
import trio

from .._config import Timeouts
from .._errors import (
    GuestProtocolError,
    QMPClosedError,
    QMPCommandError,
    QMPError,
    SnapshotError,
    VmBootError,
    VmDiedError,
    VmError,
)
from .._nurseries import Services, run_in_own_task
from .._observe import part_logger, span
from ..wire import (
    Channel,
    ChannelError,
    ChannelStream,
    PeerSilentError,
    PortStream,
    Role,
    StreamHandler,
    StreamLimitError,
    WireError,
    open_channel,
)
from ._accelerator import Accelerator
from ._balloon import BalloonClient
from ._chain import MOST_LAYERS, Merging
from ._clock import GuestClock
from ._confinement import find_qemu, read_end
from ._console import Console, describe_end
from ._limits import prefer_as_victim
from ._machine import DiskNode, MachineConfig
from ._migration import MigrationError, load_state, save_state
from ._process import InheritedFds, OwnedProcess, run_owned
from ._qmp import QMPChannel, open_qmp
from ._read_only_view import ReadOnlyView
from ._snapshot import MonitorLostError, SavedState, Snapshot, Taking, hold_still, note_full_disk
from ._usage import cpu_seconds, own_memory

_log = part_logger("snapshot")

#: Seconds for the news of QEMU's end to come, after one of its sockets was found closed.
_NEWS_SECONDS: Final = 2.0


@final
class Vm:
    """A virtual machine whose agent has answered; made by `VmManager.open_vm` only.

    It can end at any time. Then everything that waits on `qmp` or `guest` raises, `failure` says
    why, and `wait_ended` returns. The block's body is not cancelled: it may have other things to do.
    """

    def __init__(
        self,
        config: MachineConfig,
        accelerator: Accelerator,
        timeouts: Timeouts,
        console: Console,
        memory: int,
        disk: Sequence[DiskNode],
        files: ReadOnlyView,
    ) -> None:
        self.clock: GuestClock = GuestClock()
        """The guest's clock, which is kept right."""
        self._config = config
        self._memory = memory  # a descriptor of the RAM's file, the manager's
        *self._layer_nodes, self._node = disk
        self._files = files
        self._snapshots = trio.Lock()
        self._accelerator = accelerator
        self._timeouts = timeouts
        self._console = console
        self._process: OwnedProcess | None = None
        self._pid: int | None = None  # QEMU's, once it has answered
        self._qmp: QMPChannel | None = None
        self._balloon: BalloonClient | None = None
        self._guest: Channel | None = None
        self._failure: VmDiedError | GuestProtocolError | None = None
        self._closed = False
        self._cpu = 0.0
        self._exited = trio.Event()
        self._ended = trio.Event()
        self.guest_handler: StreamHandler | None = None
        """What serves the streams that the guest opens; None: they are refused. With one at the time of the hello, the guest
        has its side of the network on before users' processes go on."""
        self.guest_certificates: str = ""
        """What its programs are to trust then besides their image's certificates, as PEM; told by the hello only."""
        self.restored: bool = False
        """Whether it was restored from a state, and has not booted."""

    def __repr__(self) -> str:
        if self._failure is not None:
            state = f"failed: {str(self._failure).splitlines()[0]}"
        elif self._closed:
            state = "closed"
        else:
            state = f"running with PID {self.pid}"
        return f"<Vm, {self._config.memory_mib} MiB, {self._accelerator.name}: {state}>"

    @property
    def config(self) -> MachineConfig:
        """The machine. A snapshot changes its overlay and layers."""
        return self._config

    @property
    def accelerator(self) -> Accelerator:
        """What runs its instructions."""
        return self._accelerator

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None
        return self._pid or self._process.pid

    def cpu_seconds(self) -> float:
        """Return the processor time that QEMU has taken, in seconds. Of one that has ended: what was known when this was last asked."""
        if self._process is not None and self._process.returncode is None:
            self._cpu = cpu_seconds(self.pid) or self._cpu
        return self._cpu

    def own_memory(self) -> int:
        """Return the bytes of memory that QEMU has for itself, its guest's included; 0 if it has ended."""
        return 0 if self._process is None or self._process.returncode is not None else own_memory(self.pid)

    @property
    def qmp(self) -> QMPChannel:
        """The channel to QEMU."""
        assert self._qmp is not None
        return self._qmp

    @property
    def balloon(self) -> BalloonClient:
        """Moves the machine's balloon, where `MachineConfig.balloon` gives it one; all callers share this one."""
        if self._balloon is None:
            self._balloon = BalloonClient(
                self.qmp,
                timeouts=self._timeouts,
                shared_memory=self._config.memory_file is not None and not self._config.memory_shared,
            )
        return self._balloon

    @property
    def guest(self) -> Channel:
        """The channel to the agent."""
        assert self._guest is not None
        return self._guest

    @property
    def failure(self) -> VmDiedError | GuestProtocolError | None:
        """Why the machine is gone, though its block was not left; None while it is not."""
        return self._failure

    @property
    def closed(self) -> bool:
        """Whether the block was left."""
        return self._closed

    def console(self) -> str:
        """Return the last of the console, 64 KiB at most, without control characters."""
        return str(self._console)

    def qemu_output(self) -> str:
        """Return the last of what QEMU printed, 16 KiB at most: its warnings and errors; "" as a rule."""
        return "" if self._process is None else self._process.output()

    def qmp_log(self) -> str:
        """Return the end of the conversation with QEMU's monitor, 16 KiB at most; "" before there was any."""
        return "" if self._qmp is None else self._qmp.log()

    def retire(self, reason: str) -> None:
        """Give the machine up: it is killed at once, and `failure` says *reason*. Again is no error."""
        self._fail(VmDiedError(f"the virtual machine was ended: {reason}", console=self._console.excerpt()))

    async def wait_ended(self) -> VmDiedError | GuestProtocolError | None:
        """Block until the machine is gone; return why, None if its block was left."""
        await self._ended.wait()
        return self._failure

    async def save(self, devices: Path) -> None:
        """Stop the machine for good and write the state of its devices to the new file *devices*.

        With that, its RAM's file and its disks, others can be restored. Cancelled
        or failed, it leaves a part of the file. Either way all that is left to do is to leave the block.

        Raises:
          VmError: if QEMU could not do it, or not within `Timeouts.qmp_command`.
          OSError: if the file can't be made.

        """
        if self._config.memory_file is None or not self._config.memory_shared:
            raise ValueError("only a machine whose RAM is a shared file can be saved")
        fd = os.open(devices, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
            with trio.fail_after(self._timeouts.qmp_command):
                await save_state(self.qmp, fd)
        except (MigrationError, QMPError, trio.TooSlowError) as exc:
            if isinstance(exc, trio.TooSlowError):
                why = f"it took more than {self._timeouts.qmp_command:g} s"
            elif isinstance(exc, QMPClosedError):
                why = await self._why_lost(exc)  # noqa: ASYNC120 - bounded; it is for the failure to tell why
            else:
                why = f"{exc}{note_full_disk(devices.parent)}"
            raise VmError(f"the machine's state could not be saved: {why}", console=self._console.excerpt()) from exc
        finally:
            os.close(fd)

    async def _take(self, taking: Taking, marker: bytes) -> Snapshot:
        async with hold_still(self.guest, marker, self._timeouts.kill):
            with trio.CancelScope(shield=True):
                return await taking.take()
        raise AssertionError("nobody cancels that scope")

    async def snapshot(self, directory: Path, overlay: Path) -> Snapshot:
        """Save the machine's state, to restore others from, and let it continue; it writes to *overlay* from then on.

        The machine stands still for some 30 ms, and longer the more memory it has written to: 1 GiB takes about a second.
        Its runs and processes notice nothing else. One snapshot is taken at a time, and others wait. When there are
        many layers under the machine's disk, what they have is copied into its overlay first, and their files are in
        its `config` no more.

        Cancelled before it stands still, or failed, it leaves files in *directory*, which are of no use, and maybe
        *overlay* in use. While the machine stands still a cancellation waits.

        Args:
          directory: A new directory for the snapshot's files.
          overlay: A new and empty qcow2 file of the size of the machine's disk, beside its overlay.

        Raises:
          SnapshotError: if the state can't be saved. The machine goes on; or, if QEMU or the agent does not answer any
            more, it was ended, and the message says so.
          GuestProtocolError: if the agent says what no agent of ours says. The machine was ended.

        """
        async with self._snapshots:
            await self._merge_layers()
            marker = secrets.token_bytes(16)
            taking = Taking(
                self.qmp,
                self._config,
                self._node,
                overlay=overlay,
                directory=directory,
                files=self._files,
                marker=marker,
                patience=self._timeouts.qmp_command,
            )
            try:
                with taking:
                    await taking.prepare(self.pid, self._memory)
                    return await run_in_own_task(partial(self._take, taking, marker))
            except (QMPCommandError, MigrationError) as exc:
                full = note_full_disk(directory)
                raise SnapshotError(f"the machine's state could not be saved: {exc}{full}") from exc
            except (OSError, StreamLimitError) as exc:
                raise SnapshotError(f"the machine's state could not be saved: {exc}") from exc
            except WireError as exc:
                error = _protocol_error(exc)
                self._fail(error)
                raise error from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                why = await self._why_lost(exc)  # noqa: ASYNC120 - bounded; it is for the failure to tell why
                raise SnapshotError(f"the virtual machine ended before its state was saved: {why}") from (
                    self._failure or exc
                )
            except (MonitorLostError, trio.TooSlowError) as exc:
                # Where QEMU does not let the machine go on its agent can't, and says nothing either.
                why = str(taking.lost or "the guest's agent did not go on")
                if taking.lost is not None and isinstance(taking.lost.__cause__, QMPClosedError):
                    why = await self._why_lost(taking.lost)  # noqa: ASYNC120 - bounded; it is for the failure to tell why
                self.retire(f"after a snapshot was begun: {why}")
                raise SnapshotError(f"the virtual machine was ended, as it did not go on: {why}") from exc
            finally:
                if taking.node != self._node:
                    self._layer_nodes.append(self._node)
                self._config, self._node = taking.config, taking.node
                # It stood still, too.
                self.clock.disturb()

    async def _merge_layers(self) -> None:
        """Have few layers under the disk."""
        await trio.lowlevel.checkpoint()
        if len(self._config.layers) < MOST_LAYERS:
            return
        merging = Merging(self.qmp, self._node, self._layer_nodes, patience=self._timeouts.qmp_command)
        try:
            await merging.run()
        except (QMPError, trio.TooSlowError) as exc:
            # It works with many, too. If QEMU is gone, the snapshot will say so.
            _log.warning(
                "the layers of a machine's disk could not be made fewer, and are %d: %s", len(self._config.layers), exc
            )
        finally:
            if merging.done:
                self._config = attrs.evolve(self._config, layers=self._config.layers[:1])
                del self._layer_nodes[1:]

    def _fail(self, failure: VmDiedError | GuestProtocolError) -> None:
        if self._failure is None and not self._closed:
            self._failure = failure
            self._ended.set()
        if self._process is not None:
            self.cpu_seconds()  # nobody can ask later
            self._process.kill()

    # --- The services, in the order of their start; `open_vm` ends them in the reverse order ---

    async def _run_qemu(
        self,
        argv: list[str],
        environment: dict[str, str],
        inherited: InheritedFds,
        *,
        task_status: trio.TaskStatus[OwnedProcess],
    ) -> None:
        process = await run_owned(
            argv,
            environment=environment,
            inherited=inherited,
            name=os.path.basename(self._accelerator.qemu.path),
            task_status=task_status,
        )
        assert process.returncode is not None
        self._console.drain()
        why = describe_end(*read_end(process.returncode, process.output()), self.console())
        self._fail(VmDiedError(why, console=self._console.excerpt()))
        self._exited.set()

    async def _serve_qmp(self, sock: socket.socket, *, task_status: trio.TaskStatus[QMPChannel]) -> None:
        async with open_qmp(sock, timeouts=self._timeouts) as qmp:
            task_status.started(qmp)
            failure = await qmp.wait_closed()
            if not isinstance(failure, QMPClosedError) or not await self._is_gone():
                self._fail(VmDiedError(f"QEMU's monitor broke: {failure}", console=self._console.excerpt()))
            # The channel stays, failed, for those that ask it why.
            await trio.sleep_forever()

    async def _serve_guest(
        self, sock: socket.socket, hostname: str, marker: bytes | None, *, task_status: trio.TaskStatus[Channel]
    ) -> None:
        # Our hello tells the time. Sent before the guest is there to read it, it would tell it late.
        if marker is None:
            await trio.lowlevel.wait_readable(sock)
            stream = PortStream(sock.detach())
        else:
            stream = PortStream(sock.detach())
            try:
                # It comes back as soon as the agent is awake. What comes before it is left from the machine that was saved.
                await stream.call(marker)
            except BaseException:
                stream.close()
                raise
        hello: dict[str, object] = {
            "time": time.time_ns(),
            "entropy": secrets.token_hex(32),
            "hostname": hostname,
            "machine_id": secrets.token_hex(16),
        }
        if self.guest_handler is not None:
            hello["network"] = True
        if self.guest_certificates:
            hello["certificates"] = self.guest_certificates
        async with open_channel(
            stream,
            role=Role.HOST,
            hello=hello,
            handler=self._accept,
            silence_timeout=self._timeouts.agent_silence,
        ) as guest:
            task_status.started(guest)
            failure = await guest.wait_closed()
            if isinstance(failure, WireError):
                self._fail(_protocol_error(failure))
            elif isinstance(failure, PeerSilentError):
                silence = f"the guest's agent did not answer for {self._timeouts.agent_silence:g} s"
                self._fail(VmDiedError(silence, console=self._console.excerpt()))
            elif not await self._is_gone():
                self._fail(VmDiedError(f"the guest's port broke: {failure}", console=self._console.excerpt()))
            await trio.sleep_forever()

    def _accept(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        if self.guest_handler is not None:
            return self.guest_handler(stream, header)
        stream.reset("refused")
        return None

    async def _is_gone(self) -> bool:
        """Find out whether a socket of QEMU's broke just because QEMU has ended."""
        with trio.move_on_after(_NEWS_SECONDS):
            await self._exited.wait()
        return self._exited.is_set()

    async def _why_lost(self, exc: Exception) -> str:
        """Return what to say of a monitor that was lost: QEMU's last words, if it has ended."""
        return str(self._failure).splitlines()[0] if await self._is_gone() else str(exc)

    # --- For `VmManager.open_vm` ---

    async def boot(
        self,
        services: Services,
        argv: list[str],
        environment: dict[str, str],
        inherited: InheritedFds,
        sockets: tuple[socket.socket, socket.socket],
        hostname: str,
        saved: SavedState | None,
    ) -> None:
        """Start QEMU, load its state if there is one, and wait for the agent's hello."""
        qmp_socket, guest_socket = sockets
        self.restored = saved is not None
        try:
            with (
                trio.fail_after(self._timeouts.boot),
                span("restore" if self.restored else "boot", accelerator=self._accelerator.name),
            ):
                with span("qemu"):
                    process: OwnedProcess = await services.start(self._run_qemu, argv, environment, inherited)
                    self._process = process
                    await services.start(self._console.serve)
                    self._qmp = await services.start(self._serve_qmp, qmp_socket)
                # It is itself by now, whatever it was started by.
                self._pid = find_qemu(self._accelerator.confinement, process.pid)
                prefer_as_victim(self._pid)
                if saved is not None:
                    with span("load"):
                        await self._load(saved)
                marker = None if saved is None else saved.marker
                with span("hello"):
                    self._guest = await services.start(self._serve_guest, guest_socket, hostname, marker)
                await services.start(self.clock.serve, self._guest)
        except WireError as exc:
            raise _protocol_error(exc) from exc
        except (QMPError, MigrationError, ChannelError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            await self._raise_boot_error(exc)

    async def _load(self, saved: SavedState) -> None:
        fd = os.open(saved.devices, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await load_state(self.qmp, fd, with_memory=saved.with_memory)
        finally:
            os.close(fd)

    async def _raise_boot_error(self, exc: Exception) -> NoReturn:
        if isinstance(exc, trio.TooSlowError):
            why = f"the guest's agent did not answer within {self._timeouts.boot:g} s"
        else:
            why = await self._why_lost(exc)
        raise VmBootError(f"the virtual machine did not boot: {why}", console=self._console.excerpt()) from exc

    def close(self) -> None:
        """Remember that the block was left, and wake those that wait."""
        self._closed = True
        self._ended.set()


def _protocol_error(exc: WireError) -> GuestProtocolError:
    error = GuestProtocolError(f"the guest broke the protocol, and its virtual machine was ended: {exc}")
    error.__cause__ = exc
    return error
