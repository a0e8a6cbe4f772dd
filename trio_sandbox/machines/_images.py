"""The images of one host: each made ready once, and then known."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import trio

from .._config import Progress
from .._errors import ImageError, ImageMissingError, TemplateUnusableError
from .._image import AnyImage, Image
from .._network import Network
from .._observe import part_logger, span
from ..image import (
    BuiltImage,
    Cargo,
    ImageStore,
    LayerJob,
    PackageInstaller,
    Receive,
    SystemDisk,
    are_there,
    describe_cargo,
    ensure_bootable,
    ensure_layers,
    entries_of,
    spell_out,
    take_cargo,
)
from ..network import Gateway
from ._admission import Admission
from ._dependents import Dependents
from ._layer_builder import LayerBuilder, Report
from ._named import NamedTemplate

_log = part_logger("image")

#: How often an image is looked for that is removed again before it can be held, and the seconds between: a removal holds its lock for some
#: milliseconds.
_ATTEMPTS: Final = 50
_LOOK: Final = 0.1


Disks = tuple[BuiltImage, SystemDisk]


@final
class HostImages:
    """Makes images ready.

    Args:
      store: Where they are.
      builder: What makes layers; None: nothing does.
      admission: Where the machines that make layers get their share of the host.
      gateway: Makes what decides on the connections of those machines.
      build: Whether to build what is missing.
      progress: Told what is going on.
      environment: `Runtime.environment`.
      dependents: Who stands on images, besides sandboxes that are open.
      budget_mib: `HostConfig.image_budget_mib`.

    """

    def __init__(
        self,
        store: ImageStore,
        builder: LayerBuilder | None,
        admission: Admission,
        gateway: Callable[[Network], Gateway],
        *,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
        dependents: Dependents,
        budget_mib: int | None,
    ) -> None:
        self._dependents = dependents
        self._budget_mib = budget_mib
        self._store = store
        self._builder = builder
        self._admission = admission
        self._gateway = gateway
        self._build = build
        self._progress = progress
        self._environment = environment
        self._ready: dict[AnyImage, Disks] = {}
        self._ensuring: WeakValueDictionary[AnyImage, trio.Lock] = WeakValueDictionary()

    def __setitem__(self, image: AnyImage, disks: Disks) -> None:
        """Take an image for ready."""
        self._ready[image] = disks

    def __getitem__(self, image: AnyImage) -> BuiltImage:
        """Return an image that is ready."""
        return self._ready[image][0]

    async def ensure(self, image: AnyImage, *, build: bool = True) -> Disks:
        """Return *image* and the system disk, built if need be; those that want the same one wait for it together.

        Raises:
          ImageError, ModuleNotFoundError, CapacityError: all that `Host.prepare` raises.

        """
        async with self._ensuring.setdefault(image, trio.Lock()):
            if image not in self._ready or not are_there(*self._ready[image]):
                with span("image"):
                    self._ready[image] = await self._make(image, build=build and self._build)
            return self._ready[image]

    @asynccontextmanager
    async def hold(self, image: AnyImage, saved: NamedTemplate | None = None) -> AsyncGenerator[Disks]:
        """Do `ensure`, and keep the image from being evicted for the block, by this process or another.

        Args:
          image: Which.
          saved: A saved sandbox that is to be restored on it; then it is not built, since it would be another one.

        Raises:
          TemplateUnusableError: if it is not there for *saved*.
          ImageError, ModuleNotFoundError, CapacityError: all that `Host.prepare` raises.

        """
        async with AsyncExitStack() as stack:
            try:
                disks = await self._hold(stack, image, build=saved is None)
            except ImageError as exc:
                if saved is None:
                    raise
                raise TemplateUnusableError(
                    f"the saved sandbox {saved.name!r} needs files of its image that are gone, and that can't be built the "
                    f"same again: {exc}. `trio-sandbox template rm {saved.name}` removes it"
                ) from exc
            yield disks

    async def _hold(self, stack: AsyncExitStack, image: AnyImage, *, build: bool) -> Disks:
        for _ in range(_ATTEMPTS):
            known = self._ready.get(image)
            built, system = disks = await self.ensure(image, build=build)
            with ExitStack() as lease:
                if lease.enter_context(self._store.hold((*built.entries, system.disk.parent))):
                    if disks is not known:
                        await self._make_room()
                    stack.push(lease.pop_all())
                    return disks
            await trio.sleep(_LOOK)
            self._ready.pop(image, None)
        raise ImageMissingError(f"the image {image!s} is removed again and again, to make room in the cache")

    async def _make_room(self) -> None:
        """Evict what was used longest ago. Failing is no reason to do without an image that is there."""
        await trio.lowlevel.checkpoint()
        if self._budget_mib is None or not self._build:
            return
        try:
            freed = await self._store.evict(self._budget_mib * 2**20, is_needed=self._dependents.any_on)
        except (ImageError, OSError) as exc:
            _log.warning("old images can't be removed: %s", exc)
        else:
            if freed:
                _log.info("removed images of %d MiB that were used longest ago", freed // 2**20)

    def installer(self, image: AnyImage) -> PackageInstaller:
        """Return what packs packages for sandboxes of an image that is ready."""
        built, system = self._ready[image]
        return PackageInstaller(
            self._store,
            built,
            system,
            name=image if isinstance(image, str) else image.name,
            build=self._build,
            progress=self._progress,
            environment=self._environment,
        )

    # --- From one host to another ---

    async def has(self, image: AnyImage) -> bool:
        """Tell whether *image*, and what boots it, is there and intact, so that nothing need be built."""
        try:
            await self.ensure(image, build=False)
        except ImageError:
            return False  # noqa: ASYNC910 - it was looked for in threads
        return True

    def name_of(self, image: AnyImage) -> str:
        """Return the name of an image that is ready: that of its top layer, by which it is found as long as it is there."""
        return self._ready[image][0].name

    @asynccontextmanager
    async def lend(self, image: AnyImage) -> AsyncGenerator[tuple[Cargo, tuple[Path, ...]]]:
        """Yield what *image* consists of, and the directories of that by their numbers; it is held for the block.

        Raises:
          ImageError: if it is not there, or can't be moved.
          OSError: if it can't be read.

        """
        async with AsyncExitStack() as stack:
            built, system = await self._hold(stack, image, build=False)
            cargo = await trio.to_thread.run_sync(describe_cargo, self._store, built, system)
            yield cargo, entries_of(built, system)

    async def take(self, cargo: Cargo, open_file: Callable[[int, str], Receive]) -> None:
        """Do `take_cargo`; arguments and errors are those of that."""
        await take_cargo(self._store, cargo, open_file, progress=self._progress, environment=self._environment)

    async def _make(self, image: AnyImage, *, build: bool) -> Disks:
        image = spell_out(image)
        base = image if isinstance(image, str) else image.name
        built, system = await ensure_bootable(
            self._store, base, build=build, progress=self._progress, environment=self._environment
        )
        if isinstance(image, Image):
            built = await ensure_layers(
                self._store,
                image,
                built,
                system,
                self._run,
                build=build,
                progress=self._progress,
                environment=self._environment,
            )
        return built, system

    async def _run(self, job: LayerJob, report: Report) -> bytes:
        assert self._builder is not None
        async with self._admission.admit(self._builder.config, idles=False):
            return await self._builder.build(job, self._gateway(job.work.network), report)
