"""Making room among images: what was used longest ago goes, and never what somebody stands on, in whatever process."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._leaks import nothing_left
from trio_sandbox import HostConfig, Image, Network, SandboxConfig
from trio_sandbox.cli._image import prune
from trio_sandbox.image import BuiltImage, ImageStore, LayerJob
from trio_sandbox.image._lock import try_lock_directory
from trio_sandbox.machines import Admission, Dependents, HostImages, LayerBuilder
from trio_sandbox.network import Gateway
from trio_sandbox.qemu import make_marked

from .test_image_layers import Site, entries, make_site
from .test_image_store import TinyRecipe

SIZE = 64 * 1024
NEVER = 2**40


async def make_images(site: Site, *scripts: str) -> list[BuiltImage]:
    """Make one image for each script, used in that order, of *SIZE* bytes each beside its manifest."""

    async def fill(job: LayerJob) -> None:
        await trio.lowlevel.checkpoint()
        job.overlay.write_bytes(os.urandom(SIZE))

    site.after = fill
    images = [await site.ensure(Image("python").script(script)) for script in scripts]
    for age, image in enumerate(reversed(images)):
        used(image, age)
    return images


def used(image: BuiltImage, days_ago: int) -> None:
    """Say when its top layer was used."""
    manifest = image.top.parent / "manifest.json"
    moment = manifest.stat().st_ctime - days_ago * 86400
    os.utime(manifest, (moment, moment))


def names(images: list[BuiltImage]) -> set[str]:
    return {image.top.parent.name for image in images}


def size_of(tmp_path: Path) -> int:
    return sum(entry.size_bytes for entry in ImageStore(tmp_path / "cache").list())


async def test_what_was_used_longest_ago_goes_first_and_no_more_than_must(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    images = await make_images(site, "one", "two", "three")
    everything = set(entries(tmp_path))
    size = size_of(tmp_path)
    assert await site.store.evict(size) == 0
    assert set(entries(tmp_path)) == everything
    freed = await site.store.evict(size - 1)
    assert freed >= SIZE
    assert set(entries(tmp_path)) == everything - names(images[:1])
    assert size_of(tmp_path) == size - freed
    assert list((tmp_path / "cache" / "staging").iterdir()) == []
    # To be looked for is to be used.
    await site.ensure(Image("python").script("two"))
    await site.store.evict(size - freed - 1)
    assert set(entries(tmp_path)) == everything - names(images[:1]) - names(images[2:])


async def test_the_images_that_come_with_the_library_stay(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    await make_images(site, "one")
    await site.store.evict(0)
    assert [name.partition("-")[0] for name in entries(tmp_path)] == ["python", "system"]
    older = ImageStore(tmp_path / "cache", recipes={"python": TinyRecipe("python", "2")}, system=TinyRecipe("system"))
    await older.ensure("python")
    assert len(entries(tmp_path)) == 3
    await older.evict(0)  # the build of another version, which nothing stands on any more
    assert len(entries(tmp_path)) == 2


async def test_a_layer_goes_only_after_those_that_stand_on_it(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    lower = await site.ensure(Image("python").script("one"))
    upper = await site.ensure(Image("python").script("one").script("two"))
    used(lower, 9)
    with site.store.hold(upper.entries) as held:
        assert held
        used(lower, 9)
        assert await site.store.evict(0) == 0
    assert names([lower, upper]) < set(entries(tmp_path))
    await site.store.evict(0)
    assert not names([lower, upper]) & set(entries(tmp_path))


_HOLD_IN_ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
from trio_sandbox.image import ImageStore

with ImageStore(Path(sys.argv[1])).hold(map(Path, sys.argv[2:])) as held:
    print(held, flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(cache: Path, image: BuiltImage) -> Generator[None]:
    """Another process that has a sandbox of an image open, so to speak; killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", _HOLD_IN_ANOTHER_PROCESS, os.fspath(cache), *map(os.fspath, image.entries)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"True\n"
            yield
        finally:
            process.kill()


async def test_what_another_process_has_open_stays_until_it_ends(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    one, two = await make_images(site, "one", "two")
    with held_elsewhere(tmp_path / "cache", one):
        await site.store.evict(0)
        assert names([one]) < set(entries(tmp_path))
        assert not names([two]) & set(entries(tmp_path))
        # It is the build of another version now: prune leaves it alone as well.
        newer = ImageStore(tmp_path / "cache", recipes={}, system=TinyRecipe("system", "2"))
        await newer.prune()
        assert names([one]) < set(entries(tmp_path))
    await site.store.evict(0)
    assert not names([one]) & set(entries(tmp_path))


def make_template(cache: Path, image: BuiltImage) -> Path:
    """Make what tells of a template: its disk, which stands on an image."""
    directory = cache / "templates" / ("a" * 24)
    directory.parent.mkdir(mode=0o700)
    make_marked(directory)
    name = os.fsencode(image.top)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 1024, len(name), 16, 4, 0, 0, 0, 0, 0, 0, 0)
    header = header.ljust(100, b"\0") + struct.pack(">I", 104)
    (directory / "overlay.qcow2").write_bytes(header.ljust(1024, b"\0") + name)
    return directory


