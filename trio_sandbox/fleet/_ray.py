"""A fleet on Ray: it starts a process on each node of its cluster, and says which nodes there are.

Ray is asked seldom, and by other threads: when a fleet is opened, when a node joins, and once a second which are alive. What sandboxes and
their user say to each other never goes through it.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any, Final, final

import attrs
import trio

from .._config import HostConfig
from .._entries import open_block
from .._errors import FleetError, NodeLostError
from .._metadata import version
from .._nurseries import hide_nursery
from .._observe import part_logger
from ._actor import NodeProcess
from ._config import FleetConfig
from ._connection import NAMESPACE, connected
from ._demand import SLOTS, Demands
from ._host import FleetHost, open_fleet
from ._members import Members
from ._messages import Failure, NodeAddress, decode_all
from ._metrics import OF_A_FLEET, Gauges
from ._security import check_extra
from ._travel import host_there

_log = part_logger("fleet")

#: Seconds between two looks which nodes there are.
_LOOK: Final = 1.0
#: Calls of one actor that are served at a time: one may wait for a drain, and others are to be answered.
_CONCURRENCY: Final = 8
#: Seconds for Ray to say what became of a process of ours.
_ASK_PATIENCE: Final = 30.0
#: Seconds for the processes of nodes to end by themselves.
_END_PATIENCE: Final = 30.0
#: Seconds for Ray to take note that they are to be killed: its head may be gone.
_KILL_PATIENCE: Final = 10.0


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
      ModuleNotFoundError: if it, or what links need, is not installed.

    """
    check_extra()
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "a fleet needs Ray, which is not installed; nothing was started. Install the extra: pip install 'trio-sandbox[ray]'",
            name=exc.name,
        ) from None


async def result(reference: Any) -> Any:
    """Wait for the result of a call of Ray's; cancelled, the call goes on."""
    done, token = trio.Event(), trio.lowlevel.current_trio_token()
    future = reference.future()

    def tell(_: object) -> None:
        try:
            token.run_sync_soon(done.set)
        except trio.RunFinishedError:
            pass  # nobody waits any more

    future.add_done_callback(tell)
    await done.wait()
    return future.result()


@final
@attrs.frozen
class RayNode:
    """A node of Ray's."""

    id: str
    name: str
    """What to call it: its host's name, and the beginning of its id, as there may be several on one host."""
    address: str
    slots: int | None
    """How many sandboxes it may have; None: nobody has said."""


