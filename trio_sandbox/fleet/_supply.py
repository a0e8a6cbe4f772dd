"""Who gets an image from where: it is built on the first node that needs it, and goes from there to each of the others once."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import attrs
import trio

from .._errors import ImageBuildError, ImageMissingError, SandboxError, UnknownImageError
from .._image import AnyImage, Image
from .._image_steps import FilesStep, Step
from .._observe import part_logger
from ..image import digest_of_tree
from ._client import NodeClient
from ._messages import Call, Fetch, FetchSaved, Lend, LendSaved, Lent, NodeAddress, Prepare
from ._saved import Located
from ._trees import deliver

_log = part_logger("fleet")

#: Nodes that fetch from one node at a time: each that has finished is one more to fetch from.
_MOST_LOANS: Final = 4
#: Seconds for a node to say whether it has an image; one that takes longer is asked when it needs the image.
_LOOK: Final = 10.0


@final
@attrs.define(eq=False)
class _Item:
    """What is known of one image."""

    nodes: set[str] = attrs.field(factory=set[str])
    """The nodes that have it."""
    first: trio.Lock = attrs.field(factory=trio.Lock)
    """Held while nobody is known to have it."""
    fetching: dict[str, trio.Lock] = attrs.field(factory=dict[str, trio.Lock])
    """Held while a node fetches it."""


@final
@attrs.define(eq=False)
class _Named:
    """What is known of an image with files of this machine."""

    name: str | None = None
    """The name of its top layer, by which nodes find it; None: nobody has built it."""
    naming: trio.Lock = attrs.field(factory=trio.Lock)


@final
class Supply:
    """Sees to it that nodes have the images that they need.

    Args:
      clients: Returns the nodes that are not lost.

    """

    def __init__(self, clients: Callable[[], Iterable[NodeClient]]) -> None:
        self._clients = clients
        self._items: dict[AnyImage, _Item] = {}
        self._named: dict[tuple[AnyImage, tuple[str, ...]], _Named] = {}
        self._loans: dict[str, trio.CapacityLimiter] = {}
        self._bringing: WeakValueDictionary[tuple[str, bytes], trio.Lock] = WeakValueDictionary()

    async def read(self, image: AnyImage) -> tuple[str, ...]:
        """Return the digests of the files of this machine that *image* has, as they are now.

        Raises:
          ImageBuildError: if one can't be read.

        """
        await trio.lowlevel.checkpoint()
        return tuple([await trio.to_thread.run_sync(digest_of_tree, source) for source in _sources_of(image)])

    async def provide(self, client: NodeClient, image: AnyImage, digests: tuple[str, ...]) -> AnyImage:
        """Have *image* on a node: as it is there, or else from a node that has it, or else built there.

        Tasks that need it on other nodes wait while the first is built. Files of this machine go to the node that builds it, and
        nowhere else. Cancelled, what was begun is given up.

        Args:
          client: The node.
          image: What is wanted.
          digests: What `read` has returned for it.

        Returns:
          What to call it there.

        Raises:
          ImageBuildError: if there is no room for it, it can't be built, or files have changed since.
          Exception: besides, what `Host.prepare` raises there, and what `NodeClient.request` does.

        """
        if not digests:
            await self._provide(client, image)
            return image
        named = self._named.setdefault((image, digests), _Named())
        while True:
            async with named.naming:
                built = named.name is None
                if named.name is None:
                    named.name = await self._build_with_files(client, image, digests)
                name = named.name
            try:
                await self._provide(client, name)
            except (UnknownImageError, ImageMissingError):
                if built:
                    raise
                named.name = None  # it was evicted everywhere
            else:
                return name

    async def _build_with_files(self, client: NodeClient, image: AnyImage, digests: tuple[str, ...]) -> str:
        assert isinstance(image, Image)
        copies: dict[Path, Path] = {}
        async with AsyncExitStack() as stack:
            for source, digest in zip(_sources_of(image), digests, strict=True):
                if source in copies:
                    continue
                try:
                    copy = await stack.enter_async_context(deliver(client, source, _unreadable))
                except OSError as exc:
                    raise ImageBuildError(
                        f"{source} can't be copied to node {client.name}: {exc.strerror or exc}; nothing was built"
                    ) from exc
                if await client.request(Call("digest", (str(copy),)), f"comparing {source}") != digest:
                    raise ImageBuildError(
                        f"{source} changed while it was copied to node {client.name}; it is safe to try again"
                    )
                copies[source] = copy
            there = attrs.evolve(image, steps=tuple(_moved(step, copies) for step in image.steps))
            name: str = await client.request(Prepare(there), f"preparing image {image!s:.200}")
        self._items.setdefault(name, _Item()).nodes.add(client.name)
        return name

    async def _provide(self, client: NodeClient, image: AnyImage) -> None:
        """Do `provide` for what has no files of this machine."""
        item = self._items.setdefault(image, _Item())
        if client.name in item.nodes:
            await trio.lowlevel.checkpoint()
            return
        async with item.first:
            if not self._sources(item, client):
                await self._locate(item, client, image)
            if client.name not in item.nodes and not self._sources(item, client):
                await self._build(item, client, image)
        async with item.fetching.setdefault(client.name, trio.Lock()):
            if client.name not in item.nodes:
                await self._fetch(item, client, image)

    def _sources(self, item: _Item, besides: NodeClient) -> list[NodeClient]:
        return [client for client in self._clients() if client.name in item.nodes and client is not besides]

    async def _locate(self, item: _Item, client: NodeClient, image: AnyImage) -> None:
        """Find out who has it: first that node, and only if it does not, all of them."""

        async def look(client: NodeClient) -> None:
            try:
                if await client.request(Call("has", (image,)), "looking for an image"):
                    item.nodes.add(client.name)
            except (SandboxError, OSError) as exc:
                _log.info("node %s did not say whether it has image %s: %s", client.name, image, exc)

        await look(client)
        if client.name not in item.nodes:
            with trio.move_on_after(_LOOK):
                async with trio.open_nursery() as nursery:
                    for other in self._clients():
                        if other is not client:
                            nursery.start_soon(look, other)

    async def _build(self, item: _Item, client: NodeClient, image: AnyImage) -> None:
        await client.request(Prepare(image), f"preparing image {image!s:.200}")
        item.nodes.add(client.name)

    async def _fetch(self, item: _Item, client: NodeClient, image: AnyImage) -> None:
        """Have it from one of those that have it; from none of them, it is built."""
        tried: set[str] = set()
        while sources := [source for source in self._sources(item, client) if source.name not in tried]:
            source = random.choice(sources)
            tried.add(source.name)
            try:
                await self._fetch_from(source, client, image)
            except ImageBuildError:
                raise  # there is no room for it: no other source changes that
            except Exception as exc:  # whatever comes of what another node says: the image is to be had elsewhere
                if client.failure is not None:
                    raise
                if isinstance(exc, ImageMissingError):
                    item.nodes.discard(source.name)  # it was evicted there
                _log.warning("node %s could not fetch image %s from node %s: %s", client.name, image, source.name, exc)
            else:
                item.nodes.add(client.name)
                return
        await self._build(item, client, image)

    async def _fetch_from(self, source: NodeClient, client: NodeClient, image: AnyImage) -> None:
        async with self._borrowed(source, Lend(image)) as (address, lent):
            await client.request(Fetch(image, address, lent), f"fetching image {image!s:.200}")
            _log.info("node %s has fetched image %s from node %s", client.name, image, source.name)

    @asynccontextmanager
    async def _borrowed(
        self, source: NodeClient, message: Lend | LendSaved
    ) -> AsyncGenerator[tuple[NodeAddress, Lent]]:
        """Have a node lend something for a block; yield where it is, for another node, and what it says."""
        limiter = self._loans.setdefault(source.name, trio.CapacityLimiter(_MOST_LOANS))
        async with limiter, source.hold(message, "lending to another node") as lent:
            assert isinstance(lent, Lent)
            yield attrs.evolve(source.address, secret=b""), lent

    # --- Saved sandboxes ---

    async def provide_saved(self, client: NodeClient, located: Located) -> bool:
        """Have a saved sandbox on a node that did not have it: fetched from one that does. Cancelled, nothing of it is left there.

        Returns:
          Whether it is there. If not, the node can't go on from it, or have it; why is logged.

        Raises:
          Exception: what `NodeClient.request` raises when that node is lost, or all of those are that have it.

        """
        saved = located.saved
        async with self._bringing.setdefault((client.name, saved.marker), trio.Lock()):
            there = await client.request(Call("find", (saved.name,)), "looking for a saved sandbox")
            if there is not None and there.marker == saved.marker:
                return True
            failure: Exception | None = None
            for source in self._having(located):
                try:
                    async with self._borrowed(source, LendSaved(saved.name, saved.marker)) as (address, lent):
                        await client.request(FetchSaved(address, lent), f"fetching the saved sandbox {saved.name!r}")
                except Exception as exc:  # as with images: another node may have it whole
                    if client.failure is not None:
                        raise
                    failure = exc
                    _log.warning(
                        "node %s could not fetch the saved sandbox %r from node %s: %s",
                        client.name,
                        saved.name,
                        source.name,
                        exc,
                    )
                else:
                    _log.info("node %s has fetched the saved sandbox %r from %s", client.name, saved.name, source.name)
                    return True
            if failure is not None and not self._having(located):
                raise failure
            return False

    def _having(self, located: Located) -> list[NodeClient]:
        return [client for client in self._clients() if client.name in located.nodes]


def _sources_of(image: AnyImage) -> list[Path]:
    """Return the files of this machine that an image has, in the order of its steps."""
    steps = image.steps if isinstance(image, Image) else ()
    return [source for step in steps if isinstance(step, FilesStep) for _, source in step.places]


def _moved(step: Step, copies: Mapping[Path, Path]) -> Step:
    """Return a step that takes *copies* of the files."""
    if not isinstance(step, FilesStep):
        return step
    return FilesStep(tuple((target, copies[source]) for target, source in step.places))


def _unreadable(source: Path, path: str | Path, exc: OSError) -> ImageBuildError:
    return ImageBuildError(f"{path or source} can't be read for an image: {exc.strerror}")
