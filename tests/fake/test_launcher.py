"""How sandboxes come by their machines, with a fake QEMU: templates that can't be made, found, or gone on from."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._disks import filled, small_disk
from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import (
    MountError,
    Progress,
    QemuStorageDaemonError,
    SandboxConfig,
    TemplateUnusableError,
    Timeouts,
    VmBootError,
    WarmupError,
)
from trio_sandbox.constants import MOUNTS_DISK_BYTES
from trio_sandbox.image import BuiltImage, SystemDisk
from trio_sandbox.image._manifest import Manifest
from trio_sandbox.machines._launcher import Launcher
from trio_sandbox.machines._named import NamedTemplate, NamedTemplateStore
from trio_sandbox.machines._templates import Template, TemplateStore
from trio_sandbox.qemu import (
    Accelerator,
    MachineConfig,
    OverlayPool,
    Runtime,
    SavedState,
    Snapshot,
    Vm,
    make_marked,
    open_runtime,
    open_vm_manager,
)

from ._qemu import fake_accelerator


class FakeOverlays:
    """Makes files of one block, and needs room for it: the fake QEMU does not read them."""

    async def acquire(self, base: Path, target: Path) -> bool:
        assert base.exists()
        try:
            target.touch(exist_ok=False)
            target.write_bytes(bytes(4096))
        except OSError as exc:
            target.unlink(missing_ok=True)
            raise QemuStorageDaemonError(f"can't write the overlay {target}: {exc.strerror}") from exc
        await trio.lowlevel.checkpoint()
        return True


def fake_disks(directory: Path, *modes: str, digest: str = "d") -> tuple[BuiltImage, SystemDisk]:
    """Give the disks in *directory* of a machine that misbehaves as *modes* say."""
    files = {name: directory / name for name in ("kernel", "initrd", "system_disk", "image")}
    manifest = Manifest(name="fake", digest=digest, created=0, files={}, details={})
    image = BuiltImage(name="fake", digest=digest, path=files["image"], size_bytes=0, virtual_size=0, manifest=manifest)
    system = SystemDisk(
        digest="s",
        kernel=files["kernel"],
        initrd=files["initrd"],
        disk=files["system_disk"],
        kernel_args=tuple(f"fake={mode}" for mode in modes),
    )
    return image, system


class Site:
    """A launcher with all that it needs."""

    def __init__(
        self,
        directory: Path,
        runtime: Runtime,
        accelerator: Accelerator,
        launcher: Launcher,
        store: TemplateStore,
        progress: list[Progress],
    ) -> None:
        self.directory, self.runtime, self.accelerator = directory, runtime, accelerator
        self.launcher, self.store, self.progress = launcher, store, progress

    @asynccontextmanager
    async def open(self, *modes: str, warmup: str = "", mounts: Mapping[str, Path] | None = None) -> AsyncGenerator[Vm]:
        """Open a machine."""
        image, system = self.disks(*modes)
        config = SandboxConfig(memory_mib=128, warmup=warmup, mounts=mounts or {})
        async with self.launcher.open_machine(image, system, config) as vm:
            await vm.guest.ping()
            yield vm

    def disks(self, *modes: str, digest: str = "d") -> tuple[BuiltImage, SystemDisk]:
        """Give the disks of a machine that misbehaves as *modes* say."""
        return fake_disks(self.directory, *modes, digest=digest)

    def save(self, *modes: str) -> NamedTemplate:
        """Put a saved sandbox into the store, as no machine made it."""
        store = NamedTemplateStore(self.directory / "cache")
        image, system = self.disks(*modes)
        with store.make("mine", memory_mib=128, replace=True) as staged:
            machine = MachineConfig(
                kernel=system.kernel,
                initrd=system.initrd,
                kernel_args=(*system.kernel_args, "trio_sandbox.language=python"),
                system_disk=system.disk,
                image=image.path,
                overlay="overlay",
                layers=[staged.directory / f"layer{number}.qcow2" for number in range(2)],
                memory_file=staged.directory / "memory",
                memory_mib=128,
            )
            snapshot = Snapshot(staged.directory, machine, SavedState(staged.directory / "devices", b"m" * 16), 0.0)
            template = staged.template = self.launcher.describe("mine", image, snapshot)
            for path in template.files:
                path.touch()
            os.truncate(staged.directory / "memory", 128 * 2**20)
        return store.find("mine")

    async def is_clone(self, *modes: str, warmup: str = "") -> bool:
        async with self.open(*modes, warmup=warmup) as vm:
            return vm.config.memory_file is not None

    def boots(self) -> int:
        """How many templates were begun."""
        return sum(step.message == "booting a VM" for step in self.progress)


@asynccontextmanager
async def open_site(
    directory: Path, *, budget_mib: int = 1000, accelerator: Accelerator | None = None
) -> AsyncGenerator[Site]:
    async with open_runtime(Path("/tmp")) as runtime:
        if accelerator is None:
            accelerator = fake_accelerator(directory)
            (directory / "overlays").mkdir()
        store = TemplateStore(directory / "cache", budget_mib=budget_mib)
        progress: list[Progress] = []
        async with open_vm_manager(runtime=runtime, accelerator=accelerator) as machines:
            launcher = Launcher(
                machines=machines,
                overlays=cast("OverlayPool", FakeOverlays()),
                templates=store,
                directory=directory / "overlays",
                environment=runtime.environment,
                timeouts=Timeouts(),
                progress=progress.append,
            )
            yield Site(directory, runtime, accelerator, launcher, store, progress)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncGenerator[Site]:
    async with open_site(tmp_path) as site:
        yield site


async def test_the_first_makes_the_template_and_is_a_clone_like_all_others(site: Site) -> None:
    for _ in range(3):
        assert await site.is_clone()
    assert site.boots() == 1
    (template,) = site.store.list()
    assert (template.image, template.memory_mib, template.vcpus) == ("fake", 128, 1)
    assert os.listdir(site.directory / "overlays") == []


async def test_those_that_come_together_share_one(site: Site) -> None:
    clones: list[bool] = []

    async def open_one() -> None:
        clones.append(await site.is_clone())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(open_one)
    assert clones == [True] * 4
    assert site.boots() == 1


async def test_another_configuration_has_another_template(site: Site) -> None:
    assert await site.is_clone()
    assert await site.is_clone(warmup="import this")
    assert await site.is_clone("other-arguments")
    assert (site.boots(), len(site.store.list())) == (3, 3)


async def test_another_hosts_template_is_used(site: Site, tmp_path: Path) -> None:
    assert await site.is_clone()
    async with open_site(tmp_path, accelerator=site.accelerator) as other:
        assert await other.is_clone()
        assert other.boots() == 0


async def test_a_state_that_does_not_load_is_dropped_and_made_once_more(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [await site.is_clone("load-fails") for _ in range(4)]
    assert answers == [False] * 4, "its user gets a machine all the same"
    assert site.boots() == 2
    assert site.store.list() == []
    assert "could not start from it" in caplog.text
    assert "load of migration failed" in caplog.text


@pytest.mark.parametrize(
    ("mode", "reason"), [("killed-loading", "was ended by SIGKILL"), ("no-memory-to-load", "Cannot allocate memory")]
)
async def test_what_is_not_the_templates_fault_costs_the_others_nothing(
    site: Site, mode: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody killed that QEMU, or our own limits did: those who share the cache still have the template."""
    for _ in range(3):
        assert not await site.is_clone(mode), "its user gets a machine all the same"
    assert "can't be used now, and a VM boots" in caplog.text
    assert reason in caplog.text
    assert (site.boots(), len(site.store.list())) == (1, 1)