def alive_nodes(ray: Any) -> list[RayNode]:
    """Return the nodes that there are."""
    return [
        RayNode(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']}-{node['NodeID'][:8]}",
            address=node["NodeManagerAddress"],
            slots=int(node["Resources"][SLOTS]) if SLOTS in node["Resources"] else None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def usable(nodes: list[RayNode], *, with_slots_only: bool) -> list[RayNode]:
    """Return those that may be given sandboxes: those with the resource `SLOTS`, or else all, unless only such ones will do."""
    with_slots = [node for node in nodes if node.slots is not None]
    return with_slots if with_slots or with_slots_only else nodes


@final
class _Supervisor:
    """Has a process of ours on each node of Ray's, and the fleet know of it."""

    def __init__(self, ray: Any, config: HostConfig, fleet: FleetConfig) -> None:
        self._ray = ray
        self._config = config
        self._fleet = fleet
        self._user = secrets.token_hex(4)
        self._actors: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._explained: set[str] = set()
        self._demands = Demands(ray)
        self._failures = (ray.exceptions.RayError, OSError, RuntimeError)  # what Ray raises when its head is gone

    async def start_all(self, members: Members) -> None:
        """Start a process on each node that is there now.

        Raises:
          Exception: what the first raised, if none could be started.

        """
        failures: list[Exception] = []

        async def start(node: RayNode) -> None:
            try:
                await self._start(node, members)
            except Exception as exc:  # noqa: BLE001 - raised if no node has come about
                failures.append(exc)
                _log.warning("node %s could not be started, and others go on: %s", node.name, exc)

        nodes = self._usable(await trio.to_thread.run_sync(alive_nodes, self._ray, abandon_on_cancel=True))
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(start, node)
        if failures and len(failures) == len(nodes):
            raise failures[0]

    def _usable(self, nodes: list[RayNode]) -> list[RayNode]:
        return usable(nodes, with_slots_only=self._fleet.autoscaling)

    async def _start(self, node: RayNode, members: Members) -> None:
        self._names[node.id] = node.name
        try:
            with trio.fail_after(self._fleet.start_timeout):
                await trio.to_thread.run_sync(self._start_process, node, abandon_on_cancel=True)
                (answer,) = decode_all(await result(self._actors[node.id].start.remote()))
        except trio.TooSlowError as exc:
            raise FleetError(f"node {node.name} did not start within {self._fleet.start_timeout:g} s") from exc
        except self._ray.exceptions.RayError as exc:
            raise FleetError(f"node {node.name} did not start: {exc}") from exc
        if isinstance(answer, Failure):
            answer.error.add_note(f"on node {node.name}")
            raise answer.error
        where: NodeAddress = answer.value
        await members.join(where, node.slots)

    def _start_process(self, node: RayNode) -> None:
        """Have a process of ours on a node. It blocks: Ray's head is asked whether its name is free."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        self._actors[node.id] = (
            self._ray.remote(NodeProcess)
            .options(
                name=f"{node.id}:{self._user}",
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=0,
                max_concurrency=_CONCURRENCY,
                scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(version(), node.name, node.address, self._config, self._fleet)
        )

    async def watch(self, members: Members) -> None:
        """Look which nodes there are, until cancelled: have those that are new join, and say which are gone. Tell Ray who waits."""
        gauges = Gauges(OF_A_FLEET, user=self._user)
        answers = True
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(_LOOK)
                try:
                    await self._look(members, nursery)
                    answers = True
                except self._failures as exc:
                    if answers:
                        _log.warning("Ray does not answer, and sandboxes that are open go on: %s", exc)
                    answers = False
                gauges.tell(members.statistics())

    async def _look(self, members: Members, nursery: trio.Nursery) -> None:
        nodes = await trio.to_thread.run_sync(alive_nodes, self._ray, abandon_on_cancel=True)
        for gone in self._names.keys() - {node.id for node in nodes}:
            members.lose(self._names[gone], "Ray says that it is gone")
        for node in self._usable(nodes):
            if node.id not in self._names:
                self._names[node.id] = node.name
                nursery.start_soon(self._join_later, node, members)
        for node_id, name in self._names.items():
            if node_id not in self._explained and (failure := members.failure(name)) is not None:
                self._explained.add(node_id)
                nursery.start_soon(self._explain, self._actors[node_id], failure)
        if self._fleet.autoscaling or any(node.slots is not None for node in nodes):
            there = [node.id for node in nodes if members.has_joined(node.name)]
            await trio.to_thread.run_sync(self._demands.tell, there, members.wants(), abandon_on_cancel=True)

    async def _explain(self, actor: Any, failure: NodeLostError) -> None:
        """Have a node's failure say what Ray knows of the end of our process there: that it was killed for want of memory, for instance."""
        with trio.move_on_after(_ASK_PATIENCE):
            try:
                await result(actor.status.remote())
            except self._ray.exceptions.RayError as exc:
                failure.add_note(f"Ray says of our process there: {exc}")
                _log.warning("%s; Ray says of our process there: %s", failure, exc)

    async def _join_later(self, node: RayNode, members: Members) -> None:
        try:
            await self._start(node, members)
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with one node, the fleet goes on
            _log.warning("node %s has joined Ray, and no sandboxes can be opened there: %s", node.name, exc)

    async def stop(self) -> None:
        """Have all processes end, and kill those that do not. Nobody waits any more."""
        if not self._ray.is_initialized():
            return  # somebody has called ray.shutdown(), which ends them
        with trio.move_on_after(_END_PATIENCE, shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_end)
                for actor in self._actors.values():
                    nursery.start_soon(self._stop, actor)
        with trio.move_on_after(_KILL_PATIENCE, shield=True) as patience:
            await trio.to_thread.run_sync(self._kill_all, abandon_on_cancel=True)
        if patience.cancelled_caught:
            _log.warning("Ray does not answer, and ends the processes of nodes when it does")

    def _kill_all(self) -> None:
        """It blocks: Ray's head is asked."""
        for actor in self._actors.values():
            try:
                self._ray.kill(actor)
            except self._failures as exc:
                _log.warning("Ray did not end a node's process, and does when the program ends: %s", exc)

    async def _tell_end(self) -> None:
        try:
            await trio.to_thread.run_sync(self._demands.tell, (), (), abandon_on_cancel=True)
        except self._failures as exc:
            _log.warning("Ray was not told that nobody waits any more, and is when the program ends: %s", exc)

    async def _stop(self, actor: Any) -> None:
        try:
            await result(actor.stop.remote())
        except self._failures as exc:
            _log.debug("a node's process was gone already: %s", exc)


def _check_address(address: object) -> None:
    if address is None:
        return
    if not isinstance(address, str):
        raise TypeError(f"`address` must be str or None, not {address!r:.100}")
    if not address.strip():
        raise ValueError(f"`address` must be that of Ray's cluster, 'auto' or None, not {address!r}")


@open_block
async def open_ray_host(
    address: str | None = None, config: HostConfig | None = None, fleet: FleetConfig | None = None
) -> AsyncGenerator[FleetHost]:
    """Open a host on each node of a Ray cluster, and yield all of them as one; leaving the block ends every sandbox on every node.

    Each node has a process of this block's own (an actor, which takes no processors of Ray's), with an ordinary host of *config*:
    its budgets, directories and images are those of that node. Nodes that join Ray later join here, too. A node that is lost costs
    its own sandboxes. If this program is killed, its nodes notice at once, and end what they have.

    If a node of Ray's has the custom resource ``trio_sandbox``, only such nodes are used, each for at most so many sandboxes.

    Args:
      address: Of Ray's cluster, "auto" for the one of this machine; None: the one that this program is connected to already, or
        else one of its own, which ends with the block. Fleets that are open at the same time share one connection, which
        ends with the last of them.
      config: How the host of each node works; the default is `HostConfig()`. `HostConfig.progress` is
        called here, with the node's name in each stage, for each stage once a second at most.
      fleet: How the fleet works; the default is `FleetConfig()`.

    Raises:
      ModuleNotFoundError: if the extra ``ray`` is not installed; nothing was started.
      TypeError, ValueError: if an argument is something else, or can't be used on a fleet; nothing was started.
      OSError: if `HostConfig.ca_certificates` can't be read; nothing was started.
      ValueError: if this program is connected to Ray already, and *address* is another; nothing was started.
      FleetError: if Ray can't be started or connected to, or no node starts in time.
      Exception: what `open_host` raises on the nodes, if it does so on all of them; where it does so on some, a warning is logged.

    """
    _check_address(address)
    config = HostConfig() if config is None else config
    fleet = FleetConfig() if fleet is None else fleet
    if not isinstance(config, HostConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`config` must be a HostConfig, not {config!r:.100}")
    if not isinstance(fleet, FleetConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`fleet` must be a FleetConfig, not {fleet!r:.100}")
    there = host_there(config)
    ray = import_ray()
    async with connected(ray, address):
        supervisor = _Supervisor(ray, there, fleet)
        try:
            async with open_fleet(config, fleet) as (host, members):
                await supervisor.start_all(members)
                with hide_nursery("open_ray_host()"):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(supervisor.watch, members)
                        try:
                            yield host
                        finally:
                            nursery.cancel_scope.cancel(reason="the fleet's block was left")
        finally:
            await supervisor.stop()  # noqa: ASYNC102 - it shields itself, and is bounded