def save_on(cache: Path, image: BuiltImage) -> Path:
    """Make what tells of a saved sandbox, of a version that wrote more into it, or less."""
    manifest = cache / "saved" / "mine.json"
    manifest.parent.mkdir(mode=0o700)
    manifest.write_text(json.dumps({"format": 99, "image": image.name, "image_digest": image.digest}))
    return manifest


async def test_what_a_template_or_a_saved_sandbox_stands_on_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    site = make_site(tmp_path)
    one, two, three = await make_images(site, "one", "two", "three")
    template, saved = make_template(cache, one), save_on(cache, two)
    dependents = Dependents(cache)
    assert dependents.templates_on(one.top.parent) == ["a" * 24]
    assert dependents.saved_on(two.top.parent) == ["mine"]
    await prune(site.store, dependents, 0)
    assert names([one, two]) < set(entries(tmp_path))
    assert not names([three]) & set(entries(tmp_path))
    freed, left = capsys.readouterr().out.splitlines()
    assert freed == "0 MiB freed"
    assert left.startswith("0 MiB are left: images that come with trio-sandbox, and what open sandboxes, templates")

    # Where the version that made them is not there any more, a saved sandbox is still its user's; a template can be made again.
    newer = ImageStore(cache, recipes={}, system=TinyRecipe("system", "2"))
    await prune(newer, dependents, None)
    assert names([two]) < set(entries(tmp_path))
    assert not names([one]) & set(entries(tmp_path))
    assert "python-1111111111111111" in entries(tmp_path)  # what that stands on
    (template / "overlay.qcow2").unlink()
    saved.unlink()
    await prune(newer, dependents, None)
    assert entries(tmp_path) == []


@attrs.define
class Builder:
    """Stands in for the virtual machines that make layers."""

    config: SandboxConfig = attrs.field(factory=SandboxConfig)

    async def build(self, job: LayerJob, gateway: Gateway, report: Callable[[str, float | None], object]) -> None:
        await trio.lowlevel.checkpoint()
        job.overlay.write_bytes(os.urandom(SIZE))


def no_gateway(network: Network) -> Gateway:
    return cast("Gateway", network)


def host_images(tmp_path: Path, *, budget_mib: int | None = None, build: bool = True) -> HostImages:
    """The images of one host, with a store of its own on the common cache."""
    return HostImages(
        make_site(tmp_path).store,
        cast("LayerBuilder", Builder()),
        Admission(HostConfig(memory_budget_mib=10_000, vcpu_budget=100), tmp_path),
        no_gateway,
        build=build,
        progress=lambda progress: None,
        environment={},
        dependents=Dependents(tmp_path / "cache"),
        budget_mib=budget_mib,
    )


async def test_a_host_keeps_its_budget_and_what_its_sandboxes_stand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SIZE", 400 * 1024)
    first, second = host_images(tmp_path), host_images(tmp_path, budget_mib=1)
    one, two, three, four = (Image("python").script(name) for name in ("one", "two", "three", "four"))
    with nothing_left():
        async with first.hold(one) as (held, _):
            for image in (two, three, four):
                async with second.hold(image) as (latest, _):
                    assert latest.top.exists()
            left = {entry for entry in entries(tmp_path) if "+" in entry}
            assert left == names([held, latest])
        assert latest.top.exists()
        # One that builds nothing evicts nothing, and finds what was evicted missing.
        async with host_images(tmp_path, budget_mib=1, build=False).hold(one):
            pass
        assert {entry for entry in entries(tmp_path) if "+" in entry} == left
        # A host that knew an image has it made anew.
        async with second.hold(two) as (again, _):
            assert again.top.exists()


async def test_one_that_is_removed_just_now_is_waited_for(tmp_path: Path) -> None:
    images = host_images(tmp_path)
    image = Image("python").script("one")
    async with images.hold(image) as (built, _):
        pass
    looking = try_lock_directory(built.top.parent)  # as one who looks whether it may be removed
    assert looking.__enter__()
    opened = trio.Event()

    async def open_it() -> None:
        async with images.hold(image) as (again, _):
            assert again.top.exists()
            opened.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_it)
        await trio.testing.wait_all_tasks_blocked()
        assert not opened.is_set()
        await make_site(tmp_path).store.remove(built.name)
        looking.__exit__(None, None, None)
    assert opened.is_set()
