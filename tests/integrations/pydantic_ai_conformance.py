"""Pydantic AI's own suite for workspace backends, in a real machine, under asyncio and under Trio."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pydantic_ai.workspaces import WorkspaceBackend
from pydantic_ai.workspaces.conformance import WorkspaceBackendSuite

from trio_sandbox import aio, open_sandbox
from trio_sandbox.integrations.pydantic_ai import SandboxBackend


class TestSandboxBackend(WorkspaceBackendSuite):
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        backend: str = request.param
        return backend

    @pytest.fixture
    async def backend(self, anyio_backend: str) -> AsyncIterator[WorkspaceBackend]:
        async with aio.open_sandbox("python") if anyio_backend == "asyncio" else open_sandbox("python") as sandbox:
            yield SandboxBackend(sandbox)
