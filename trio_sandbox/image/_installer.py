"""Packages for a machine that runs already: chosen and unpacked as for an image, and packed again for the guest."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._config import Progress
from .._image_steps import PackagesStep
from ._bytecode import compile_tree
from ._interpreters import (
    ImagePython,
    find_answer,
    missing_interpreter,
    parse_python,
    python_question,
    unpacking_program,
)
from ._layers import Planner
from ._package_archive import pack
from ._package_tree import arrange
from ._store import ImageStore
from ._stored import BuiltImage, SystemDisk
from ._uv import unpack

#: The guest's user, who may change what is installed for him; a container image has its own.
_OWNER: Final = (1000, 1000)

Ask = Callable[[Sequence[str]], Awaitable[bytes]]


@final
@attrs.frozen
class PackedPackages:
    """Packages for a guest."""

    archive: Path
    """An archive (tar), with paths relative to /."""
    interpreter: str
    """What the Python of a container image says that it is, which unpacks it; "" for our own images, which have a tar."""

    def unpacking(self, interpreter: str) -> Sequence[str]:
        """Return the command that unpacks it in /, from its standard input."""
        return unpacking_program(interpreter) if interpreter else ("tar", "-x", "--same-owner", "-f", "-")


@final
class PackageInstaller:
    """Packs packages for sandboxes of one image.

    Args:
      store: Where choices are kept, and work is done.
      image: What is there already.
      system: The disk whose Python compiles packages.
      name: What the user calls the image.
      build: Whether packages may be chosen that were not before.
      progress: Told what is going on; must not block.
      environment: Goes into the environment of every child process.

    """

    def __init__(
        self,
        store: ImageStore,
        image: BuiltImage,
        system: SystemDisk,
        *,
        name: str,
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> None:
        self._name = name
        self._store = store
        self._image = image
        self._system = system
        self._build = build
        self._progress = progress
        self._environment = environment

    @asynccontextmanager
    async def open_archive(self, step: PackagesStep, ask: Ask) -> AsyncGenerator[PackedPackages | None]:
        """Yield what is missing, packed, for the block; None if nothing is.

        Cancelled, it leaves nothing.

        Args:
          step: What is asked for.
          ask: Runs a command in the sandbox and returns what it printed: a container image is asked about its Python, as that is by now.
            `FileNotFoundError` if there is no such program.

        Raises:
          ImageError, ModuleNotFoundError: as `ensure_layers` does.

        """
        planner = Planner(
            self._store,
            self._image,
            self._system,
            name=self._name,
            run=None,  # a sandbox asks in its own machine
            build=self._build,
            progress=self._progress,
            environment=self._environment,
        )
        settings = self._image.settings
        python = None if settings is None else await self._find_python(ask)
        content = await planner.plan_packages(step, python)
        if not content.missing.pins:
            yield None
            return

        def report(message: str, fraction: float | None) -> None:
            self._progress(Progress(str(step), message, fraction))

        failure: OSError | None = None
        async with self._store.open_workspace(f"install-{secrets.token_hex(8)}", lambda: None) as directory:
            report(f"fetching {len(content.missing.pins)} packages", None)
            unpacked, tree, archive = directory / "unpacked", directory / "tree", directory / "packages.tar"
            await unpack(content.missing, content.target, directory, unpacked, self._environment, report)
            tree.mkdir()
            await trio.to_thread.run_sync(arrange, unpacked, tree, content.target)
            # Byte code of another version than the guest's is of no use to it, and of no harm.
            await compile_tree(self._system.disk, tree, content.target, directory, self._environment)
            owner = _OWNER if settings is None else (settings.user, settings.group)
            await trio.to_thread.run_sync(pack, tree, tree / content.target.site, [archive], owner)
            report("copying them into the guest", None)
            try:
                yield PackedPackages(archive, "" if python is None else python.interpreter)
            except OSError as exc:
                failure = exc  # the guest's, and not the workspace's
        if failure is not None:
            raise failure

    async def _find_python(self, ask: Ask) -> ImagePython:
        question = python_question()
        try:
            said = await ask(question)
        except FileNotFoundError as exc:
            raise missing_interpreter(self._name, question[0]) from exc
        return parse_python(find_answer(said, self._name))
