"""The fixtures that pytest-trio runs: within the test's own `trio.run`, each in a task of its own."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest
import pytest_trio  # pyright: ignore[reportMissingTypeStubs]

from . import OPENED, SandboxFactory

if TYPE_CHECKING:
    from trio_sandbox import Host, HostConfig, Image, Sandbox, SandboxConfig

_F = TypeVar("_F", bound=Callable[..., Any])

#: Open sandboxes whose console is kept for the report of a test that opens many.
_REPORTED = 4


def _trio_fixture(function: _F) -> _F:
    # Unlike `pytest.fixture` it does not need `trio_mode`.
    return cast("_F", pytest_trio.trio_fixture(function))  # pyright: ignore[reportUnknownMemberType]


@pytest.fixture
def _sandbox_options(request: pytest.FixtureRequest) -> dict[str, object]:
    """Give what the test's markers say, checked before anything is started."""
    if request.node.get_closest_marker("trio") is None:
        name = request.node.name
        if inspect.iscoroutinefunction(request.function):
            way = "set `trio_mode = true` in pytest's configuration, or mark the test with `@pytest.mark.trio`"
        else:
            way = "make it an `async def`"
        pytest.fail(f"sandboxes live in Trio, and {name} is no test that pytest-trio runs: {way}", pytrace=False)
    options: dict[str, object] = {}
    for mark in reversed(list(request.node.iter_markers("sandbox"))):  # the closest comes last, and wins
        if mark.args:
            pytest.fail(f"the marker `sandbox` takes keyword arguments only, not {mark.args[0]!r}", pytrace=False)
        options |= mark.kwargs
    if wrong := _what_is_wrong(options):  # outside of the exception, which the report would show as well
        pytest.fail(f"the marker `sandbox` of {request.node.name} is wrong: {wrong}", pytrace=False)
    return options


def _what_is_wrong(options: dict[str, object]) -> str:
    try:
        _image_and_config(options)
    except (TypeError, ValueError) as exc:
        return str(exc)
    return ""


def _image_and_config(options: dict[str, object]) -> tuple[str | Image, SandboxConfig]:
    import attrs

    from trio_sandbox import Image, SandboxConfig

    fields: dict[str, Any] = dict(options)
    image = fields.pop("image", "python")
    if not isinstance(image, (str, Image)):
        raise TypeError(f"`image` must be the name of an image, not {image!r}; a trio_sandbox.Image will do, too")
    known = [field.name for field in attrs.fields(SandboxConfig)]
    if wrong := sorted(fields.keys() - set(known)):
        raise TypeError(f"there is no {', '.join(map(repr, wrong))}; there are image, {', '.join(known)}")
    return image, SandboxConfig(**fields)


@_trio_fixture
async def sandbox_host(_sandbox_options: dict[str, object], sandbox_host_config: HostConfig) -> AsyncGenerator[Host]:
    """Give a `trio_sandbox.Host` for the test, with the configuration that `sandbox_host_config` gives."""
    from trio_sandbox import open_host

    async with open_host(sandbox_host_config) as host:
        yield host


@_trio_fixture
def sandbox_factory(
    _sandbox_options: dict[str, object], sandbox_host: Host, request: pytest.FixtureRequest
) -> SandboxFactory:
    """Give a `SandboxFactory`: any number of sandboxes, each for a block of its own, like `Host.open_sandbox`."""
    opened = request.node.stash.setdefault(OPENED, deque(maxlen=_REPORTED))

    @asynccontextmanager
    async def open_sandbox(**options: object) -> AsyncGenerator[Sandbox]:
        image, config = _image_and_config({**_sandbox_options, **options})
        async with sandbox_host.open_sandbox(image, config) as sandbox:
            opened.append(sandbox)
            yield sandbox

    return open_sandbox


@_trio_fixture
async def sandbox(sandbox_factory: SandboxFactory) -> AsyncGenerator[Sandbox]:
    """Give a `trio_sandbox.Sandbox` as the test's marker `sandbox` wants it; it is gone after the test."""
    async with sandbox_factory() as sandbox:
        yield sandbox
