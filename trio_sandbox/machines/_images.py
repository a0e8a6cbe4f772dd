"""The images of one host: each made ready once, and then known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final
from weakref import WeakValueDictionary

import trio

from .._config import Progress
from .._image import AnyImage, Image
from .._network import Network
from ..image import BuiltImage, ImageStore, LayerJob, PackageInstaller, SystemDisk, are_there, ensure_layers
from ..network import Gateway
from ._admission import Admission
from ._layer_builder import LayerBuilder, Report


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
    ) -> None:
        self._store = store
        self._builder = builder
        self._admission = admission
        self._gateway = gateway
        self._build = build
        self._progress = progress
        self._environment = environment
        self._ready: dict[AnyImage, tuple[BuiltImage, SystemDisk]] = {}
        self._ensuring: WeakValueDictionary[AnyImage, trio.Lock] = WeakValueDictionary()

    def __setitem__(self, image: AnyImage, disks: tuple[BuiltImage, SystemDisk]) -> None:
        """Take an image for ready."""
        self._ready[image] = disks

    def __getitem__(self, image: AnyImage) -> BuiltImage:
        """Return an image that is ready."""
        return self._ready[image][0]

    async def ensure(self, image: AnyImage, *, build: bool = True) -> tuple[BuiltImage, SystemDisk]:
        """Return *image* and the system disk, built if need be; those that want the same one wait for it together.

        Raises:
          ImageError, ModuleNotFoundError, CapacityError: all that `Host.prepare` raises.

        """
        async with self._ensuring.setdefault(image, trio.Lock()):
            if image not in self._ready or not are_there(*self._ready[image]):
                self._ready[image] = await self._make(image, build=build and self._build)
            return self._ready[image]

    def installer(self, image: AnyImage) -> PackageInstaller:
        """Return what packs packages for sandboxes of an image that is ready."""
        return PackageInstaller(
            self._store, self[image], build=self._build, progress=self._progress, environment=self._environment
        )

    async def _make(self, image: AnyImage, *, build: bool) -> tuple[BuiltImage, SystemDisk]:
        base = image if isinstance(image, str) else image.name
        built, system = await self._store.ensure_bootable(
            base, build=build, progress=self._progress, environment=self._environment
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

    async def _run(self, job: LayerJob, report: Report) -> None:
        assert self._builder is not None
        async with self._admission.admit(self._builder.config):
            await self._builder.build(job, self._gateway(job.work.network), report)