async def test_where_no_machine_boots_either_no_template_is_blamed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def fail(*_: object) -> AsyncGenerator[Vm]:
        raise VmBootError("QEMU was ended by SIGSEGV")
        yield

    assert await site.is_clone()
    with monkeypatch.context() as broken:
        broken.setattr(Launcher, "_open_vm", fail)
        with pytest.raises(VmBootError):
            await site.is_clone()
    assert await site.is_clone()
    assert site.boots() == 1


async def test_clones_share_the_memory_that_none_of_them_can_write_to(site: Site) -> None:
    async with site.open() as one, site.open() as other:
        memory = one.config.memory_file
        assert memory is not None
        assert memory == other.config.memory_file == site.store.list()[0].memory
        assert stat.S_IMODE(memory.stat().st_mode) == 0o444
    memory.chmod(0o666)  # as an earlier version left those of saved sandboxes
    async with site.open() as vm:
        assert stat.S_IMODE(memory.stat().st_mode) == 0o444
        assert access_of(vm) == os.O_RDONLY
    assert site.boots() == 1


async def test_where_they_could_each_has_a_copy_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object, **__: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr("trio_sandbox.qemu._vm_manager.prove_library", refuse)
    async with open_site(tmp_path) as site:
        assert "each gets a copy of its own, which takes longer; to change that, install QEMU 8.2" in caplog.text
        async with site.open() as one, site.open() as other:
            files = {vm.config.memory_file for vm in (one, other)} | {site.store.list()[0].memory}
            assert len(files) == 3
            assert all(file is not None and file.stat().st_nlink == 1 for file in files)
            assert access_of(one) == os.O_RDWR, "such a QEMU takes nothing else"
        assert os.listdir(tmp_path / "overlays") == []


