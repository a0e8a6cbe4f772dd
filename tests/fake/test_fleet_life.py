"""Checkpoints, saving and sleep of a sandbox that is on a node: machines are fakes that remember one text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import (
    Image,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxHibernatedError,
    SnapshotError,
    TemplateExistsError,
    VmBootError,
    VmDiedError,
)

from ._fleet import Fleet, LocalHost, open_fake_fleet
from .test_lifecycle import Site, fail_with, open_site


@attrs.define(eq=False)
class SiteHost(LocalHost):
    """Opens sandboxes whose machines can be saved."""

    directory: Path = attrs.field(kw_only=True)
    sites: list[Site] = attrs.field(factory=list[Site])

    @asynccontextmanager
    async def open_sandbox(
        self, image: str | Image, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AsyncGenerator[Sandbox]:
        directory = self.directory / str(len(self.sites))
        directory.mkdir()
        async with open_site(directory) as site:
            self.sites.append(site)
            yield site.sandbox


@pytest.fixture
async def host(tmp_path: Path) -> SiteHost:
    return SiteHost(directory=tmp_path)


@asynccontextmanager
async def open_far_site(host: SiteHost, **config: object) -> AsyncGenerator[tuple[Sandbox, Site, Fleet]]:
    async with open_fake_fleet("one", one=host) as fleet:
        async with fleet.host.open_sandbox(**config) as sandbox:  # type: ignore[arg-type]
            yield sandbox, host.sites[-1], fleet
        # The site itself asserts that nothing is left of it.


async def remembered(sandbox: Sandbox, text: str = "") -> str:
    return (await sandbox.run(text)).stdout


async def test_going_back(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "first")
        first = await sandbox.checkpoint()
        await remembered(sandbox, "second")
        second = await sandbox.checkpoint()
        await remembered(sandbox, "third")
        await sandbox.revert()
        assert await remembered(sandbox) == "second"
        await sandbox.revert(first)
        await sandbox.revert(first)
        assert await remembered(sandbox) == "first"
        assert (sandbox.statistics().reverts, sandbox.statistics().checkpoints) == (3, 2)
        assert site.sandbox.statistics().reverts == 3
        second.discard()
        await wait_until(lambda: site.sandbox.statistics().checkpoints == 1)
        with pytest.raises(ValueError, match="was discarded"):
            await sandbox.revert(second)


async def test_going_back_when_the_machine_is_dead(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.checkpoint()
        site.launcher.open[0].retire("the test says so")
        await sandbox.revert()
        assert await remembered(sandbox) == "before"


async def test_what_is_under_way_when_it_goes_back(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, _, _), trio.open_nursery() as nursery:
        await remembered(sandbox, "before")
        await sandbox.checkpoint()

        async def expect_unknown() -> None:
            with pytest.raises(OutcomeUnknownError) as info:
                await sandbox.run("wait")
            assert isinstance(info.value.__cause__, VmDiedError)
            assert "reverted to a checkpoint" in str(info.value.__cause__)

        nursery.start_soon(expect_unknown)
        await wait_until(lambda: sandbox.statistics().runs == 2)
        await sandbox.revert()
        assert await remembered(sandbox) == "before"


async def test_a_node_that_can_not_go_back_leaves_it_as_it_was(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.checkpoint()
        await remembered(sandbox, "after")
        site.launcher.opening = fail_with(VmBootError("no"))
        with pytest.raises(SnapshotError, match="was not reverted, and is as it was: no"):
            await sandbox.revert()
        assert await remembered(sandbox) == "after"


async def test_cancelled_while_it_goes_back(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.checkpoint()
        await remembered(sandbox, "after")
        with trio.CancelScope() as scope:
            site.launcher.opening = scope.cancel
            await sandbox.revert()
        assert await remembered(sandbox) in ("before", "after")


async def test_a_transaction(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, _, _):
        await remembered(sandbox, "before")
        with pytest.raises(RuntimeError, match="the block's own"):
            async with sandbox.transaction():
                await remembered(sandbox, "inside")
                raise RuntimeError("the block's own")
        assert await remembered(sandbox) == "before"
        async with sandbox.transaction():
            await remembered(sandbox, "kept")
        assert await remembered(sandbox) == "kept"


async def test_sleep(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.hibernate()
        assert sandbox.statistics().hibernated
        assert site.launcher.open == []
        with pytest.raises(SandboxHibernatedError, match="was not sent"):
            await sandbox.run("")
        await sandbox.resume()
        assert await remembered(sandbox) == "before"
        assert sandbox.statistics().hibernations == 1
        await sandbox.checkpoint()
        await sandbox.hibernate()
        await sandbox.revert()
        assert await remembered(sandbox) == "before"


async def test_sleep_is_refused_while_something_is_under_way(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        site.launcher.busy = True
        with pytest.raises(trio.BusyResourceError, match="can't hibernate"):
            await sandbox.hibernate()
        assert await remembered(sandbox, "goes on") == "goes on"


async def test_who_does_not_wake_up_sleeps_on(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.hibernate()
        site.launcher.opening = fail_with(VmBootError("no"))
        with pytest.raises(SnapshotError, match="still hibernates: no"):
            await sandbox.resume()
        site.launcher.opening = lambda: None
        await sandbox.resume()
        assert await remembered(sandbox) == "before"


async def test_an_idle_sandbox_falls_asleep_and_a_request_wakes_it(host: SiteHost) -> None:
    async with open_far_site(host, hibernate_after=0.1) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await wait_until(lambda: sandbox.statistics().hibernated)
        assert site.launcher.open == []
        assert await remembered(sandbox) == "before"


async def test_it_is_saved_on_its_node(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        await remembered(sandbox, "before")
        await sandbox.save("mine")
        assert site.named.find("mine").name == "mine"
        with pytest.raises(TemplateExistsError):
            await sandbox.save("mine")
        await sandbox.save("mine", replace=True)
        with pytest.raises(ValueError, match="name"):
            await sandbox.save("/")


async def test_usage_is_the_nodes(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, site, _):
        assert sandbox.usage() == site.sandbox.usage(), "it is known at once"


async def test_what_a_node_has_said_is_known_of_the_next_machine_as_well(host: SiteHost) -> None:
    """It says long texts again only when they have changed, be it before this side has the machine that they are of."""
    async with open_far_site(host) as (sandbox, site, _):
        await sandbox.checkpoint()
        await wait_until(lambda: sandbox.console() == site.sandbox.console() != "")
        await sandbox.revert()
        assert sandbox.console() == site.sandbox.console()
        assert sandbox.qmp_log() == site.sandbox.qmp_log()


async def test_a_node_that_is_lost_while_a_sandbox_sleeps(host: SiteHost) -> None:
    async with open_far_site(host) as (sandbox, _, fleet):
        await sandbox.hibernate()
        await fleet.nodes["one"].wire.cut()
        await fleet.nodes["one"].node.left.wait()
        with pytest.raises((OutcomeUnknownError, SandboxClosedError), match="node one"):
            await sandbox.resume()
