"""What measures measure with: hosts and sandboxes as a user opens them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import attrs
import trio

from .._config import HostConfig, SandboxConfig
from .._errors import SandboxError
from ..host import Host, open_host
from ..machines import charge_mib
from ..sandbox import Sandbox

OpenHost = Callable[[HostConfig], AbstractAsyncContextManager[Host]]


class DoesNotFitError(Exception):
    """More sandboxes than this machine can hold at once."""


@attrs.frozen(kw_only=True)
class Lab:
    """Opens what is measured."""

    image: str = "python"
    sandbox: SandboxConfig = attrs.field(factory=SandboxConfig)
    host: HostConfig = HostConfig()  # noqa: RUF009 (a frozen value)
    open_host: OpenHost = open_host
    tick: Callable[[float], object] = lambda _: None
    """Called with the part of the measure that is done."""

    @asynccontextmanager
    async def open(self, n: int, config: HostConfig | None = None) -> AsyncGenerator[Host]:
        """Yield a host with its image ready, that has room for *n* sandboxes.

        Args:
          n: How many will be open at once.
          config: The host's configuration; None for `host`.

        Raises:
          DoesNotFitError: if there is no room for that many.

        """
        async with self.open_host(config or self.host) as host:
            room = host.statistics().admission
            memory = n * charge_mib(self.sandbox.memory_mib, room.memory_overcommit)
            if memory > room.memory_mib_budget:
                raise DoesNotFitError(
                    f"does not fit: needs {memory} MiB, and all sandboxes may have {room.memory_mib_budget} MiB"
                )
            if n * self.sandbox.vcpus > room.vcpu_budget:
                raise DoesNotFitError(
                    f"does not fit: needs {n * self.sandbox.vcpus} vCPUs, and all sandboxes may have {room.vcpu_budget}"
                )
            await host.prepare(self.image)
            yield host

    @asynccontextmanager
    async def open_answering(self, host: Host, n: int) -> AsyncGenerator[dict[Sandbox, float]]:
        """Yield *n* sandboxes that were asked for at the same moment and have answered, with the seconds that each took."""
        found: dict[Sandbox, float] = {}
        release = trio.Event()
        start = time.perf_counter()

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            async with host.open_sandbox(self.image, self.sandbox) as sandbox:
                await answer(sandbox)
                found[sandbox] = time.perf_counter() - start
                task_status.started()
                await release.wait()

        async with trio.open_nursery() as holders:
            async with trio.open_nursery() as openers:
                for _ in range(n):
                    openers.start_soon(holders.start, hold)
            try:
                yield found
            finally:
                release.set()


async def answer(sandbox: Sandbox) -> None:
    """Have the sandbox's interpreter say something."""
    result = await sandbox.run("print(1)")
    if result.stdout != "1\n":
        raise SandboxError(f"`print(1)` ended with status {result.exit_code} and printed {result.stdout!r:.100}")
