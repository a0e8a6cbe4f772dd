"""Where virtual machines come from: their descriptors and command lines, and how many there are."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal, final

import attrs
import trio

from .._config import Timeouts
from .._entries import open_block
from .._errors import SandboxClosedError, SandboxError, VmBootError
from .._nurseries import open_services
from .._observe import part_logger
from .._private import make_new_directory
from ..wire import StreamHandler
from ._accelerator import Accelerator
from ._confinement import Confinement, kvm_access, prove_jail, prove_landlock
from ._console import Console
from ._control_group import ControlGroups, open_control_groups
from ._jail import Jail, open_jail
from ._limits import limits_of
from ._machine import MachineConfig, MachineFds, disk_nodes, lock_disk, machine_argv, stand_in_kernel
from ._process import InheritedFds, minimal_environment
from ._ram import FROZEN_MODE
from ._read_only_open import lend_library, prove_library
from ._read_only_view import ReadOnlyView, open_read_only_view
from ._runtime import Runtime
from ._snapshot import SavedState
from ._vm import Vm

_log = part_logger("confinement")


@final
@attrs.frozen
class VmManagerStatistics:
    """Numbers about the virtual machines of one manager."""

    open: int
    """Those that exist now, booting ones included."""
    booted: int
    """Those whose agent answered, ever."""
    failed: int
    """Those that did not come up, or ended before their block did."""


@final
class VmManager:
    """Opens virtual machines; made by `open_vm_manager` only."""

    def __init__(
        self,
        runtime: Runtime,
        accelerator: Accelerator,
        timeouts: Timeouts,
        groups: ControlGroups | None,
        protected: Iterable[Path],
    ) -> None:
        self._groups = groups
        self._protected = (runtime.directory, *protected)
        self._files = ReadOnlyView()
        self._runtime = runtime
        self._accelerator = accelerator
        self._timeouts = timeouts
        self._open = self._booted = self._failed = 0
        self._closed = False
        self._jail: Jail | None = None
        self._landlock = accelerator.confinement.landlock
        self._with_library = False

    def __repr__(self) -> str:
        return f"<VmManager, {self._accelerator.name}: {'closed' if self._closed else f'{self._open} open'}>"

    @property
    def shares_memory(self) -> bool:
        """Whether machines with private copies of one RAM's file can't write to it; else each must have a file of its own."""
        return self._accelerator.qemu.opens_memory_read_only or self._with_library

    @property
    def accelerator(self) -> Accelerator:
        """What runs the guests' instructions."""
        return self._accelerator

    def statistics(self) -> VmManagerStatistics:
        """Return numbers about the virtual machines."""
        return VmManagerStatistics(self._open, self._booted, self._failed)

    @asynccontextmanager
    async def open_vm(
        self,
        config: MachineConfig,
        *,
        hostname: str = "sandbox",
        saved: SavedState | None = None,
        guest_handler: StreamHandler | None = None,
        guest_certificates: str = "",
    ) -> AsyncGenerator[Vm]:
        """Boot a virtual machine and own it for the block.

        When the block exits for any reason, QEMU is killed and reaped; the machine's files stay. Cancelled at any
        point, on the way in or out, it leaves nothing either. Inside, a cancellation reaches the body
        first: its cleanup can still talk to QEMU and the agent.

        Args:
          config: The machine.
          hostname: What the guest calls itself.
          saved: Go on from this state instead of booting. But for its overlay, and for the RAM's being
            private, the machine must be the one that was saved.
          guest_handler: See `Vm.guest_handler`.
          guest_certificates: See `Vm.guest_certificates`.

        Raises:
          VmBootError: if the guest's agent did not answer within `Timeouts.boot`, or the state did not
            load; the console's last lines are in it.
          GuestProtocolError: if what answered is no agent of ours.
          OSError: if one of the machine's files can't be opened. Nothing was started then.
          SandboxClosedError: if the manager's block was left.
          SandboxError: if there is no user id, or no control group, left for it.
        """
        if self._closed:
            raise SandboxClosedError("the virtual machine manager was closed")
        confinement = self.confinement
        accelerator = attrs.evolve(self._accelerator, confinement=confinement)
        access = kvm_access(confinement) if accelerator.name == "kvm" else None
        limits = limits_of(config) if confinement.limits else None
        read_only = config.memory_file is not None and not config.memory_shared and self.shares_memory
        with ExitStack() as stack, InheritedFds() as inherited:
            uid = stack.enter_context(confinement.hold_uid())
            qmp, qmp_fd = inherited.socketpair()
            stack.enter_context(qmp)
            guest, guest_fd = inherited.socketpair()
            stack.enter_context(guest)
            console, console_fd = inherited.socketpair()
            stack.enter_context(console)

            def lend(path: Path) -> int:
                return inherited.add(self._files.open(path))

            fds = MachineFds(
                kernel=lend(config.kernel) if saved is None else _lend_stand_in_kernel(inherited),
                initrd=lend(config.initrd) if saved is None else None,
                system_disk=lend(config.system_disk),
                image=lend(config.image),
                image_layers=tuple(lend(layer) for layer in config.image_layers),
                layers=tuple(lend(layer) for layer in config.layers),
                overlay=inherited.open(config.overlay, os.O_RDWR),
                frozen_overlay=lend(config.overlay),
                mounts=None if config.mounts is None else lend(config.mounts),
                qmp=qmp_fd,
                agent=guest_fd,
                console=console_fd,
                kvm=inherited.open("/dev/kvm", os.O_RDWR) if access is not None and access.by_descriptor else None,
                memory=_lend_memory(inherited, config, self._files if read_only else None),
            )
            try:
                lock_disk(fds.overlay)
            except BlockingIOError as exc:
                raise VmBootError(
                    f"the virtual machine did not boot: {config.overlay}: {exc.strerror}", console=""
                ) from exc
            enter = [] if self._groups is None else stack.enter_context(self._groups.enter(config.memory_mib))
            argv = [
                *enter,
                *confinement.argv(uid, groups=() if access is None else access.groups, limits=limits, jail=self._jail),
                accelerator.qemu.path,
                *machine_argv(
                    config,
                    accelerator.name,
                    fds,
                    incoming=saved is not None,
                    memory_read_only=accelerator.qemu.opens_memory_read_only,
                ),
            ]
            environment = {**minimal_environment(), **self._runtime.environment}
            if read_only and self._with_library:
                environment |= lend_library(inherited)
            memory = os.dup(fds.memory)
            stack.callback(os.close, memory)
            vm = Vm(config, accelerator, self._timeouts, Console(console), memory, disk_nodes(fds), self._files)
            vm.guest_handler = guest_handler
            vm.guest_certificates = guest_certificates
            if uid is not None and confinement.uid_per_vm:
                self._runtime.guard_uid(uid)
                stack.callback(self._runtime.release_uid, uid)
            self._open += 1
            stack.callback(self._forget, vm)
            async with open_services("open_vm()") as services:
                await vm.boot(services, argv, environment, inherited, (qmp, guest), hostname, saved)
                self._booted += 1
                try:
                    yield vm
                finally:
                    vm.close()

    @property
    def confinement(self) -> Confinement:
        """How machines are confined."""
        return attrs.evolve(
            self._accelerator.confinement,
            jail=self._jail is not None,
            landlock=self._landlock,
            control_group=self._groups is not None,
        )

    async def keep_jail(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Make the jail and keep it; started when that is there, or can't be made. For `open_vm_manager` only."""
        confinement, program = self._accelerator.confinement, self._accelerator.qemu.path
        directory = self._runtime.directory / "jail"
        environment = self._runtime.environment
        kvm = kvm_access(confinement) if self._accelerator.name == "kvm" else None
        try:
            if confinement.may_be_jailed:
                make_new_directory(directory)
                async with AsyncExitStack() as stack:
                    ordinary = not confinement.other_user
                    jail = await stack.enter_async_context(
                        open_jail(program, directory=directory, own_user_namespace=ordinary, environment=environment)
                    )
                    await prove_jail(jail, confinement, program, kvm=kvm, environment=environment)
                    if ordinary:
                        view = open_read_only_view(self._protected, environment)
                        self._files = await stack.enter_async_context(view)
                    self._jail = jail
                    task_status.started()
                    await trio.sleep_forever()
        except (SandboxError, OSError) as exc:
            self._landlock = await prove_landlock(confinement, environment)
            if not self._landlock:
                _log.warning("QEMU sees this machine's files, as far as its user may: %s", exc)
        task_status.started()
        await trio.lowlevel.checkpoint()

    async def prove_sharing(self) -> None:
        """Find out whether `shares_memory`. For `open_vm_manager` only."""
        if self._accelerator.qemu.opens_memory_read_only:
            await trio.lowlevel.checkpoint()
            return
        # Landlock allows a machine's own files only.
        confinement = attrs.evolve(self.confinement, landlock=False)
        prefix = confinement.argv(confinement.choose_uid(), jail=self._jail)
        self._with_library = await prove_library(
            prefix, self._accelerator.qemu.path, environment=self._runtime.environment
        )
        if not self._with_library:
            _log.warning(
                "%s would open for writing the memory that sandboxes start from: each gets a copy of its own, which takes longer; "
                "to change that, install QEMU 8.2 or later",
                self._accelerator.qemu,
            )

    def _forget(self, vm: Vm) -> None:
        self._open -= 1
        self._failed += vm.failure is not None


@open_block
async def open_vm_manager(
    *,
    runtime: Runtime,
    accelerator: Accelerator,
    timeouts: Timeouts | None = None,
    cgroup: Literal["auto", "off"] | Path = "off",
    protected: Iterable[Path] = (),
) -> AsyncGenerator[VmManager]:
    """Yield a `VmManager` for the block.

    The virtual machines' blocks must be inside this one.

    Args:
      runtime: Whose reaper the machines are known to.
      accelerator: What runs them.
      timeouts: Bounds on booting and silence.
      cgroup: See `HostConfig.cgroup`.
      protected: Directories with what the machines are given to read, beside the runtime's own; see `_read_only_view`.

    Raises:
      SandboxError: if *cgroup* is a directory, and no control group can be made in it.
    """
    async with open_control_groups(cgroup, runtime) as groups:
        manager = VmManager(runtime, accelerator, Timeouts() if timeouts is None else timeouts, groups, protected)
        async with open_services("open_vm_manager()") as services:
            await services.start(manager.keep_jail)
            await manager.prove_sharing()
            try:
                yield manager
            finally:
                manager._closed = True  # pyright: ignore[reportPrivateUsage]


def _lend_memory(inherited: InheritedFds, config: MachineConfig, read_only: ReadOnlyView | None) -> int:
    """Lend what QEMU opens anew as the RAM; from *read_only* for reading, or else for writing, too."""
    if config.memory_file is not None:
        # Open for what QEMU will open it for, as Landlock lets it do no more; see `_landlock_main`.
        if read_only is None:
            return inherited.open(config.memory_file, os.O_RDWR)
        _freeze(config.memory_file)
        return inherited.add(read_only.open(config.memory_file))
    # Not anonymous, so that it can be read for a snapshot.
    fd = inherited.add(os.memfd_create("ram", os.MFD_CLOEXEC))
    os.ftruncate(fd, config.memory_mib * 2**20)
    os.fchmod(fd, 0o666)  # QEMU, which runs as another user, opens it anew
    return fd


def _freeze(memory: Path) -> None:
    """Have nobody write to a RAM's file any more. Earlier versions made them for a QEMU that had to be allowed to."""
    if os.stat(memory).st_mode & 0o222:
        try:
            os.chmod(memory, FROZEN_MODE)
        except OSError as exc:
            if exc.errno != errno.EROFS:  # where nobody can, whatever the mode
                raise


def _lend_stand_in_kernel(inherited: InheritedFds) -> int:
    fd = inherited.add(os.memfd_create("kernel", os.MFD_CLOEXEC))
    os.write(fd, stand_in_kernel())
    return fd
