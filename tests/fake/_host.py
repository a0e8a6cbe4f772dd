"""A host whose machines are fake QEMUs: all of it is real but them, their disks and images."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from trio_sandbox import Host, HostConfig
from trio_sandbox.image import ImageStore
from trio_sandbox.machines import Dependents, open_roster
from trio_sandbox.machines._named import NamedTemplateStore

from ._qemu import fake_accelerator
from .test_launcher import open_site


@asynccontextmanager
async def open_fake_host(directory: Path, *, config: HostConfig | None = None) -> AsyncGenerator[Host]:
    """Yield a host that has everything in *directory*."""
    config = config or HostConfig(memory_budget_mib=10_000, vcpu_budget=100)
    accelerator = fake_accelerator(directory)
    (directory / "overlays").mkdir(exist_ok=True)
    async with open_site(directory, accelerator=accelerator) as site:
        named = NamedTemplateStore(directory / "cache")
        store = ImageStore(directory / "cache")  # nobody asks for more images than this one
        dependents = Dependents(directory / "cache")
        with open_roster(directory / "held") as roster:
            host = Host(config, site.runtime, store, accelerator, site.launcher, named, dependents, roster=roster)
            host._images["python"] = site.disks()  # pyright: ignore[reportPrivateUsage]
            yield host
