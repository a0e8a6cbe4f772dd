"""A host: what sandboxes share, owned by one block."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Unpack, final

import attrs

from ._config import HostConfig, SandboxConfig, SandboxFields, sandbox_config
from ._entries import Home, open_block
from ._errors import SandboxClosedError, SandboxError
from ._image import DEFAULT_IMAGE, AnyImage, Image
from ._metadata import mark_public
from ._network import Network
from ._nurseries import Services, open_services
from ._programs import unsupported_platform
from ._results import RunResult
from .client import Functions
from .image import (
    ImageStore,
    check_directory,
    default_cache_directory,
    image_for_script,
    own_caches,
    read_source,
    spell_out,
)
from .machines import (
    Admission,
    Dependents,
    Disks,
    HeldMachine,
    HostImages,
    HostStatistics as HostStatistics,
    Launcher,
    LayerBuilder,
    Ledger,
    MemoryGuard,
    NamedTemplate,
    NamedTemplateStore,
    ProgressLog,
    Roster,
    TemplateStore,
    WarmPool,
    WarmVms,
    check_image as check_image,
    check_known,
    fit as fit,
    hold_machine,
    list_sandbox,
    open_ledger,
    open_roster,
    place_templates,
    remove_leftovers,
)
from .network import Gateway, HostResolver, Proxy, Trust, find_proxy, read_trust
from .qemu import (
    Accelerator,
    Runtime,
    Vm,
    detect_accelerator,
    open_overlay_pool,
    open_runtime,
    open_storage_daemon,
    open_vm_manager,
)
from .sandbox import Lifecycle, LocalInstaller, ObservedSandbox, Sandbox


@final
class Host:
    """The storage daemon, images and virtual machines of one block. Made by `open_host`."""

    def __init__(
        self,
        config: HostConfig,
        runtime: Runtime,
        store: ImageStore,
        accelerator: Accelerator,
        launcher: Launcher,
        named: NamedTemplateStore,
        dependents: Dependents,
        proxy: Proxy | None = None,
        trust: Trust | None = None,
        ledger: Ledger | None = None,
        builder: LayerBuilder | None = None,
        roster: Roster | None = None,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._accelerator = accelerator
        self._launcher = launcher
        self._named = named
        self._proxy, self._trust, self._roster = proxy, trust, roster
        self._home = Home()
        self._resolver = HostResolver()
        self._admission = Admission(config, runtime.directory, ledger)
        self._images = HostImages(
            store,
            builder,
            self._admission,
            self._gateway,
            build=config.build_images,
            progress=config.progress,
            environment=runtime.environment,
            dependents=dependents,
            budget_mib=config.image_budget_mib,
        )
        self._warm = WarmPool(config.warm, self._admission, WarmVms(self._images.hold, launcher, config.timeouts))
        self._guard = MemoryGuard(self._admission, self._warm.give_back, runtime.directory)
        self._open = self._opened = 0
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._open} sandboxes open"
        return f"<trio_sandbox.Host, {self._accelerator.name}: {state}>"

    @property
    def accelerator(self) -> Accelerator:
        """What runs the guests' instructions, and why that was chosen."""
        return self._accelerator

    def statistics(self) -> HostStatistics:
        """Return numbers about the host as it is now."""
        return HostStatistics(self._open, self._opened, self._admission.statistics(), self._warm.statistics())

    async def prepare(self, image: str | Image = DEFAULT_IMAGE) -> None:
        """Make sure that *image* is in the store and intact; build it if it is missing.

        `open_sandbox` does this by itself. Call it to get the wait, or the error, at a time of your choice. Cancelling a
        build leaves nothing of it, except the complete layers of an `Image`.

        Raises:
          UnknownImageError: if nothing of that name can be built.
          ImageMissingError: if it is missing and `HostConfig.build_images` is False.
          ImageBuildError: if building failed; of packages, as `PackagesError` and `WheelMissingError` say, and of a container image, as `OciError` says.
          ImageCorruptError: if the stored files are not what was built.
          MissingProgramError: if a program needed for building is not installed.
          ModuleNotFoundError: if the image needs packages to be chosen, and the extra ``packages`` is not installed.
          CapacityError: if the host never has the memory of a machine that makes a layer, `constants.BUILD_MEMORY_MIB`.

        """
        self._home.check("Host.prepare()")
        async with self._images.hold(check_image(image)):
            pass

    @open_block
    async def open_sandbox(
        self,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        *,
        template: str | None = None,
        **fields: Unpack[SandboxFields],
    ) -> AsyncGenerator[Sandbox]:
        """Start a virtual machine and yield it as a `Sandbox`. When the block exits, the VM is destroyed.

        With `HostConfig.templates` the first of a configuration boots, is warmed up and saved as a template. It and all
        later ones start from that. Each has an identity, a clock and random generators of its own.

        If there is not enough memory or processor for it, it waits its turn; tasks are served in the order of their calls. A
        task that holds one sandbox while it waits for another may wait for ever: put a deadline around it. Cancelled at any
        point, while entering or leaving, it leaves no process and no file.

        Args:
          image: What the guest's code sees: the name of an image, or an `Image`.
          config: Memory, vCPUs and limits; the default is `SandboxConfig()`.
          template: The name of a saved sandbox to restore. It has its image, memory and vCPUs: leave these out, or say the
            same. In a *config* the defaults of memory and vCPUs count as left out. With more memory than it had it boots from
            its disk instead: it has its files then, but no variables, processes and mounts. Mounts of *config* are new ones.
          **fields: Fields of a `SandboxConfig`, in place of *config*: ``open_sandbox(memory_mib=512)``.

        Raises:
          TypeError, ValueError: if *template* is not a name, or *image* and *config* do not fit it; nothing was started.
          UnknownTemplateError: if there is no saved sandbox of that name.
          TemplateUnusableError: if the saved sandbox can't be restored here; the message says why.
          CapacityError: at once, if it asks for more than `HostConfig.memory_budget_mib`, `HostConfig.vcpu_budget` or
            `HostConfig.disk_budget_mib` ever allow; or, to be tried again later, if the disk of `HostConfig.runtime_dir` is
            nearly full, or if for longer than `Timeouts.admission` other processes hold what it needs, or memory is tight (see
            `HostConfig.memory_overcommit`). Nothing was started.
          ModuleNotFoundError: if `SandboxConfig.network` has secrets, and the extra ``network`` is not installed; nothing was started.
          MountError: if a directory of `SandboxConfig.mounts` can't be read (at once), or can't be mounted.
          WarmupError: if `SandboxConfig.warmup` fails.
          VmBootError: if the guest did not come up; the message has the console's last lines.
          MissingProgramError: if QEMU is not installed.
          QemuStorageDaemonError: if the VM's disk could not be made.
          OSError: if this process may open no more files, or a disk of ours can't be written; nothing is left of the attempt.
          SandboxClosedError: if the host's block has exited.
          ImageError: all that `prepare` raises.

        """
        self._home.check("the host")
        self._check_open()
        wanted = check_image(image)
        config = sandbox_config(config, fields)
        saved = None if template is None else self._named.find(template)
        if saved is not None:
            wanted, config = fit(saved, wanted, config, fields)
        elif config is None:
            config = SandboxConfig()
        for source in config.mounts.values():
            check_directory(source)
        gateway = self._gateway(config.network)
        observed = ObservedSandbox(wanted, config, "template" if saved is None else "saved")
        async with AsyncExitStack() as stack:
            stack.enter_context(observed)
            with self._warm.user_opens():
                # For as long as the sandbox is open: it needs the files when it is reverted, or wakes up. And before it has a share
                # of the host: making a layer takes one, and whoever has one must not wait for another.
                disks = await stack.enter_async_context(self._images.hold(wanted, saved))
                held = None
                if saved is None:
                    held = await stack.enter_async_context(self._warm.checkout(wanted, config))
                services = await stack.enter_async_context(open_services("open_sandbox()"))
                if held is None:
                    held = await hold_machine(services, self._open_machine(disks, config, saved))
                    if not held.vm.restored:
                        observed.kind = "boot"
                else:
                    observed.kind = "warm"
                keeping = self._keep(services, held, wanted, config, gateway, observed)
                sandbox = await stack.enter_async_context(keeping)
            yield sandbox

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxClosedError("the host's block has exited; open another host")

    @asynccontextmanager
    async def _open_machine(
        self, disks: Disks, config: SandboxConfig, saved: NamedTemplate | None
    ) -> AsyncGenerator[Vm]:
        """Yield a machine with its share of the host."""
        async with self._admission.admit(config) as note_up:
            self._check_open()  # it may have been a long wait
            if saved is None:
                machine = self._launcher.open_machine(*disks, config)
            else:
                machine = self._launcher.open_saved(*disks, saved, config)
            async with machine as vm:
                note_up()
                yield vm

    @asynccontextmanager
    async def _keep(
        self,
        services: Services,
        held: HeldMachine[Vm],
        image: AnyImage,
        config: SandboxConfig,
        gateway: Gateway,
        observed: ObservedSandbox,
        beside: int = 1,
    ) -> AsyncGenerator[Sandbox]:
        """Yield the sandbox of a machine, which may be replaced by others of *services*."""
        with list_sandbox(self._roster, observed.id, image, config, held.vm) as note_machine:
            lifecycle = Lifecycle(
                services,
                held,
                image=self._images[image],
                launcher=self._launcher,
                admission=self._admission,
                named=self._named,
                config=config,
                timeouts=self._config.timeouts,
                open_child=lambda machine, beside, gateway: self._open_copy(machine, image, config, gateway, beside),
                gateway=gateway,
                note_machine=note_machine,
                beside=beside,
                id=observed.id,
            )
            gateway.observe_in(observed.context)
            if gateway.network:
                await lifecycle.network.switch(held.vm)
            if config.hibernate_after is not None:
                await services.start(lifecycle.serve_idleness, config.hibernate_after)
            if config.reclaim_after is not None and held.vm.config.balloon:
                await services.start(lifecycle.serve_reclaiming, config.reclaim_after)
            self._open += 1
            self._opened += 1
            try:
                built, installer = self._images[image], LocalInstaller(self._images.installer(image))
                timeouts, staging = self._config.timeouts, self._runtime.directory
                with observed.body(), self._guard.watch(lifecycle):
                    yield Sandbox(lifecycle.slot, image, config, timeouts, lifecycle, built, None, installer, staging)
            finally:
                lifecycle.close()
                self._open -= 1

    @asynccontextmanager
    async def _open_copy(
        self,
        machine: AbstractAsyncContextManager[Vm],
        image: AnyImage,
        config: SandboxConfig,
        gateway: Gateway,
        beside: int,
    ) -> AsyncGenerator[Sandbox]:
        """Yield the sandbox of a machine restored from that of another sandbox."""
        with ObservedSandbox(image, config, "fork") as observed:
            async with open_services("Sandbox.fork()") as services:
                held = await hold_machine(services, machine)
                async with self._keep(services, held, image, config, gateway, observed, beside) as sandbox:
                    yield sandbox

    def _gateway(self, network: Network) -> Gateway:
        timeout = self._config.timeouts.connect
        return Gateway(network, self._resolver, connect_timeout=timeout, proxy=self._proxy, trust=self._trust)

    async def run(
        self,
        code: str,
        *,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        functions: Functions | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run *code* in a VM of its own, which is destroyed when this returns.

        Arguments, result and errors are those of `open_sandbox` and `Sandbox.run`. Cancelling destroys the VM.
        """
        async with self.open_sandbox(image, config, **fields) as sandbox:
            return await sandbox.run(code, functions=functions, check=check)

    async def run_script(
        self,
        path: str | os.PathLike[str],
        *,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        functions: Functions | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run a Python file as `run` does, with the packages that it names itself.

        These are the ``dependencies`` of its block ``# /// script`` (PEP 723), added to *image* as by `Image.packages`. The
        file is on the host, and is read now. Other arguments, result and errors are those of `run`.

        Raises:
          OSError: if the file can't be read.
          SyntaxError, ValueError: if it is not Python source text, its block can't be read, or it requires another Python
            than the image has; nothing was started.

        """
        self._home.check("Host.run_script()")
        source = await read_source(path)
        wanted = image_for_script(check_image(image), source)
        return await self.run(source, image=wanted, config=config, functions=functions, check=check, **fields)


@open_block
async def open_host(config: HostConfig | None = None) -> AsyncGenerator[Host]:
    """Start what sandboxes share and yield it as a `Host`. When the block exits, all of it ends.

    If this process is killed, even by SIGKILL, a reaper ends what is left within two seconds. Cancelled at any point, while
    entering or leaving, it leaves no process and no file.

    Args:
      config: Directories, accelerator and timeouts; the default is `HostConfig()`.

    Raises:
      ValueError: if `HostConfig.proxy` is not the URL of a proxy, or `HostConfig.ca_certificates` not a file of
        certificates; nothing was started.
      UnknownImageError: if `HostConfig.warm` names an image that can't be built; nothing was started.
      CapacityError: if `HostConfig.warm` asks for a VM that can never fit. If each fits but not all of them together, a
        warning is logged, and there are as many as fit.
      MissingProgramError: if QEMU is not installed; the message names the package.
      ConfinementRequiredError: if `HostConfig.confinement` is "require" and this host does not allow all of it.
      HardwareRequiredError: if `HostConfig.require_hardware` and no hardware accelerator ran a guest.
      QemuStorageDaemonError: if the storage daemon does not start.
      ImageError: if the cache directory is somebody else's, or others may write to it; nothing was started.
      SandboxError: if this is not Linux on x86_64, or QEMU would run as root, or there is no place for the runtime directory
        or the cache; the message says what to set.
      OSError: if the runtime or the cache directory can't be written.

    """
    if config is None:
        config = HostConfig()
    elif not isinstance(config, HostConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`config` must be a HostConfig, not {config!r:.100}")
    if reason := unsupported_platform():
        raise SandboxError(reason)
    config = attrs.evolve(config, progress=ProgressLog(config.progress))
    proxy = find_proxy(config.proxy)
    trust = read_trust(config.ca_certificates)
    cache = config.cache_dir or default_cache_directory()
    store = ImageStore(cache)
    for image, _ in config.warm:
        check_known(store, spell_out(image))
    store.check_trusted()
    async with open_runtime(config.runtime_dir) as runtime:
        # Images that somebody else has built can be used; what we make ourselves is kept in a cache of our own then.
        own = place_templates(cache, (*own_caches(), runtime.directory))
        accelerator = await detect_accelerator(
            config.accelerator,
            require_hardware=config.require_hardware,
            cache_dir=own,
            environment=runtime.environment,
            timeouts=config.timeouts,
        )
        async with (
            open_storage_daemon(
                directory=runtime.directory, timeouts=config.timeouts, environment=runtime.environment
            ) as daemon,
            open_overlay_pool(daemon) as overlays,
            open_vm_manager(
                runtime=runtime,
                accelerator=accelerator,
                timeouts=config.timeouts,
                cgroup=config.cgroup,
                protected=(cache, own),
            ) as machines,
        ):
            if config.confinement == "require":
                machines.confinement.require_whole()
            templates = None
            if config.templates:
                templates = TemplateStore(
                    own, budget_mib=config.template_budget_mib, shared=cache if own != cache else None
                )
            named = NamedTemplateStore(cache)
            await remove_leftovers(store, templates, named, runtime.environment)
            launcher = Launcher(
                machines=machines,
                overlays=overlays,
                templates=templates,
                directory=runtime.directory,
                environment=runtime.environment,
                timeouts=config.timeouts,
                progress=config.progress,
            )
            builder = LayerBuilder(
                machines=machines, overlays=overlays, environment=runtime.environment, timeouts=config.timeouts
            )
            with open_ledger(guard=runtime.guard) as ledger, open_roster(guard=runtime.guard) as roster:
                parts = (Dependents(cache), proxy, trust, ledger, builder, roster)
                host = Host(config, runtime, store, accelerator, launcher, named, *parts)
                async with open_services("open_host()") as services:
                    if config.warm:
                        await services.start(host._warm.serve)  # pyright: ignore[reportPrivateUsage]
                    if config.memory_overcommit > 1:
                        await services.start(host._guard.serve)  # pyright: ignore[reportPrivateUsage]
                    try:
                        yield host
                    finally:
                        host._closed = True  # pyright: ignore[reportPrivateUsage]


@open_block
async def open_sandbox(
    image: str | Image = DEFAULT_IMAGE,
    config: SandboxConfig | None = None,
    *,
    template: str | None = None,
    host_config: HostConfig | None = None,
    **fields: Unpack[SandboxFields],
) -> AsyncGenerator[Sandbox]:
    """Open one sandbox on a host of its own: `open_host` and `Host.open_sandbox` in one block.

        async with open_sandbox("python", memory_mib=512) as sandbox:
            ...

    Args:
      image: What the guest's code sees: the name of an image, or an `Image`.
      config: Memory, vCPUs and limits; the default is `SandboxConfig()`.
      template: The name of a saved sandbox to restore.
      host_config: How the host works; the default is `HostConfig()`.
      **fields: Fields of a `SandboxConfig`, in place of *config*.

    Raises:
      Exception: all that `open_host` and `Host.open_sandbox` raise.

    """
    check_image(image)  # what is wrong is said before anything is started
    sandbox_config(config, fields)
    async with (
        open_host(host_config) as host,
        host.open_sandbox(image, config, template=template, **fields) as sandbox,
    ):
        yield sandbox


mark_public(__name__, globals())
