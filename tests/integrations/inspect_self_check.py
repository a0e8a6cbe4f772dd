"""inspect_ai's own checks of a sandbox provider, in a real machine, under asyncio and under Trio."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from inspect_ai.util import SandboxEnvironment
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.self_check import *  # noqa: F403 - the checks

from trio_sandbox.integrations.inspect import TrioSandboxConfig, TrioSandboxEnvironment

pytestmark = pytest.mark.anyio

#: What the built-in images do not have.
MISSING = {"test_exec_as_user": "the image has no adduser"}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture
async def sandbox_env(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncGenerator[SandboxEnvironment]:
    assert isinstance(request.node, pytest.Function)
    if reason := MISSING.get(request.node.originalname):
        request.applymarker(pytest.mark.xfail(reason=reason))
    config = TrioSandboxConfig(memory_mib=512)
    environments = await TrioSandboxEnvironment.sample_init("check", config, {})
    yield environments["default"]
    await TrioSandboxEnvironment.sample_cleanup("check", config, environments, interrupted=False)


def test_all_checks_are_here() -> None:
    names = {name for name in vars(self_check) if name.startswith("test_")}
    assert len(names) > 40
    assert names <= globals().keys()
