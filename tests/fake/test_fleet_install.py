"""Packages for a sandbox of a fleet: what is asked for is read here, and its node does the rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import Image, PackagesError, Sandbox, SandboxConfig, SandboxHibernatedError
from trio_sandbox._image_steps import PackagesStep
from trio_sandbox.sandbox import GuestRequests

from ._fleet import LocalHost, open_fake_fleet
from .test_fleet_life import SiteHost


@attrs.define(eq=False)
class FakeInstaller:
    """Remembers what it is to install."""

    steps: list[PackagesStep] = attrs.field(factory=list[PackagesStep])
    guests: list[GuestRequests] = attrs.field(factory=list[GuestRequests])
    failure: Exception | None = None
    gate: trio.Event | None = None
    waiting: bool = False

    async def install(self, guest: GuestRequests, step: PackagesStep) -> None:
        await trio.lowlevel.checkpoint()
        self.steps.append(step)
        self.guests.append(guest)
        if self.gate is not None:
            self.waiting = True
            try:
                await self.gate.wait()
            finally:
                self.waiting = False
        if self.failure is not None:
            raise self.failure


@attrs.define(eq=False)
class InstallingHost(LocalHost):
    """Opens sandboxes that packages can be installed in."""

    installer: FakeInstaller = attrs.field(factory=FakeInstaller)

    @asynccontextmanager
    async def open_sandbox(
        self, image: str | Image, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AsyncGenerator[Sandbox]:
        async with LocalHost.open_sandbox(self, image, config, template=template) as sandbox:
            sandbox._installer = self.installer  # pyright: ignore[reportPrivateUsage]
            yield sandbox


async def test_the_node_installs_what_is_asked_for_here(tmp_path: Path) -> None:
    host = InstallingHost()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("beta>=2\n")
    async with open_fake_fleet("one", one=host) as fleet, fleet.host.open_sandbox() as sandbox:
        await sandbox.install("alpha", requirements, exclude_newer="2026-11-01")
        (step,) = Image("python").packages("alpha", "beta>=2", exclude_newer="2026-11-01").steps
        assert host.installer.steps == [step]
        assert (await host.installer.guests[0].run("print(6 * 7)")).stdout == "42\n", "the node's own door to the guest"
        with pytest.raises(FileNotFoundError):
            await sandbox.install(tmp_path / "missing.txt")
        assert len(host.installer.steps) == 1


async def test_what_the_node_says_of_it_is_raised_here() -> None:
    host = InstallingHost(installer=FakeInstaller(failure=PackagesError("there is no alpha")))
    async with open_fake_fleet("one", one=host) as fleet, fleet.host.open_sandbox() as sandbox:
        with pytest.raises(PackagesError, match="there is no alpha") as info:
            await sandbox.install("alpha")
        assert info.value.__notes__ == ["on node one"]
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_cancelled_the_node_gives_it_up_and_meanwhile_others_are_served() -> None:
    host = InstallingHost(installer=FakeInstaller(gate=trio.Event()))
    async with open_fake_fleet("one", one=host) as fleet, fleet.host.open_sandbox() as sandbox:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sandbox.install, "alpha")
            await wait_until(lambda: host.installer.waiting)
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            nursery.cancel_scope.cancel()
        await wait_until(lambda: not host.installer.waiting)


async def test_nobody_falls_asleep_while_it_goes_on(tmp_path: Path) -> None:
    host = SiteHost(directory=tmp_path)
    installer = FakeInstaller(gate=trio.Event())
    async with (
        open_fake_fleet("one", one=host) as fleet,
        fleet.host.open_sandbox(hibernate_after=0.05) as sandbox,
        trio.open_nursery() as nursery,
    ):
        host.sites[0].sandbox._installer = installer  # pyright: ignore[reportPrivateUsage]
        await wait_until(lambda: sandbox.statistics().hibernated)
        nursery.start_soon(sandbox.install, "alpha")  # which wakes it up
        await wait_until(lambda: installer.waiting)
        asleep = sandbox.statistics().hibernations
        await trio.sleep(0.2)
        assert sandbox.statistics().hibernations == asleep
        assert installer.gate is not None
        installer.gate.set()
        await wait_until(lambda: sandbox.statistics().hibernated)
        await sandbox.hibernate()  # from now on by call
        with pytest.raises(SandboxHibernatedError):
            await sandbox.install("alpha")
