"""Machines that make layers, with a fake QEMU: what they are, how they fail, and what is left of them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left, wait_until
from trio_sandbox import ImageBuildError, Network, PackagesError, Timeouts
from trio_sandbox.constants import BUILD_MEMORY_MIB
from trio_sandbox.image import LayerJob, ProgramMissingError
from trio_sandbox.image._layer import Work
from trio_sandbox.machines import LayerBuilder, _layer_builder
from trio_sandbox.network import Gateway, HostResolver
from trio_sandbox.qemu import OverlayPool, open_runtime, open_vm_manager

from ._qemu import fake_accelerator
from .test_launcher import FakeOverlays, fake_disks


@attrs.define
class Workshop:
    """A builder, and jobs for it."""

    directory: Path
    builder: LayerBuilder
    told: list[str] = attrs.field(factory=list[str])

    def job(self, *modes: str, tree: Path | None = None) -> LayerJob:
        image, system = fake_disks(self.directory, *modes)
        return LayerJob(
            image=image,
            system=system,
            work=Work(script="true", tree=tree),
            overlay=self.directory / "layer.qcow2",
            mounts=self.directory / "mounts",
        )

    async def build(self, *modes: str, tree: Path | None = None) -> None:
        (self.directory / "layer.qcow2").unlink(missing_ok=True)
        gateway = Gateway(Network.none(), HostResolver(), connect_timeout=1)
        await self.builder.build(self.job(*modes, tree=tree), gateway, lambda message, _: self.told.append(message))


@asynccontextmanager
async def open_workshop(directory: Path) -> AsyncGenerator[Workshop]:
    accelerator = fake_accelerator(directory)
    async with (
        open_runtime(Path("/tmp")) as runtime,
        open_vm_manager(runtime=runtime, accelerator=accelerator) as machines,
    ):
        builder = LayerBuilder(
            machines=machines,
            overlays=cast("OverlayPool", FakeOverlays()),
            environment=runtime.environment,
            timeouts=Timeouts(),
        )
        yield Workshop(directory, builder)


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("refuse", "could not do it"),
        ("panic", "Kernel panic"),
        ("garbage", "broke the protocol"),
        ("mount-fails", "the guest can't mount"),
        ("none", "no processes here"),
    ],
)
async def test_a_machine_that_fails_is_a_build_that_failed(tmp_path: Path, mode: str, why: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    async with open_workshop(tmp_path) as workshop:
        with (
            nothing_left(),
            pytest.raises(ImageBuildError, match="that was to make the layer failed") as caught,
        ):
            await workshop.build(mode, tree=tree)
    assert why in str(caught.value)
    assert not (tmp_path / "mounts").exists()


async def test_an_image_without_a_shell_is_named(tmp_path: Path) -> None:
    async with open_workshop(tmp_path) as workshop:
        with (
            nothing_left(),
            pytest.raises(ImageBuildError, match="needs /bin/sh, which can't be started in the image") as caught,
        ):
            await workshop.build("no-shell")
    assert "No such file or directory" in str(caught.value)
    assert "have an earlier step bring one (.files({'/bin/sh': 'busybox'})" in str(caught.value)
    assert isinstance(caught.value, ProgramMissingError)


@pytest.mark.parametrize("mode", ["stores-all", "loses-writes", "loses-flushes"])
async def test_a_layer_that_is_not_all_on_the_disk_is_none(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's kernel writes late: the step itself has ended well."""

    def ignore(*_: object) -> None:
        """Take no notice."""

    monkeypatch.setattr(_layer_builder, "forget_backing_file", ignore)  # the fake's is none of qcow2
    async with open_workshop(tmp_path) as workshop:
        job = workshop.job(mode)
        job = attrs.evolve(job, work=attrs.evolve(job.work, script=""))
        gateway = Gateway(Network.none(), HostResolver(), connect_timeout=1)
        with nothing_left():
            if mode == "stores-all":
                assert await workshop.builder.build(job, gateway, ignore) == b""
                return
            with pytest.raises(ImageBuildError, match="could not be stored: the disk of the cache directory is full"):
                await workshop.builder.build(job, gateway, ignore)


async def test_a_step_that_may_not_take_for_ever_does_not(tmp_path: Path) -> None:
    async with open_workshop(tmp_path) as workshop:
        job = workshop.job("never-starts")
        job = attrs.evolve(job, work=attrs.evolve(job.work, patience=0.01))
        gateway = Gateway(Network.none(), HostResolver(), connect_timeout=1)
        with nothing_left(), pytest.raises(ImageBuildError, match=r"/bin/sh did not end within 0\.01 s in the image"):
            await workshop.builder.build(job, gateway, lambda message, _: None)


async def test_a_cancelled_build_leaves_no_machine(tmp_path: Path) -> None:
    async with open_workshop(tmp_path) as workshop:

        async def build() -> None:
            with nothing_left(), pytest.raises(ImageBuildError, match="no processes here"):
                await workshop.build("none")

        assert await cancel_at_every_step(build, check=lambda: None) > 5
    assert workshop.told[-2:] == ["booting a VM", "working"]


async def test_what_can_not_be_fetched_is_raised_as_it_is(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    async with open_workshop(tmp_path) as workshop:
        booting = trio.Event()

        async def fetch() -> None:
            await booting.wait()
            raise PackagesError("no such wheel")

        def report(message: str, fraction: float | None) -> None:
            if message == "booting a VM":
                booting.set()

        job = workshop.job("none", tree=tree)
        job = attrs.evolve(job, work=attrs.evolve(job.work, fill=fetch))
        gateway = Gateway(Network.none(), HostResolver(), connect_timeout=1)
        with nothing_left(), pytest.raises(PackagesError, match="no such wheel"):
            await workshop.builder.build(job, gateway, report)
    assert not (tmp_path / "mounts").exists()


async def test_what_nobody_needs_any_more_is_removed_while_the_machine_works(tmp_path: Path) -> None:
    (ours := tmp_path / "ours").mkdir()
    (ours / "file").write_text("x")
    (theirs := tmp_path / "theirs").mkdir()

    def report(_message: str, _fraction: float | None) -> None:
        pass

    async with open_workshop(tmp_path) as workshop:
        job = workshop.job("never-starts", tree=theirs)
        job = attrs.evolve(job, work=attrs.evolve(job.work, spent=(ours, tmp_path / "not made")))
        gateway = Gateway(Network.none(), HostResolver(), connect_timeout=1)
        with nothing_left():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(workshop.builder.build, job, gateway, report)
                await wait_until(lambda: not ours.exists())
                nursery.cancel_scope.cancel(reason="it is removed")
    assert theirs.exists()


async def test_what_a_machine_has_is_known_before(tmp_path: Path) -> None:
    async with open_workshop(tmp_path) as workshop:
        config = workshop.builder.config
    assert config.memory_mib == BUILD_MEMORY_MIB
    assert 1 <= config.vcpus <= min(2, os.cpu_count() or 1)
