"""What somebody else than its user can ask of a fleet: how its nodes are, and to have one drained. By way of Ray alone, and blocking."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from .._errors import FleetError
from ._actor import NodeReport
from ._ray import NAMESPACE, import_ray

#: Seconds for a node to say how it is, and to end once it is drained.
_PATIENCE: Final = 30.0


@contextmanager
def _actors(address: str) -> Generator[tuple[Any, dict[str, Any]]]:
    """Yield Ray, and the processes of all fleets on it by their names."""
    ray = import_ray()
    connected = ray.is_initialized()
    if not connected:
        try:
            ray.init(address=address, log_to_driver=False, namespace=NAMESPACE)
        except (ConnectionError, RuntimeError, OSError) as exc:
            raise FleetError(f"there is no Ray cluster at {address!r}: {exc}") from exc
    try:
        found: dict[str, Any] = {}
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] == NAMESPACE:
                try:
                    found[each["name"]] = ray.get_actor(each["name"], namespace=NAMESPACE)
                except ValueError:
                    continue  # it has ended meanwhile
        yield ray, found
    finally:
        if not connected:
            ray.shutdown()


def _ask(ray: Any, actors: dict[str, Any]) -> dict[str, NodeReport]:
    asked = {name: actor.status.remote() for name, actor in actors.items()}
    reports: dict[str, NodeReport] = {}
    for name, reference in asked.items():
        try:
            reports[name] = ray.get(reference, timeout=_PATIENCE)
        except ray.exceptions.RayError:
            continue  # it is gone, or does not answer: its user knows more
    return reports


def read_reports(address: str = "auto") -> list[NodeReport]:
    """Return how the nodes of all fleets on a Ray cluster are: one for each node and each program that uses it.

    It blocks. In a program that is connected to Ray already, that cluster is asked, whatever *address* says.

    Raises:
      ModuleNotFoundError: if the extra ``ray`` is not installed.
      FleetError: if there is no such cluster.

    """
    with _actors(address) as (ray, actors):
        return sorted(_ask(ray, actors).values(), key=lambda report: report.name)


def drain_node(name: str, *, timeout: float | None = None, address: str = "auto") -> int:
    """Have a node open no more sandboxes, wait until it has none, and end it. It blocks.

    Args:
      name: The node's name, as `Sandbox.node` says it.
      timeout: Seconds to wait, after which sandboxes that are left end with it; None: for ever.
      address: Of Ray's cluster; see `read_reports`.

    Returns:
      How many sandboxes were left, and ended.

    Raises:
      ModuleNotFoundError: if the extra ``ray`` is not installed.
      FleetError: if there is no such cluster, or no such node; the message names those that there are.

    """
    with _actors(address) as (ray, actors):
        reports = _ask(ray, actors)
        wanted = [actors[each] for each, report in reports.items() if report.name == name]
        if not wanted:
            names = ", ".join(sorted({report.name for report in reports.values()})) or "none"
            raise FleetError(f"no fleet has a node {name!r}; there are: {names}")
        drained = [actor.drain.remote(timeout) for actor in wanted]
        left = 0
        for reference in drained:
            try:
                left += ray.get(reference, timeout=None if timeout is None else timeout + 2 * _PATIENCE)
            except ray.exceptions.RayActorError:
                continue  # its user went meanwhile, and it with it
        return left
