"""What somebody else than its user can ask of a fleet: how its nodes are, and to have one drained. By way of Ray alone, and blocking."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from .._errors import FleetError
from ._actor import NodeReport
from ._connection import NAMESPACE
from ._ray import alive_nodes, import_ray

#: Seconds for a node to say how it is, and to end once it is drained.
_PATIENCE: Final = 30.0
#: More seconds than anybody waits, and Ray and Trio can reckon with.
_FOR_EVER: Final = 1e12


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
    """Return what they say within `_PATIENCE` seconds in all; of one that says nothing, that."""
    asked = {name: actor.status.remote() for name, actor in actors.items()}
    nodes = {node.id: node.name for node in alive_nodes(ray)}
    until = time.monotonic() + _PATIENCE
    reports: dict[str, NodeReport] = {}
    for name, reference in asked.items():
        try:
            reports[name] = ray.get(reference, timeout=max(until - time.monotonic(), 0))
        except ray.exceptions.ActorDiedError:
            continue  # it has ended meanwhile
        except ray.exceptions.GetTimeoutError:
            problem = f"does not answer within {_PATIENCE:g} s"
        except ray.exceptions.RayError as exc:
            problem = f"can't say: {getattr(exc, 'cause', None) or exc}"
        else:
            continue
        if (node := nodes.get(name.partition(":")[0])) is not None:
            reports[name] = NodeReport(node, None, draining=False, problem=problem)
    return reports


def read_reports(address: str = "auto") -> list[NodeReport]:
    """Return how the nodes of all fleets on a Ray cluster are: one for each node and each program that uses it.

    Of a node that does not answer within 30 seconds, `NodeReport.problem` says so. It blocks. In a program that is connected to Ray already, that cluster is asked, whatever *address* says.

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
      timeout: Seconds to wait, from 0, after which sandboxes that are left end with it; None: for ever.
      address: Of Ray's cluster; see `read_reports`.

    Returns:
      How many sandboxes were left, and ended.

    Raises:
      TypeError, ValueError: if an argument is something else; nothing was done.
      ModuleNotFoundError: if the extra ``ray`` is not installed.
      FleetError: if there is no such cluster, or no such node; the message names those that there are. Or the node did not end in
        time; it opens no more sandboxes as soon as it hears of it, and it is safe to try again.

    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`name` must be str, not {name!r:.100}")
    timeout = _check_timeout(timeout)
    with _actors(address) as (ray, actors):
        reports = _ask(ray, actors)
        wanted = [actors[each] for each, report in reports.items() if report.name == name]
        if not wanted:
            names = ", ".join(sorted({report.name for report in reports.values()})) or "none"
            raise FleetError(f"no fleet has a node {name!r}; there are: {names}")
        drained = [actor.drain.remote(timeout) for actor in wanted]
        until = None if timeout is None else time.monotonic() + timeout + 2 * _PATIENCE
        left = 0
        for reference in drained:
            try:
                left += ray.get(reference, timeout=None if until is None else max(until - time.monotonic(), 0))
            except ray.exceptions.ActorDiedError:
                continue  # its user went meanwhile, and it with it
            except ray.exceptions.GetTimeoutError as exc:
                raise FleetError(
                    f"node {name!r} was told to end, and has not {2 * _PATIENCE:g} s after the timeout: it hangs, or Ray can't reach it"
                ) from exc
            except ray.exceptions.RayError as exc:
                raise FleetError(f"it is not known whether node {name!r} is drained: {exc}") from exc
        return left


def _check_timeout(timeout: object) -> float | None:
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"`timeout` must be a number of seconds or None, not {timeout!r:.100}")
    if not timeout >= 0:  # NaN is not, either
        raise ValueError(f"`timeout` must be a number of seconds from 0, not {timeout!r:.100}")
    return timeout if timeout < _FOR_EVER else None