def access_of(vm: Vm) -> int:
    """Tell what a machine's QEMU was given the RAM's file open for."""
    return fcntl.fcntl(vm._memory, fcntl.F_GETFL) & os.O_ACCMODE  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("mode", ["save-fails", "dies-warming-up"])
async def test_a_template_that_can_not_be_made(site: Site, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not await site.is_clone(mode)
    assert not await site.is_clone(mode)
    assert site.boots() == 1, "not tried again"
    assert "no template can be made" in caplog.text
    assert [name for name in os.listdir(site.directory / "cache/templates") if name != "locks"] == []


async def test_a_warm_up_that_fails_is_the_users_error(site: Site) -> None:
    for _ in range(2):
        with pytest.raises(WarmupError, match="ended with status 1"):
            await site.is_clone("warm-up-fails", warmup="1 / 0")
    assert site.store.list() == []


async def test_a_directory_that_can_not_be_written(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    (site.directory / "cache").touch()
    assert not await site.is_clone()
    assert "no template can be made" in caplog.text


async def test_a_template_is_made_as_soon_as_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path, 132 * 2**20) as directory:
        async with open_site(directory) as site:
            with filled(directory, leave=16 * 2**20):
                for _ in range(2):
                    assert not await site.is_clone()
            assert "no room for 128 MiB" in caplog.text
            assert site.boots() == 0
            assert await site.is_clone()
            assert site.boots() == 1


async def test_a_disk_that_is_full_is_no_reason_to_remove_a_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path, 132 * 2**20) as directory:
        async with open_site(directory) as site:
            assert await site.is_clone()
            for _ in range(3):
                with filled(directory), nothing_left(directory / "overlays"):
                    with pytest.raises(
                        QemuStorageDaemonError, match=r"can't write the overlay .*: No space left"
                    ) as caught:
                        await site.is_clone()
                    assert caught.value.retry_safe
            assert "can't be used now, and a VM boots: can't write the overlay" in caplog.text
            assert await site.is_clone()
            assert site.boots() == 1


