"""The process of a node: Trio in a thread of its own, with a host, for as long as its user is there."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any, Final, NoReturn, final

import attrs
import trio

from .._config import HostConfig
from .._errors import FleetError, NodeLostError, SandboxError
from .._metadata import version
from .._observe import part_logger
from ..host import Host, HostStatistics, open_host
from ..image import default_cache_directory
from ..machines import SavedSandbox, TemplateStore, saved_sandboxes
from ._config import FleetConfig
from ._messages import Answered, Failure, NodeAddress, encode
from ._metrics import OF_A_NODE, Gauges
from ._node import Node, serve_node
from ._progress import ProgressNotes
from ._stock import Stock

_log = part_logger("fleet")

#: Seconds between two looks at what has changed.
_LOOK: Final = 1.0
#: Seconds that an end of this node may take, when somebody else than its user wants it.
_END_PATIENCE: Final = 30.0


@final
class NodeProcess:
    """What Ray runs on each node: an actor, whose methods are called in other threads than the one that Trio runs in.

    Args:
      program_version: That of the library in the program: here it must be the same, or the two would not understand each other.
      name: What to call the node.
      address: Where it is to listen.
      config: How its host works.
      fleet: How the fleet works.

    """

    def __init__(self, program_version: str, name: str, address: str, config: HostConfig, fleet: FleetConfig) -> None:
        self._name = name
        self._address = address
        self._config = config
        self._fleet = fleet
        self._notes = ProgressNotes()
        self._token: trio.lowlevel.TrioToken | None = None
        self._node: Node | None = None
        self._scope = trio.CancelScope()
        self._where: NodeAddress | None = None
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trio-sandbox", daemon=True)
        if program_version == version():
            self._thread.start()
            return
        self._failure = FleetError(
            f"node {name} has version {version()} of trio-sandbox, and this program has {program_version}: install the same on both"
        )
        self._started.set()
        self._ended.set()

    def _run(self) -> None:
        try:
            _restore_priority()
            trio.run(self._serve)
        except BaseException as exc:  # noqa: ASYNC103, BLE001 - outside of Trio; whoever waits for the start, or asks later, is told
            self._failure = exc
            _log.exception("node %s ended", self._name)
        finally:
            self._started.set()
            self._ended.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            config = attrs.evolve(self._config, progress=self._notes)
            async with open_host(config) as host, trio.open_nursery() as nursery:
                self._where, node = await nursery.start(self._serve_node, host)
                self._node = node
                nursery.start_soon(self._tell_numbers, node)
                # Ray's modules are most of what is there, and stay: each look of the collector at them would hold up every sandbox.
                gc.freeze()
                self._started.set()

    async def _serve_node(self, host: Host, *, task_status: trio.TaskStatus[tuple[NodeAddress, Node]]) -> None:
        await serve_node(
            host,
            Stock.of(host),
            self._notes,
            self._name,
            address=self._address,
            lease=self._fleet.lease,
            patience=self._fleet.start_timeout,
            task_status=task_status,
        )

    async def _tell_numbers(self, node: Node) -> NoReturn:
        """Tell Ray's metrics how the node is."""
        gauges = Gauges(OF_A_NODE, node=self._name)
        while True:
            gauges.tell(node.statistics())
            await trio.sleep(_LOOK)

    # --- What Ray calls ---

    def start(self) -> bytes:
        """Wait until the node is there, and return a message: an `Answered` with its address, or a `Failure`.

        In our own words, since not every exception survives being raised through Ray.
        """
        self._started.wait()
        if isinstance(self._failure, Exception):
            return encode(Failure(self._failure))
        if self._where is None:
            return encode(Failure(NodeLostError(f"node {self._name} has ended already", node=self._name)))
        return encode(Answered(self._where))

    def status(self) -> NodeReport:
        """Return what the node is like now."""
        host = None if self._node is None or self._ended.is_set() else self._call(self._node.statistics)
        report = NodeReport(self._name, host, self._node is not None and self._node.draining)
        cache = self._config.cache_dir or default_cache_directory()
        try:
            templates = TemplateStore(cache, budget_mib=self._config.template_budget_mib).list()
            saved = saved_sandboxes(cache)
        except (SandboxError, OSError) as exc:
            return attrs.evolve(report, problem=f"can't say what its cache has: {exc}")
        described = tuple(TemplateReport(each.key, each.image, each.memory_mib, each.vcpus) for each in templates)
        return attrs.evolve(report, templates=described, saved=saved)

    def drain(self, seconds: float | None) -> int:
        """Open no more sandboxes, wait until there are none, and end the node; past the deadline with those that are left.

        Returns:
          How many sandboxes were left, and ended with it.

        """
        if self._node is None or self._ended.is_set():
            return 0
        try:
            left: int = trio.from_thread.run(self._node.drain, seconds, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):  # noqa: ASYNC103 - this thread is none of Trio's
            return 0  # noqa: ASYNC104 - its user went meanwhile, and it with it
        self.stop()
        return left

    def stop(self) -> None:
        """End the node, and all that it has."""
        if not self._ended.is_set():
            self._call(self._scope.cancel)
        self._ended.wait(_END_PATIENCE)

    def _call(self, function: Any) -> Any:
        try:
            return trio.from_thread.run_sync(function, trio_token=self._token)
        except trio.RunFinishedError:
            return None


def _restore_priority() -> None:
    """Have this thread, and what it starts, be as important as Ray itself.

    Ray makes its workers less important, by 15. Every answer of a guest would wait for whatever else the machine does; and our
    virtual machines are less important than the process that serves them in any case.
    """
    wanted = os.getpriority(os.PRIO_PROCESS, os.getppid())
    if wanted < os.getpriority(os.PRIO_PROCESS, 0):
        try:
            os.setpriority(os.PRIO_PROCESS, 0, wanted)  # of this thread, on Linux
        except PermissionError:
            _log.info("sandboxes here are slow while other programs are busy: start Ray with RAY_worker_niceness=0")


@final
@attrs.frozen
class TemplateReport:
    """A template that a node has: sandboxes of that configuration start from it there."""

    key: str
    """What ``trio-sandbox template list`` on that node calls it."""
    image: str
    """The name of the image."""
    memory_mib: int
    """Its RAM, in MiB."""
    vcpus: int
    """Its virtual CPUs."""


@final
@attrs.frozen
class NodeReport:
    """What a node's process says of it."""

    name: str
    """What it is called."""
    host: HostStatistics | None
    """Numbers about its host; None: it has ended, or does not say."""
    draining: bool
    """Whether it opens no more sandboxes."""
    templates: tuple[TemplateReport, ...] = ()
    """What is in its cache: templates, the one that was used last first."""
    saved: tuple[SavedSandbox, ...] = ()
    """Sandboxes that were saved there, by name."""
    problem: str = ""
    """What it does not say of this, and why; "" if it says all."""
