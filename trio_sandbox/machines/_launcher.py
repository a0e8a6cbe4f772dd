"""How a sandbox comes by its machine: a clone of a template where there can be one, else a cold boot."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import attrs
import trio

from .._config import Progress, SandboxConfig, Timeouts
from .._errors import (
    GuestProtocolError,
    QemuStorageDaemonError,
    SandboxError,
    SnapshotError,
    TemplateUnusableError,
    VmError,
    WarmupError,
)
from .._observe import part_logger, span
from .._private import make_new_directory
from ..client import NO_INTERPRETER
from ..image import BuiltImage, Place, SystemDisk, open_mounts_disk
from ..qemu import (
    FROZEN_MODE,
    MachineConfig,
    OverlayPool,
    SavedState,
    Snapshot,
    Vm,
    VmManager,
    copy_memory,
    link_file,
    machine_identity,
)
from ..wire import StreamHandler
from ._blame import RESTORE_FAILURES, blames_the_state, first_line
from ._description import GUEST_NAMESPACES, describe_machine
from ._disk_limit import choose_disk_mib, limit_disk
from ._fit import BOOTS_ANEW, boots_anew, saved_config
from ._mounts import mount
from ._named import NamedTemplate
from ._templates import Template, TemplateStore, new_template, sync_files, template_key
from ._warm_up import freeze, run_trivial_code, run_warm_up

_log = part_logger("templates")

#: What a machine has in its directory: the overlay that it starts with, and others.
_OVERLAY, _MOUNTS, _MEMORY = "overlay.qcow2", "mounts", "memory"
#: Seconds to wait for another process that makes the template we want, which is about to be done
#: earlier than a boot of our own; then we boot. And between two looks.
_OTHERS_PATIENCE: Final = 20.0
_LOOK: Final = 0.1
#: After so many failures of one template, its configuration boots cold for as long as this host is open.
_ATTEMPTS: Final = 2


@final
class Launcher:
    """Opens the machines of one host.

    Args:
      machines: What runs them.
      overlays: What makes their disks.
      templates: Where templates are kept; None: every machine boots.
      directory: For the overlays.
      environment: `Runtime.environment`.
      timeouts: Bounds on what the guest is asked to do.
      progress: Told when a template is made.

    """

    def __init__(
        self,
        *,
        machines: VmManager,
        overlays: OverlayPool,
        templates: TemplateStore | None,
        directory: Path,
        environment: Mapping[str, str],
        timeouts: Timeouts,
        progress: Callable[[Progress], object],
    ) -> None:
        self._machines = machines
        self._overlays = overlays
        self._templates = templates
        self._directory = directory
        self._environment = environment
        self._timeouts = timeouts
        self._progress = progress
        self._failures: Counter[str] = Counter()
        self._making: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def open_machine(self, image: BuiltImage, system: SystemDisk, config: SandboxConfig) -> AsyncGenerator[Vm]:
        """Yield a machine that has booted, and run `SandboxConfig.warmup`, for the block.

        The first of a configuration makes its template and is a clone of that like all others: this
        takes a few per cent longer than a boot, and saves everyone after it all of the boot. Doing it
        in the background instead would make the first user share the processors with a second boot.

        Whatever is wrong with a template, the user gets a machine: it is removed, and the machine boots.

        Raises:
          WarmupError: if the warm-up fails.
          MountError: if `SandboxConfig.mounts` can't be copied, or not be mounted.
          VmBootError, QemuStorageDaemonError, OSError: if a machine can't be booted.

        """
        if config.warmup and not image.language:
            raise WarmupError(f"`SandboxConfig.warmup` can't run, and nothing was started: {NO_INTERPRETER}")
        machine = self._machine(image, system, config)
        async with AsyncExitStack() as stack:
            places = list[Place]()
            if config.mounts:
                machine, places = await self._with_mounts(stack, machine, config, image)
            vm, drop_template = None, None
            if self._templates is not None and config.memory_mib * 2**20 <= self._templates.budget_bytes:
                # With the mode, since an earlier version's may be written to.
                key = self._identity(image, machine, config.warmup, FROZEN_MODE)
                if self._failures[key] < _ATTEMPTS:
                    vm, drop_template = await self._open_clone(stack, self._templates, key, machine, image, config)
            if vm is None:
                # What the warm-up writes does not count. We may not be allowed to set a limit afterwards.
                booted = attrs.evolve(machine, disk_bytes=None) if config.warmup else machine
                vm = await stack.enter_async_context(self._open_vm(booted))
                if drop_template is not None:
                    drop_template()
                if config.warmup:
                    await run_warm_up(vm, image.language, config.warmup, self._timeouts)
            if places:
                await mount(vm, places, patience=self._timeouts.boot)
            if (disk_mib := choose_disk_mib(config.disk_mib, self._directory)) is not None:
                await limit_disk(vm, disk_mib, patience=self._timeouts.kill)
            yield vm

    @asynccontextmanager
    async def open_saved(
        self, image: BuiltImage, system: SystemDisk, template: NamedTemplate, config: SandboxConfig
    ) -> AsyncGenerator[Vm]:
        """Yield a machine restored from a named template for the block; *config* fits it.

        With more memory than the template has it boots from the template's disk instead.

        Raises:
          TemplateUnusableError: if it can't be restored.
          MountError: if `SandboxConfig.mounts` can't be copied, or not be mounted.
          VmBootError: if it was killed, or this host has too little of something.
          QemuStorageDaemonError, OSError: if its disk can't be made.

        """
        machine = self._saved_machine(image, system, template, config)
        saved: SavedState | None = SavedState(template.devices, template.marker, with_memory=template.with_memory)
        if boots_anew(template, config):
            self._progress(Progress(f"saved {template.name}", BOOTS_ANEW))
            machine, saved = attrs.evolve(self._machine(image, system, config), layers=template.layers), None
        async with AsyncExitStack() as stack:
            places = list[Place]()
            if config.mounts:
                machine, places = await self._with_mounts(stack, machine, config, image)
            try:
                vm = await stack.enter_async_context(self._open_vm(machine, saved))
            except (VmError, GuestProtocolError, FileNotFoundError) as exc:
                if saved is None or not blames_the_state(exc):
                    raise
                raise self._unusable(template, f"a VM could not start from it: {exc}") from exc
            if places:
                await mount(vm, places, patience=self._timeouts.boot)
            # It may have been saved with a limit of its own.
            disk_mib = choose_disk_mib(config.disk_mib, self._directory)
            await limit_disk(vm, disk_mib, patience=self._timeouts.kill)
            yield vm

    def check_saved(self, image: BuiltImage, system: SystemDisk, template: NamedTemplate) -> None:
        """Make sure that a machine could go on from a named template, whose files need not be here yet.

        Raises:
          TemplateUnusableError: if none could.

        """
        self._saved_machine(image, system, template, SandboxConfig())

    def _saved_machine(
        self, image: BuiltImage, system: SystemDisk, template: NamedTemplate, config: SandboxConfig
    ) -> MachineConfig:
        machine = attrs.evolve(
            self._machine(image, system, saved_config(template, config)),
            layers=template.layers,
            mounts=template.mounts,
            mounts_bytes=template.mounts_bytes,
            memory_file=template.memory,
            memory_shared=template.balloon and template.memory is not None,
            balloon=template.balloon,
        )
        if template.machine != self._identity(image, machine):
            raise self._unusable(template, self._difference(template, image))
        return machine

    def describe(self, name: str, image: BuiltImage, snapshot: Snapshot) -> NamedTemplate:
        """Describe the named template that *snapshot* is to be, of a machine that stands on *image*."""
        machine = snapshot.config
        return NamedTemplate(
            name=name,
            directory=snapshot.directory,
            image=image.name,
            image_digest=image.digest,
            memory_mib=machine.memory_mib,
            vcpus=machine.vcpus,
            guest_namespaces=GUEST_NAMESPACES in machine.kernel_args,
            machine=self._identity(image, machine),
            qemu=self._describe_qemu(),
            marker=snapshot.saved.marker,
            with_memory=snapshot.saved.with_memory,
            balloon=machine.balloon,
            mounted=machine.mounts is not None,
            mounts_bytes=machine.mounts_bytes,
            layer_count=len(machine.layers),
        )

    def _difference(self, template: NamedTemplate, image: BuiltImage) -> str:
        qemu = self._describe_qemu()
        if template.image_digest != image.digest:
            return f"the image {template.image!r} is built from another recipe now"
        if template.qemu != qemu:
            return f"it was saved under {template.qemu}, and this is {qemu}"
        return (
            f"the image {template.image!r} or the system disk was built anew since it was saved, "
            "or it was saved with another version of trio-sandbox or on another processor"
        )

    def _describe_qemu(self) -> str:
        accelerator = self._machines.accelerator
        return f"{accelerator.qemu} ({accelerator.name})"

    @staticmethod
    def _unusable(template: NamedTemplate, why: str) -> TemplateUnusableError:
        return TemplateUnusableError(
            f"the saved sandbox {template.name!r} is of no use here: {why}. Use it where it was saved, or remove it with "
            f"`trio-sandbox template rm {template.name}` and save such a sandbox anew"
        )

    def _new_path(self, suffix: str) -> Path:
        return self._directory / f"{secrets.token_hex(8)}{suffix}"

    # --- Machines ---

    async def _with_mounts(
        self, stack: AsyncExitStack, machine: MachineConfig, config: SandboxConfig, image: BuiltImage
    ) -> tuple[MachineConfig, list[Place]]:
        """Return *machine* with a disk of `SandboxConfig.mounts`, behind what it has already, and where on it they are."""

        def report(message: str, fraction: float | None) -> None:
            self._progress(Progress("mounts", message, fraction))

        path = self._new_path(".mounts")
        opened = partial(
            open_mounts_disk,
            config.mounts,
            path,
            environment=self._environment,
            report=report,
            before=None if machine.mounts is None else (machine.mounts, machine.mounts_bytes),
        )
        settings = image.settings
        places = await stack.enter_async_context(
            opened() if settings is None else opened(owner=(settings.user, settings.group))
        )
        return attrs.evolve(machine, mounts=path, mounts_bytes=places[-1].offset + places[-1].size), places

    def _machine(self, image: BuiltImage, system: SystemDisk, config: SandboxConfig) -> MachineConfig:
        # Each machine that is opened gets a directory of its own. Where templates are wanted, also machines that boot because there
        # is none yet are like their clones.
        return describe_machine(
            image, system, config, overlay=self._directory / _OVERLAY, balloon=self._templates is None
        )

    @asynccontextmanager
    async def open_restored(
        self, snapshot: Snapshot, guest_handler: StreamHandler | None = None, guest_certificates: str = ""
    ) -> AsyncGenerator[Vm]:
        """Yield a machine restored from *snapshot*, as somebody else, for the block.

        The snapshot may be discarded once the block has started. Errors are those of `open_machine`, and `SnapshotError`
        if its memory is not as it was.
        """
        snapshot.check_memory()
        async with self._open_vm(snapshot.config, snapshot.saved, guest_handler, guest_certificates) as vm:
            yield vm

    async def snapshot(self, vm: Vm) -> Snapshot:
        """Take a snapshot of a machine of ours, which goes on; for the caller to discard.

        Cancelled, it leaves nothing; while the machine stands still a cancellation waits.

        Raises:
          SnapshotError: if it can't be taken. The machine goes on, or was ended, as the message says.

        """
        name = secrets.token_hex(8)
        directory = self._directory / f"snapshot-{name}"
        overlay = vm.config.overlay.with_name(f"{name}.qcow2")

        def remove_unused_overlay() -> None:
            if vm.config.overlay != overlay:
                overlay.unlink(missing_ok=True)

        disks = {*vm.config.layers, vm.config.overlay}

        def remove_merged_layers() -> None:
            for disk in disks - {*vm.config.layers, vm.config.overlay}:
                disk.unlink(missing_ok=True)

        with ExitStack() as always, ExitStack() as undo:
            always.callback(remove_merged_layers)
            undo.callback(remove_unused_overlay)
            try:
                make_new_directory(directory)
                undo.callback(shutil.rmtree, directory, ignore_errors=True)
                # Whatever it will stand on is of the size of the image, and nobody reads the name that is written in it.
                await self._overlays.acquire(vm.config.image, overlay)
            except (OSError, QemuStorageDaemonError) as exc:
                raise SnapshotError(f"there is no disk for the machine to continue with: {exc}") from exc
            snapshot = await vm.snapshot(directory, overlay)
            undo.pop_all()
        return snapshot

    @asynccontextmanager
    async def _open_vm(
        self,
        machine: MachineConfig,
        saved: SavedState | None = None,
        guest_handler: StreamHandler | None = None,
        guest_certificates: str = "",
    ) -> AsyncGenerator[Vm]:
        directory = self._directory / secrets.token_hex(8)
        make_new_directory(directory)
        try:
            # Links of its own: what it stands on stays for as long as it does, and whoever made it can remove it.
            layers = tuple(directory / f"layer{number}.qcow2" for number in range(len(machine.layers)))
            for layer, link in zip(machine.layers, layers, strict=True):
                link_file(layer, link)
            machine = attrs.evolve(machine, layers=layers, overlay=directory / _OVERLAY)
            if machine.mounts is not None:
                link_file(machine.mounts, directory / _MOUNTS)
                machine = attrs.evolve(machine, mounts=directory / _MOUNTS)
            if machine.memory_file is not None and saved is not None and self._needs_memory(machine):
                await trio.to_thread.run_sync(copy_memory, machine.memory_file, directory / _MEMORY)
                machine = attrs.evolve(machine, memory_file=directory / _MEMORY)
            await self._overlays.acquire(machine.image, machine.overlay)
            hostname = f"sandbox-{secrets.token_hex(4)}"
            async with self._machines.open_vm(
                machine,
                hostname=hostname,
                saved=saved,
                guest_handler=guest_handler,
                guest_certificates=guest_certificates,
            ) as vm:
                yield vm
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _needs_memory(self, machine: MachineConfig) -> bool:
        """Whether a machine restored from a state needs a copy of the RAM's file of its own."""
        # What its guest gives back is cut out of the file; or it could write to what others are restored from.
        return machine.memory_shared or not self._machines.shares_memory

    async def _open_clone(
        self,
        stack: AsyncExitStack,
        templates: TemplateStore,
        key: str,
        machine: MachineConfig,
        image: BuiltImage,
        config: SandboxConfig,
    ) -> tuple[Vm | None, Callable[[], None] | None]:
        """Enter a clone into *stack*; None if it is better to boot. What comes besides drops the template, once a machine has booted here."""
        template = await self._ensure(templates, key, machine, image, config)
        if template is None:
            return None, None
        clone = attrs.evolve(machine, layers=(template.overlay,), memory_file=template.memory)
        saved = SavedState(template.devices, template.marker)
        try:
            return await stack.enter_async_context(self._open_vm(clone, saved)), None
        except RESTORE_FAILURES as exc:
            is_there = all(path.exists() for path in template.files)
            if is_there and (isinstance(exc, (QemuStorageDaemonError, OSError)) or not blames_the_state(exc)):
                _log.warning("the template %s can't be used now, and a VM boots: %s", key, first_line(exc))
                return None, None
            self._failures[key] += 1
            return None, partial(templates.discard, key, f"a VM could not start from it: {exc}")

    # --- Templates ---

    def _identity(self, image: BuiltImage, machine: MachineConfig, *more: object) -> str:
        """Return the digest of what must be the same for a state to load, and of *more*."""
        accelerator = self._machines.accelerator
        files = [
            os.stat(path)
            for path in (machine.kernel, machine.initrd, machine.system_disk, machine.image, *machine.image_layers)
        ]
        return template_key(
            image.digest,
            # Builds of one recipe can differ.
            [(status.st_size, status.st_mtime_ns) for status in files],
            accelerator.qemu,
            accelerator.name,
            machine_identity(machine, accelerator.name),
            *more,
        )

    async def _ensure(
        self, templates: TemplateStore, key: str, machine: MachineConfig, image: BuiltImage, config: SandboxConfig
    ) -> Template | None:
        """Return the template, which is made if need be; None if it can't be."""
        # Those that want the same one wait for it: together they get it sooner than by booting side by side.
        async with self._making.setdefault(key, trio.Lock()):
            template = templates.find(key)
            if template is not None:
                return template
            deadline = trio.current_time() + _OTHERS_PATIENCE
            try:
                while trio.current_time() < deadline:
                    with templates.lock(key) as held:
                        if held:
                            # Another process may have made it while we waited.
                            return templates.find(key) or await self._make(templates, key, machine, image, config)
                    await trio.sleep(_LOOK)
            except WarmupError:
                raise
            except (SandboxError, OSError) as exc:
                # A full disk, which is noticed before anything is started, may have room the next time.
                if not (isinstance(exc, OSError) and exc.errno == errno.ENOSPC):
                    self._failures[key] = _ATTEMPTS
                _log.warning("no template can be made, and machines like this one boot: %s", exc)
            return None

    async def _make(
        self, templates: TemplateStore, key: str, machine: MachineConfig, image: BuiltImage, config: SandboxConfig
    ) -> Template | None:
        def report(message: str) -> None:
            self._progress(Progress(f"template {key[:8]}", message))

        wanted = new_template(
            key, image=image.name, memory_mib=config.memory_mib, vcpus=config.vcpus, warmup=config.warmup
        )
        with span("template"), templates.make(wanted) as staged:
            report("booting a VM")
            original = attrs.evolve(
                machine,
                overlay=staged.overlay,
                disk_bytes=None,
                memory_file=staged.memory,
                memory_shared=True,
                mounts=None,
                mounts_bytes=0,
            )
            await self._overlays.acquire(image.top, staged.overlay)
            async with self._machines.open_vm(original) as vm:
                if config.warmup:
                    report("warming up")
                    await run_warm_up(vm, image.language, config.warmup, self._timeouts)
                await run_trivial_code(vm, image.language, self._timeouts)
                report("saving its state")
                await freeze(vm, staged.marker, self._timeouts)
                await vm.save(staged.devices)
            os.chmod(staged.memory, FROZEN_MODE)
            await trio.to_thread.run_sync(sync_files, staged.files)
        try:
            await trio.to_thread.run_sync(partial(templates.evict, keep=key))
        except OSError as exc:
            _log.warning("old templates can't be removed: %s", exc)
        return templates.find(key)
