"""A fleet's host has what a host has: the same methods, with the same arguments."""

from __future__ import annotations

import inspect

import pytest

from trio_sandbox import Host, open_host
from trio_sandbox.fleet import FleetHost, open_ray_host

#: What only one of the two has, and why.
ONLY_HOST = {"accelerator": "each node has its own: `Sandbox.accelerator` says it"}
ONLY_FLEET = {
    "saved_sandboxes": "of one machine a function tells them, without a host",
    "remove_saved_sandbox": "the same",
}
#: What returns numbers of another shape.
OTHER_RESULT = {"statistics"}


def surface(kind: type[object]) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def parameters(function: object) -> list[tuple[str, object, object, object]]:
    assert callable(function)
    return [
        (each.name, each.kind, each.default, each.annotation)
        for each in inspect.signature(function).parameters.values()
    ]


def test_both_have_the_same_members() -> None:
    assert surface(Host) - surface(FleetHost) == set(ONLY_HOST)
    assert surface(FleetHost) - surface(Host) == set(ONLY_FLEET)


@pytest.mark.parametrize("name", sorted(surface(Host) - set(ONLY_HOST)))
def test_a_method_takes_and_returns_the_same(name: str) -> None:
    ours, theirs = getattr(Host, name), getattr(FleetHost, name)
    assert parameters(theirs) == parameters(ours)
    assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours)
    if name not in OTHER_RESULT:
        assert inspect.signature(theirs).return_annotation == inspect.signature(ours).return_annotation


def test_both_are_opened_with_the_same_configuration() -> None:
    (config,) = parameters(open_host)
    assert config in parameters(open_ray_host)
