"""Saved sandboxes of a fleet: each is on the disk of the node where it was saved."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, final

import attrs
import trio

from .._errors import (
    OutcomeUnknownError,
    SandboxClosedError,
    SandboxError,
    TemplateError,
    TemplateExistsError,
    UnknownTemplateError,
)
from .._observe import part_logger
from ..machines import NamedTemplate, SavedSandbox, check_template_name
from ._client import NodeClient
from ._messages import Call

_log = part_logger("fleet")


@final
@attrs.frozen
class Located:
    """A saved sandbox, and the nodes that have it."""

    saved: NamedTemplate
    nodes: frozenset[str]
    refused: frozenset[str] = frozenset()
    """The nodes that it can't be brought to: they have another of that name, or could not go on from it."""

    def without(self, node: str) -> Located:
        """Return the same, with one more node that it can't be brought to."""
        return attrs.evolve(self, refused=self.refused | {node})


@final
class SavedSandboxes:
    """What was saved on the nodes of a fleet.

    Args:
      clients: Returns the nodes that are not lost.

    """

    def __init__(self, clients: Callable[[], Iterable[NodeClient]]) -> None:
        self._clients = clients

    async def list_all(self) -> dict[str, tuple[SavedSandbox, ...]]:
        """What `FleetHost.saved_sandboxes` does."""
        return await self._ask_all("saved")

    async def find(self, name: str) -> Located:
        """Return the newest that was saved as *name*, and where it is.

        Raises:
          TypeError, ValueError: for what can't be a name.
          UnknownTemplateError: if no node has it.
          TemplateUnusableError: if it is damaged, or of another version, on every node that has it.

        """
        check_template_name(name)
        failures: list[TemplateError] = []
        found: dict[str, NamedTemplate | None] = await self._ask_all("find", name, failures=failures)
        known = {node: saved for node, saved in found.items() if saved is not None}
        if not known:
            if failures:
                raise failures[0]
            names = sorted({saved.name for each in (await self.list_all()).values() for saved in each})
            raise UnknownTemplateError(
                f"no node of the fleet has a saved sandbox {name!r}; there are: {', '.join(names) or 'none'}"
            )
        newest = max(known.values(), key=lambda saved: saved.created)
        # It may have been brought to several, or several share a disk.
        nodes = frozenset(node for node, saved in known.items() if saved.marker == newest.marker)
        return Located(newest, nodes, frozenset(known) - nodes)

    @asynccontextmanager
    async def saving(self, name: str, *, on: str, replace: bool) -> AsyncGenerator[None]:
        """Have something saved as *name* on a node in the block; what other nodes have of that name is refused before, or removed after.

        What was there before is known by its marker: clocks of nodes differ. Failing to remove it is no reason to say that nothing was saved.

        Raises:
          TemplateExistsError: if another node has that name, and nothing is to be replaced.

        """
        others = [client for client in self._clients() if client.name != on]
        try:
            found = await self._find_on(others, name)
        except (SandboxError, OSError) as exc:
            if not replace:
                raise
            _log.warning("saved sandboxes %r of other nodes are not removed: %s", name, exc)
            found = {}
        if found and not replace:
            raise TemplateExistsError(
                f"there is a saved sandbox {name!r} on node {min(found)} already; choose another name, say replace=True, or "
                f"remove it with `await host.remove_saved_sandbox({name!r})`"
            )
        yield
        if found:
            await self._remove_all(name, {saved.marker for saved in found.values()}, others)

    async def _find_on(self, clients: Iterable[NodeClient], name: str) -> dict[str, NamedTemplate]:
        found: dict[str, NamedTemplate | None] = await self._ask_all("find", name, failures=[], clients=clients)
        return {node: saved for node, saved in found.items() if saved is not None}

    async def _remove_all(self, name: str, markers: Container[bytes], clients: Sequence[NodeClient]) -> None:
        try:
            found = await self._find_on(clients, name)  # it may have been brought to others meanwhile
            for client in clients:
                if (saved := found.get(client.name)) is not None and saved.marker in markers:
                    await client.request(Call("remove", (name, saved.marker)), "removing what was saved anew elsewhere")
        except (SandboxError, OSError) as exc:
            _log.warning("an older saved sandbox %r may be left on a node: %s", name, exc)

    async def remove(self, name: str) -> int:
        """What `FleetHost.remove_saved_sandbox` does."""
        check_template_name(name)
        freed: dict[str, int | None] = await self._ask_all("remove", name)
        removed = [count for count in freed.values() if count is not None]
        if not removed:
            await self.find(name)  # which says what there is
        return sum(removed)

    async def _ask_all(
        self,
        operation: str,
        *arguments: object,
        failures: list[TemplateError] | None = None,
        clients: Iterable[NodeClient] | None = None,
    ) -> dict[str, Any]:
        """Ask all nodes at once; one that is lost meanwhile has nothing.

        Errors about a saved sandbox are added to *failures*, if that is given; all others are raised.
        """
        answers: dict[str, Any] = {}
        errors: list[Exception] = []

        async def ask(client: NodeClient) -> None:
            try:
                answers[client.name] = await client.request(Call(operation, arguments), "asking for saved sandboxes")
            except Exception as exc:  # noqa: BLE001 - the first is raised outside, in no group
                if failures is not None and isinstance(exc, TemplateError):
                    failures.append(exc)
                elif not (client.failure is not None and isinstance(exc, (SandboxClosedError, OutcomeUnknownError))):
                    errors.append(exc)

        asked = list(self._clients() if clients is None else clients)
        async with trio.open_nursery() as nursery:
            for client in asked:
                nursery.start_soon(partial(ask, client))
        if errors:
            raise errors[0]
        return {client.name: answers[client.name] for client in asked if client.name in answers}