@pytest.mark.parametrize("part", ["memory", "devices", "overlay"])
async def test_a_template_that_goes_while_it_is_used(
    site: Site, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has just evicted it, or somebody removes its files: it is made anew."""
    assert await site.is_clone()
    find = TemplateStore.find

    def find_and_break(store: TemplateStore, key: str) -> Template | None:
        template = find(store, key)
        if template is not None:
            getattr(template, part).unlink()
        return template

    with monkeypatch.context() as broken:
        broken.setattr(TemplateStore, "find", find_and_break)
        assert not await site.is_clone()
    assert "could not start from it: [Errno 2]" in caplog.text
    assert site.store.list() == []
    assert await site.is_clone()
    assert site.boots() == 2


async def test_more_memory_than_the_budget(tmp_path: Path) -> None:
    async with open_site(tmp_path, budget_mib=127) as site:
        assert not await site.is_clone()
        assert site.boots() == 0
        assert not (tmp_path / "cache").exists()


async def test_a_damaged_template_is_noticed_before_anything_is_started(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    assert await site.is_clone()
    (template,) = site.store.list()
    template.memory.chmod(0o644)
    os.truncate(template.memory, 4096)
    assert await site.is_clone()
    assert site.boots() == 2
    assert "changed since it was made: memory" in caplog.text


async def test_one_that_another_process_makes_is_waited_for(site: Site) -> None:
    """The lock is another's, and goes with it; what that left half-made is removed."""
    assert await site.is_clone()
    (template,) = site.store.list()
    site.store.remove(template.key)
    leftover = site.directory / f"cache/templates/.staging-{template.key}-0123abcd"
    with nothing_left(site.directory / "cache/templates"):
        async with trio.open_nursery() as nursery:
            with TemplateStore(site.directory / "cache", budget_mib=1000).lock(template.key) as held:
                assert held
                make_marked(leftover)
                (leftover / "memory").touch()
                nursery.start_soon(site.is_clone)
                await trio.sleep(0.3)
                assert site.boots() == 1
        assert site.boots() == 2
        assert not leftover.exists()
        site.store.remove(template.key)


async def test_cancelled_anywhere_it_leaves_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    templates = site.directory / "cache/templates"
    (templates / "locks").mkdir(parents=True)

    async def open_one() -> None:
        await site.is_clone()

    def check() -> None:
        assert os.listdir(site.directory / "overlays") == []
        assert not list(templates.glob(".*"))
        for template in site.store.list():
            site.store.remove(template.key)

    await site.is_clone()  # what is cached in this process is, from here on
    check()
    with nothing_left(templates, site.directory / "overlays"):
        steps = await cancel_at_every_step(open_one, check=check)
    assert steps > 20


async def test_the_manifest_says_what_it_is(site: Site) -> None:
    assert await site.is_clone(warmup="x = 1")
    (template,) = site.store.list()
    value = json.loads((template.directory / "template.json").read_text())
    assert (value["warmup"], value["image"], value["key"]) == ("x = 1", "fake", template.key)
    assert set(value["files"]) == {"memory", "devices", "overlay.qcow2"}


async def test_mounts_are_no_part_of_a_template(site: Site, tmp_path: Path) -> None:
    assert await site.is_clone()
    overlays = site.directory / "overlays"
    (source := tmp_path / "source").mkdir()
    for _ in range(2):
        async with site.open(mounts={"/data": source}) as vm:
            assert vm.config.memory_file is not None
            assert vm.config.mounts is not None
            assert vm.config.mounts.stat().st_size == MOUNTS_DISK_BYTES
        assert os.listdir(overlays) == []
    assert site.boots() == 1
    assert Progress("mounts", f"copying 0 files from {source}", 0.0) in site.progress


@pytest.mark.parametrize("mode", ["mount-fails", "load-fails"])
async def test_a_mount_that_fails_is_no_template_that_fails(site: Site, tmp_path: Path, mode: str) -> None:
    (source := tmp_path / "source").mkdir()
    for _ in range(2):
        if mode == "load-fails":
            async with site.open(mode, mounts={"/data": source}) as vm:
                assert vm.config.memory_file is None, "it booted, and has them"
        else:
            with pytest.raises(MountError, match="can't mount /data: Not a directory"):
                async with site.open(mode, mounts={"/data": source}):
                    pytest.fail("it has been opened")
        assert os.listdir(site.directory / "overlays") == []
    assert site.boots() == (2 if mode == "load-fails" else 1)


async def test_cancelled_anywhere_it_leaves_no_disk_of_mounts(site: Site, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    overlays = site.directory / "overlays"

    async def open_one() -> None:
        async with site.open(mounts={"/data": source}):
            pass

    await open_one()
    with nothing_left(overlays):
        await cancel_at_every_step(open_one, check=lambda: pytest.fail("left") if os.listdir(overlays) else None)


async def test_a_saved_sandbox_is_gone_on_from(site: Site) -> None:
    template = site.save()
    image, system = site.disks()
    with nothing_left(template.directory, site.directory / "overlays"):
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)) as vm:
            await vm.guest.ping()
            assert [layer.name for layer in vm.config.layers] == [layer.name for layer in template.layers]
            assert vm.config.memory_file == template.memory
            assert not vm.config.memory_shared
    assert site.boots() == 0


