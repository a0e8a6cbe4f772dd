"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Unpack, final

import trio_sandbox

from .. import HostConfig, HostStatistics, Image, RunResult, SandboxConfig, SandboxFields
from ..qemu import Accelerator
from ._door import AioDoor, open_root
from ._sandbox import Sandbox


@final
class Host(AioDoor[trio_sandbox.Host]):
    """The storage daemon, images and virtual machines of one block. Made by `open_host`."""

    __slots__ = ()

    @property
    def accelerator(self) -> Accelerator:
        """What runs the guests' instructions, and why that was chosen."""
        return self._now(lambda: self._inner.accelerator)

    def statistics(self) -> HostStatistics:
        """Return numbers about the host as it is now."""
        return self._now(self._inner.statistics)

    async def prepare(self, image: str | Image = "python") -> None:
        """Make sure that *image* is in the store and intact; build it if it is missing.

        See `trio_sandbox.Host.prepare`.
        """
        await self._call(lambda: self._inner.prepare(image))

    def open_sandbox(
        self,
        image: str | Image = "python",
        config: SandboxConfig | None = None,
        *,
        template: str | None = None,
        **fields: Unpack[SandboxFields],
    ) -> AbstractAsyncContextManager[Sandbox]:
        """Start a virtual machine and yield it as a `Sandbox`. When the block exits, the VM is destroyed.

        See `trio_sandbox.Host.open_sandbox`.
        """
        return self._block(lambda: self._inner.open_sandbox(image, config, template=template, **fields), Sandbox)

    async def run(
        self,
        code: str,
        *,
        image: str | Image = "python",
        config: SandboxConfig | None = None,
        functions: Mapping[str, Callable[..., object]] | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run *code* in a VM of its own, which is destroyed when this returns.

        See `trio_sandbox.Host.run`.
        """
        called = self._functions(functions)
        return await self._call(
            lambda: self._inner.run(code, image=image, config=config, functions=called, check=check, **fields)
        )

    async def run_script(
        self,
        path: str | os.PathLike[str],
        *,
        image: str | Image = "python",
        config: SandboxConfig | None = None,
        functions: Mapping[str, Callable[..., object]] | None = None,
        check: bool = False,
        **fields: Unpack[SandboxFields],
    ) -> RunResult:
        """Run a Python file as `run` does, with the packages that it names itself.

        See `trio_sandbox.Host.run_script`.
        """
        called = self._functions(functions)
        return await self._call(
            lambda: self._inner.run_script(path, image=image, config=config, functions=called, check=check, **fields)
        )


def open_host(config: HostConfig | None = None) -> AbstractAsyncContextManager[Host]:
    """Start what sandboxes share and yield it as a `Host`. When the block exits, all of it ends.

    See `trio_sandbox.open_host`.
    """
    return open_root(lambda: trio_sandbox.open_host(config), Host)


def open_sandbox(
    image: str | Image = "python",
    config: SandboxConfig | None = None,
    *,
    template: str | None = None,
    host_config: HostConfig | None = None,
    **fields: Unpack[SandboxFields],
) -> AbstractAsyncContextManager[Sandbox]:
    """Open one sandbox on a host of its own: `open_host` and `Host.open_sandbox` in one block.

    See `trio_sandbox.open_sandbox`.
    """
    return open_root(
        lambda: trio_sandbox.open_sandbox(image, config, template=template, host_config=host_config, **fields), Sandbox
    )
