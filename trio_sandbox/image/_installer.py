"""Packages for a machine that runs already: chosen and unpacked as for an image, and packed again for the guest."""

from __future__ import annotations

import secrets
import tarfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, final

import trio

from .._config import Progress
from .._image_steps import PackagesStep
from ._bytecode import compile_tree
from ._layers import Planner
from ._package_tree import arrange
from ._store import ImageStore
from ._stored import BuiltImage, SystemDisk
from ._uv import unpack

#: The guest's user, who may change what is installed for him.
_OWNER: Final = 1000


@final
class PackageInstaller:
    """Packs packages for sandboxes of one image.

    Args:
      store: Where choices are kept, and work is done.
      image: What is there already.
      system: The disk whose Python compiles packages.
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
        build: bool,
        progress: Callable[[Progress], object],
        environment: Mapping[str, str],
    ) -> None:
        self._store = store
        self._image = image
        self._system = system
        self._build = build
        self._progress = progress
        self._environment = environment

    @asynccontextmanager
    async def open_archive(self, step: PackagesStep) -> AsyncGenerator[Path | None]:
        """Yield an archive (tar) of what is missing, with paths relative to /, for the block; None if nothing is.

        Cancelled, it leaves nothing.

        Raises:
          ImageError, ModuleNotFoundError: as `ensure_layers` does.

        """
        planner = Planner(
            self._store,
            self._image,
            self._system,
            build=self._build,
            progress=self._progress,
            environment=self._environment,
        )
        content = await planner.plan_packages(step)
        if not content.missing.pins:
            yield None
            return

        def report(message: str, fraction: float | None) -> None:
            self._progress(Progress(str(step), message, fraction))

        async with self._store.open_workspace(f"install-{secrets.token_hex(8)}", lambda: None) as directory:
            report(f"fetching {len(content.missing.pins)} packages", None)
            unpacked, tree, archive = directory / "unpacked", directory / "tree", directory / "packages.tar"
            await unpack(content.missing, content.target, directory, unpacked, self._environment, report)
            tree.mkdir()
            await trio.to_thread.run_sync(arrange, unpacked, tree, content.target)
            # Byte code of another version than the guest's is of no use to it, and of no harm.
            await compile_tree(self._system.disk, tree, content.target, directory, self._environment)
            await trio.to_thread.run_sync(_pack, tree, tree / content.target.site, archive)
            report("copying them into the guest", None)
            yield archive


def _pack(tree: Path, site: Path, archive: Path) -> None:
    def own(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = _OWNER
        member.uname = member.gname = ""
        return member

    # Nothing of the directories on the way is in it: they stay whose they are.
    prefix = site.parent.parent.parent
    tops = [*site.iterdir()]
    tops += [path for directory in prefix.iterdir() if directory.name != "lib" for path in directory.iterdir()]
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(tops):
            tar.add(path, path.relative_to(tree).as_posix(), filter=own)