async def test_a_saved_sandbox_may_have_mounts_that_are_new(site: Site, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (source / "file").write_text("new")
    config = SandboxConfig(memory_mib=128, mounts={"/data": source})
    template = site.save()
    image, system = site.disks()
    with nothing_left(template.directory, site.directory / "overlays"):
        async with site.launcher.open_saved(image, system, template, config) as vm:
            await vm.guest.ping()
            assert vm.config.memory_file == template.memory
            assert vm.config.mounts is not None
            first = vm.config.mounts_bytes
            assert 0 < first < 2**30
            # What is saved of it has them, and may get more.
            again = attrs.evolve(template, mounted=True, mounts_bytes=first)
            os.link(vm.config.mounts, template.directory / "mounts")
            async with site.launcher.open_saved(image, system, again, config) as other:
                await other.guest.ping()
                assert other.config.mounts_bytes > first
        (template.directory / "mounts").unlink()
    image, system = site.disks("mount-fails")
    template = site.save("mount-fails")
    with pytest.raises(MountError, match="can't mount /data"):
        async with site.launcher.open_saved(image, system, template, config):
            pytest.fail("it has been opened")
    assert os.listdir(site.directory / "overlays") == []


async def test_with_more_memory_a_saved_sandbox_boots_from_its_disk(site: Site) -> None:
    template = site.save()
    image, system = site.disks()
    with nothing_left(template.directory, site.directory / "overlays"):
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=256, vcpus=2)) as vm:
            await vm.guest.ping()
            assert (vm.config.memory_mib, vm.config.vcpus, vm.config.memory_file) == (256, 2, None)
            assert [layer.name for layer in vm.config.layers] == [layer.name for layer in template.layers]
    assert [step.message.partition(":")[0] for step in site.progress] == ["booting from its disk, to have more memory"]
    # It is the disk of that image, and no other.
    os.utime(image.path, (1, 1))
    with pytest.raises(TemplateUnusableError, match="built anew"):
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=256)):
            pytest.fail("it has been opened")


async def test_a_saved_sandbox_that_does_not_fit_says_what_is_another(site: Site, tmp_path: Path) -> None:
    template = site.save()
    image, system = site.disks(digest="another")
    with pytest.raises(TemplateUnusableError, match="built from another recipe"):
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
            pass
    image, system = site.disks()
    os.utime(image.path, (1, 1))
    with pytest.raises(TemplateUnusableError, match=r"built anew .* `trio-sandbox template rm mine`"):
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
            pass
    newer = attrs.evolve(site.accelerator, qemu=attrs.evolve(site.accelerator.qemu, version=(8, 0)))
    async with open_site(tmp_path, accelerator=newer) as other:
        with pytest.raises(TemplateUnusableError, match=r"saved under .*7.2.0 \(tcg\), and this is .*8.0 \(tcg\)"):
            async with other.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
                pass


async def test_a_saved_sandbox_whose_state_does_not_load_stays_where_it_is(site: Site) -> None:
    template = site.save("load-fails")
    image, system = site.disks("load-fails")
    with nothing_left(template.directory, site.directory / "overlays"), pytest.raises(TemplateUnusableError) as caught:
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
            pass
    assert "load of migration failed" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "reason"), [("killed-loading", "was ended by SIGKILL"), ("no-memory-to-load", "Cannot allocate memory")]
)
async def test_a_saved_sandbox_is_not_called_unusable_for_what_is_not_its_fault(
    site: Site, mode: str, reason: str
) -> None:
    template = site.save(mode)
    image, system = site.disks(mode)
    with nothing_left(template.directory, site.directory / "overlays"), pytest.raises(VmBootError) as caught:
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
            pass
    assert reason in str(caught.value)
    assert caught.value.retry_safe


async def test_opening_a_saved_sandbox_cancelled_anywhere_leaves_nothing(site: Site) -> None:
    template = site.save()
    image, system = site.disks()

    async def open_one() -> None:
        async with site.launcher.open_saved(image, system, template, SandboxConfig(memory_mib=128)):
            await trio.lowlevel.checkpoint()

    def check() -> None:
        assert os.listdir(site.directory / "overlays") == []

    with nothing_left(template.directory, site.directory / "overlays"):
        assert await cancel_at_every_step(open_one, check=check) > 5
