"""From an `Image` to its layers: what each step means here and now, and a layer of the store for each."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import trio

from .._config import Progress
from .._errors import ImageMissingError, PackagesError
from .._image import Image
from .._image_steps import AptStep, EnvironmentStep, FilesStep, NpmStep, PackagesStep, ScriptStep, Step
from ._choices import NODE, NPM_LOCK, PYLOCK, PYTHON, L, choice_name, read_choice, write_choice
from ._contents import (
    AptContent,
    EnvironmentContent,
    FilesContent,
    NpmContent,
    PackagesContent,
    ScriptContent,
    digest_of_tree,
)
from ._interpreters import (
    MOST_SAID,
    PATIENCE,
    ImageNode,
    ImagePython,
    find_answer,
    is_version,
    missing_interpreter,
    node_question,
    parse_node,
    parse_python,
    python_question,
    same_version,
)
from ._layer import Content, LayerJob, LayerRecipe, ProgramMissingError, RunLayer, Work
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
    planner = Planner(
        store, base, system, name=image.name, run=run, build=build, progress=progress, environment=environment
    )
    for step in image.steps:
        content = await planner.plan(step, base)
        recipe = LayerRecipe(image=base, system=system, content=content, step=str(step), run=run)
        base = await store.ensure_layer(recipe, build=build, progress=progress, environment=environment)
    return base  # noqa: ASYNC910 - there is a step, or it would be no layered image


class Planner:
    """Finds out what steps mean, one after the other: packages of earlier ones keep their versions.

    Args:
      store: Where choices are kept.
      base: The image below all steps.
      system: What virtual machines boot from.
      name: What the user calls the image.
      run: Has a virtual machine do something; None: `plan` is not called.
      build: Whether anything may be chosen that was not before.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    """

    def __init__(
        self,
        store: ImageStore,
        base: BuiltImage,
        system: SystemDisk,
        *,
        name: str,
        run: RunLayer | None,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> None:
        self._store = store
        self._base = base
        self._system = system
        self._name = name
        self._run = run
        self._build = build
        self._progress = progress
        self._environment = environment
        self._npm_memo = base.npm_lock
        self._in_container = base.settings is not None
        self._has_node = "nodejs" in base.system_packages or bool(base.layers) or self._in_container
        self._pins = {name: Pin(name, version) for name, version in base.packages.items()}

    async def plan(self, step: Step, image: BuiltImage) -> Content:
        """Return what *step* means, which comes after those that were asked about before, and on top of *image*."""
        await trio.lowlevel.checkpoint()
        match step:
            case PackagesStep():
                if self._in_container:
                    answer, python = await self._ask(PYTHON, step, image, python_question(), parse_python)
                    return await self.plan_packages(step, python, answer)
                return await self.plan_packages(step, None)
            case NpmStep():
                if self._in_container:
                    answer, node = await self._ask(NODE, step, image, node_question(), parse_node)
                    return await self.plan_npm(step, node, answer)
                return await self.plan_npm(step, None)
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

    async def _ask(
        self,
        kind: str,
        step: Step,
        image: BuiltImage,
        question: tuple[str, ...],
        parse: Callable[[str], L],
    ) -> tuple[str, L]:
        """Ask an interpreter of a container image what it is, once; return the name of the stored answer, and the answer."""
        assert self._run is not None
        run = self._run
        name = choice_name(kind, digest_of(kind, question, image.content))
        stage = f"image {self._name}, {step}"

        async def choose(directory: Path) -> L:
            work = Work(program=question, most_output=MOST_SAID, patience=PATIENCE)
            job = LayerJob(
                image=image, system=self._system, work=work, overlay=directory / "overlay", mounts=directory / "mounts"
            )

            def report(message: str, fraction: float | None) -> None:
                self._progress(Progress(stage, f"asking its {kind} what it is: {message}", fraction))

            with self._store.hold(image.entries):
                try:
                    said = await run(job, report)
                except ProgramMissingError as exc:
                    raise missing_interpreter(self._name, exc.program) from exc
            return parse(find_answer(said, self._name))

        return name, await self._once(name, step, parse, choose)

    async def plan_packages(self, step: PackagesStep, python: ImagePython | None, answer: str = "") -> PackagesContent:
        """Do `plan` for packages.

        Args:
          step: What is asked for.
          python: What the Python of a container image said; None for one of our own images.
          answer: The name of that.

        """
        await trio.lowlevel.checkpoint()
        memo = ""
        if python is None:
            target = find_target(self._name, self._base.system_packages)
        else:
            target = python.target(self._name)
            # Whatever earlier steps have added, it is what is there now that counts.
            self._pins = {pin.name: pin for pin in python.installed}
        if step.lock is None:
            memo, lock = await self._choose(step, target)
        else:
            lock = parse_lock(step.lock)
        for pin in lock.pins:
            earlier = self._pins.get(pin.name, pin)
            if not same_version(earlier.version, pin.version):
                raise PackagesError(
                    f"the lock has {pin.name} {pin.version}, and the image, or an earlier step of it, {earlier.version}: "
                    "have all packages in one lock"
                )
        missing = lock.without(frozenset(pin for pin in lock.pins if pin.name in self._pins))
        self._pins |= {pin.name: pin for pin in lock.pins}
        return PackagesContent(
            lock=lock,
            missing=missing,
            target=target,
            system=self._system.disk,
            memo=memo,
            answer=answer,
            languages=("python",) if python is not None and python.takes_code else (),
        )

    async def _choose(self, step: PackagesStep, target: Target) -> tuple[str, Lock]:
        """Return the name of the stored lock for *step*, and the lock, which is made once."""
        # What uv can't read is no version that it could choose either.
        pins = sorted((pin for pin in self._pins.values() if is_version(pin.version)), key=lambda pin: pin.name)
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

    async def plan_npm(self, step: NpmStep, node: ImageNode | None, answer: str = "") -> NpmContent:
        """Do `plan` for packages of Node.js; arguments as those of `plan_packages`."""
        await trio.lowlevel.checkpoint()
        if not self._has_node:
            raise PackagesError(
                f"packages of Node.js are of no use to the image {self._name!r}, which has no Node.js: take Image('node'), "
                "or add .apt('nodejs') before"
            )
        libc = "glibc" if node is None else node.libc
        parse = partial(parse_npm_lock, libc=libc)
        earlier: NpmLock | None = None
        if self._npm_memo:
            earlier = await trio.to_thread.run_sync(read_choice, self._store.pylocks / self._npm_memo, parse)
            if earlier is None:
                raise PackagesError(
                    f"what npm chose for the image {self._name!r} is not in the cache any more: make it anew from its Image"
                )
        digest = digest_of("npmlock", step.requirements, earlier and earlier.text, npm_choice(os.environ))
        name = choice_name(NPM_LOCK, digest)
        lock = await self._once(name, step, parse, lambda at: choose_npm(step, earlier, libc, at, self._environment))
        if earlier is not None:
            lock.check_kept(earlier)
        self._npm_memo = name
        return NpmContent(lock=lock, earlier=earlier, memo=name, node=node, answer=answer)

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
            self._progress(Progress(f"image {self._name}, {step}", message))

        async with self._store.open_workspace(
            name, lambda: report("another process is choosing its packages")
        ) as directory:
            lock = await trio.to_thread.run_sync(read_choice, path, parse)
            if lock is None:
                report("choosing packages")
                lock = await choose(directory)
                await trio.to_thread.run_sync(write_choice, path, lock)
        return lock
