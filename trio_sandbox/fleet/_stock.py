"""What is on a node's disk: saved sandboxes and images, which go from node to node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, final

import trio

from .._config import Progress
from .._errors import LinkProtocolError, UnknownTemplateError
from ..host import Host
from ..image import BuiltImage, SystemDisk, default_cache_directory, digest_of_tree
from ..machines import NamedTemplate, NamedTemplateStore, SavedExchange, SavedSandbox, saved_sandboxes
from ._shipping import NodeImages
from ._trees import Trees


@final
class Stock:
    """What one node has.

    Args:
      cache: The cache directory of its host.
      images: The images of its host.
      directory: Where its user's files are kept as long as they are needed.
      check: As that of `SavedExchange`.
      progress: Told when a saved sandbox is fetched.

    """

    def __init__(
        self,
        cache: Path,
        images: NodeImages,
        directory: Path,
        check: Callable[[BuiltImage, SystemDisk, NamedTemplate], object],
        progress: Callable[[Progress], object],
    ) -> None:
        self.trees: Trees = Trees(directory)
        """Copies of its user's files."""
        self.images: NodeImages = images
        """The images."""
        self._cache = cache
        self._named = NamedTemplateStore(cache)
        self.saved: SavedExchange = SavedExchange(self._named, images, check, progress)
        """What goes from node to node of the saved sandboxes."""
        self._operations: dict[str, Callable[..., Awaitable[object]]] = {
            "saved": self._saved,
            "find": self._find,
            "remove": self._remove,
            "has": images.has,
            "digest": self._digest,
        }

    @classmethod
    def of(cls, host: Host) -> Stock:
        """Return what the disk of a host has."""
        config, runtime = host._config, host._runtime  # pyright: ignore[reportPrivateUsage]
        images = host._images  # pyright: ignore[reportPrivateUsage]
        check = host._launcher.check_saved  # pyright: ignore[reportPrivateUsage]
        cache = config.cache_dir or default_cache_directory()
        return cls(cache, images, runtime.directory / "trees", check, config.progress)

    async def ask(self, operation: str, arguments: tuple[Any, ...]) -> object:
        """Do what its user asks for.

        Raises:
          LinkProtocolError: if there is no such operation.
          Exception: what it raises.

        """
        function = self._operations.get(operation)
        if function is None:
            raise LinkProtocolError(f"a node has no operation {operation!r:.40}")
        return await function(*arguments)

    async def _digest(self, path: str) -> str:
        """Return the digest of a copy of its user's files."""
        return await trio.to_thread.run_sync(digest_of_tree, Path(path))

    async def _saved(self) -> tuple[SavedSandbox, ...]:
        return await trio.to_thread.run_sync(saved_sandboxes, self._cache)

    async def _find(self, name: str) -> NamedTemplate | None:
        """Return the sandbox that was saved as that; None if none was."""
        try:
            return await trio.to_thread.run_sync(self._named.find, name)
        except UnknownTemplateError:
            return None

    async def _remove(self, name: str, marker: bytes | None = None) -> int | None:
        """Remove the sandbox that was saved as that, or only the one of that marker; return the bytes that came free, None if there is none."""
        if marker is not None and ((found := await self._find(name)) is None or found.marker != marker):
            return None
        try:
            return await trio.to_thread.run_sync(partial(self._named.remove, name))
        except UnknownTemplateError:
            return None
