"""From an `Image` to its layers: what each step means here and now, and a layer of the store for each."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from .._config import Progress
from .._errors import ImageMissingError, PackagesError
from .._image import Image
from .._image_steps import AptStep, EnvironmentStep, FilesStep, NpmStep, PackagesStep, ScriptStep, Step
from ._choices import NPM_LOCK, PYLOCK, L, choice_name, read_choice, write_choice
from ._contents import (
    AptContent,
    EnvironmentContent,
    FilesContent,
    NpmContent,
    PackagesContent,
    ScriptContent,
    digest_of_tree,
)
from ._layer import Content, LayerRecipe, RunLayer
from ._npm import choose_npm, npm_choice
from ._npm_lock import NpmLock, parse_npm_lock
from ._pylock import Lock, Pin, parse_lock
from ._recipe import digest_of
from ._store import ImageStore
from ._stored import BuiltImage, SystemDisk
from ._target import Target, find_target
from ._uv import choice_of, resolve

#: Packages by which an image has Node.js.
_NODE: Final = ("nodejs", "npm")


async def ensure_layers(
    store: ImageStore,
    image: Image,
    base: BuiltImage,
    system: SystemDisk,
    run: RunLayer,
    *,
    build: bool,
    progress: Callable[[Progress], object],
    environment: Mapping[str, str],
) -> BuiltImage:
    """Return *image*, its layers intact, making those that are missing or damaged.

    Another process that makes one of them is waited for. Cancelled, it leaves the layers that were complete.

    Args:
      store: Where layers are.
      image: What is wanted.
      base: The image below all steps.
      system: What virtual machines boot from.
      run: Has a virtual machine make a layer.
      build: Whether to make what is missing.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    Raises:
      ImageMissingError: if a layer is missing, and *build* is False.
      ImageBuildError: if one can't be made; nothing of it is left.
      ModuleNotFoundError: if packages are to be chosen, and the extra ``packages`` is not installed.
      CapacityError: if the host never has the memory that making one takes.

    """
    planner = Planner(store, base, system, build=build, progress=progress, environment=environment)
    for step in image.steps:
        content = await planner.plan(step)
        recipe = LayerRecipe(image=base, system=system, content=content, step=str(step), run=run)
        base = await store.ensure_layer(recipe, build=build, progress=progress, environment=environment)
    return base  # noqa: ASYNC910 - there is a step, or it would be no layered image


class Planner:
    """Finds out what steps mean, one after the other: packages of earlier ones keep their versions."""

    def __init__(
        self,
        store: ImageStore,
        base: BuiltImage,
        system: SystemDisk,
        *,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> None:
        self._store = store
        self._base = base
        self._system = system
        self._build = build
        self._progress = progress
        self._environment = environment
        self._npm_memo = base.npm_lock
        self._has_node = "nodejs" in base.system_packages or bool(base.layers)
        self._pins = {name: Pin(name, version) for name, version in base.packages.items()}

    async def plan(self, step: Step) -> Content:
        """Return what *step* means, which comes after those that were asked about before."""
        await trio.lowlevel.checkpoint()
        match step:
            case PackagesStep():
                return await self.plan_packages(step)
            case NpmStep():
                return await self.plan_npm(step)
            case AptStep():
                self._has_node |= any(name.partition("=")[0] in _NODE for name in step.names)
                return AptContent(step=step)
            case FilesStep():
                digests = [await trio.to_thread.run_sync(digest_of_tree, source) for _, source in step.places]
                return FilesContent(step=step, digests=tuple(digests))
            case EnvironmentStep():
                return EnvironmentContent(step=step)
            case ScriptStep():
                self._has_node = True  # for all we know
                return ScriptContent(step=step)

    async def plan_packages(self, step: PackagesStep) -> PackagesContent:
        """Do `plan` for packages."""
        await trio.lowlevel.checkpoint()
        target = find_target(self._base.name, self._base.system_packages)
        memo = ""
        if step.lock is None:
            memo, lock = await self._choose(step, target)
        else:
            lock = parse_lock(step.lock)
        for pin in lock.pins:
            earlier = self._pins.get(pin.name, pin)
            if earlier != pin:
                raise PackagesError(
                    f"the lock has {pin.name} {pin.version}, and an earlier step of the image {earlier.version}: "
                    "have all packages in one lock"
                )
        missing = lock.without(frozenset(self._pins.values()))
        self._pins |= {pin.name: pin for pin in lock.pins}
        return PackagesContent(lock=lock, missing=missing, target=target, system=self._system.disk, memo=memo)

    async def _choose(self, step: PackagesStep, target: Target) -> tuple[str, Lock]:
        """Return the name of the stored lock for *step*, and the lock, which is made once."""
        pins = sorted(self._pins.values(), key=lambda pin: pin.name)
        digest = digest_of(
            "pylock",
            [step.requirements, step.exclude_newer, target.python, target.platform],
            [[pin.name, pin.version] for pin in pins],
            choice_of(os.environ),
            *([step.digests] if step.digests else ()),
        )
        name = choice_name(PYLOCK, digest)
        lock = await self._once(name, step, parse_lock, lambda at: resolve(step, pins, target, at, self._environment))
        return name, lock

    async def plan_npm(self, step: NpmStep) -> NpmContent:
        """Do `plan` for packages of Node.js."""
        await trio.lowlevel.checkpoint()
        if not self._has_node:
            raise PackagesError(
                f"packages of Node.js are of no use to the image {self._base.name!r}, which has no Node.js: take Image('node'), "
                "or add .apt('nodejs') before"
            )
        earlier: NpmLock | None = None
        if self._npm_memo:
            earlier = await trio.to_thread.run_sync(read_choice, self._store.pylocks / self._npm_memo, parse_npm_lock)
            if earlier is None:
                raise PackagesError(
                    f"what npm chose for the image {self._base.name!r} is not in the cache any more: make it anew from its Image"
                )
        digest = digest_of("npmlock", step.requirements, earlier and earlier.text, npm_choice(os.environ))
        name = choice_name(NPM_LOCK, digest)
        lock = await self._once(name, step, parse_npm_lock, lambda at: choose_npm(step, earlier, at, self._environment))
        if earlier is not None:
            lock.check_kept(earlier)
        self._npm_memo = name
        return NpmContent(lock=lock, earlier=earlier, memo=name)

    async def _once(
        self, name: str, step: Step, parse: Callable[[str], L], choose: Callable[[Path], Awaitable[L]]
    ) -> L:
        """Return the stored lock *name* for *step*, which is made once."""
        path = self._store.pylocks / name
        if (lock := await trio.to_thread.run_sync(read_choice, path, parse)) is not None:
            return lock
        if not self._build:
            raise ImageMissingError(
                f"the packages of the image ({step}) were not chosen yet, and building was refused; "
                "Host.prepare() builds it where HostConfig.build_images is True"
            )

        def report(message: str) -> None:
            self._progress(Progress(f"image {self._base.name}, {step}", message))

        async with self._store.open_workspace(
            name, lambda: report("another process is choosing its packages")
        ) as directory:
            lock = await trio.to_thread.run_sync(read_choice, path, parse)
            if lock is None:
                report("choosing packages")
                lock = await choose(directory)
                await trio.to_thread.run_sync(write_choice, path, lock)
        return lock
