"""Container images, and layers on them, that move to another machine by way of a file: one without skopeo, registry and archive."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._index import make_wheel, serve_index
from tests._leaks import cancel_at_every_step, nothing_left
from tests._oci import archive, directory, member, write_fetched, write_layout
from trio_sandbox import Image, ImageCorruptError, ImageError, ImageMissingError, MissingProgramError, OciError
from trio_sandbox._oci_reference import parse_oci
from trio_sandbox.cli._image import read
from trio_sandbox.image import (
    BuiltImage,
    Cargo,
    ImageStore,
    LayerJob,
    Receive,
    describe_cargo,
    ensure_layers,
    entries_of,
    export_image,
    import_images,
    take_cargo,
)
from trio_sandbox.image._containers import ensure_container
from trio_sandbox.image._imported import receive_from
from trio_sandbox.image._stored import IMAGE_NAME
from trio_sandbox.image.oci import Note, OciRecipe, _recipe, note_path, read_note, state_of, write_note

from .test_container_packages import said
from .test_fleet_images import System
from .test_image_exchange import changed, disk
from .test_image_layers import Site, entries
from .test_image_store import TinyRecipe, files_below
from .test_oci_fetching import needs_skopeo, serve

REFERENCE = "docker://example.org/app:1"
LAYER = archive(
    member("etc/passwd", "app:x:1234:1235::/app:/bin/sh\n"),
    directory("usr/bin"),
    member("usr/bin/python3.12", mode=0o755),
    member("usr/bin/python3", "python3.12", kind="symlink"),
)
CONFIG: dict[str, object] = {
    "User": "app",
    "WorkingDir": "/srv",
    "Cmd": ["python3", "-m", "app"],
    "Env": ["A=b"],
    "Labels": {"maker": "x"},
}


async def fill(job: LayerJob) -> None:
    await trio.lowlevel.checkpoint()
    job.overlay.write_bytes(disk(job.work.script, job.image.virtual_size))


@attrs.define
class ContainerSite(Site):
    """A store, and layers on container images."""

    async def ensure(self, image: Image, *, build: bool = True) -> BuiltImage:
        tell = self.progress.append
        base = await ensure_container(self.store, parse_oci(image.name), build=build, progress=tell, environment={})
        system = await self.store.ensure_system()
        return await ensure_layers(
            self.store, image, base, system, self.run, build=build, progress=tell, environment={}
        )


def make_site(where: Path) -> ContainerSite:
    store = ImageStore(where / "cache", recipes={}, system=TinyRecipe("system"))
    return ContainerSite(store, after=fill, answers={"python3": said()})


async def fetched(site: Site, where: Path, reference: str = REFERENCE, layer: bytes = LAYER) -> BuiltImage:
    """Have an image in the store as if it had been fetched by that name."""
    manifest = write_fetched(where, layer, config=CONFIG).partition(":")[2]
    recipe = OciRecipe(manifest=manifest, reference=reference, directory=where)
    built = await site.store.ensure_container(recipe)
    name = parse_oci(reference)
    write_note(note_path(site.store.containers, name), Note(reference, state_of(name), manifest))
    return built


async def take(site: Site, file: Path) -> list[str]:
    return list(await import_images(site.store, file, progress=site.progress.append, environment={}))


async def exported(tmp_path: Path, *steps: str) -> tuple[BuiltImage, Path]:
    """Make an image with scripts on it, and a file of it."""
    site = make_site(tmp_path / "here")
    image = await fetched(site, tmp_path / "fetched")
    value = Image.oci(REFERENCE)
    for step in steps:
        value = value.script(step)
    if steps:
        image = await site.ensure(value)
    file = tmp_path / "image.tar"
    assert await export_image(site.store, image.name, file) == file.stat().st_size
    return image, file


def facts(image: BuiltImage) -> object:
    """Return all that an image is, but for where it is."""
    files = [each.read_bytes() for each in (image.path, *image.layers)]
    return files, attrs.evolve(
        image,
        path=Path(),
        layers=(),
        size_bytes=0,
        manifest=attrs.evolve(image.manifest, created=0),
    )


@needs_skopeo
async def test_an_image_of_a_registry_is_the_same_without_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = make_site(tmp_path / "here"), make_site(tmp_path / "there")
    with serve(tmp_path, monkeypatch) as registry:
        names = [registry.reference, f"{registry.reference.removesuffix(':latest')}@sha256:{registry.manifest}"]
        images = [Image.oci(name).script("one") for name in names]
        image = await here.ensure(images[0])
        await here.ensure(images[1])
    file = tmp_path / "image.tar"
    await export_image(here.store, image.name, file)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    with pytest.raises(MissingProgramError):
        await there.ensure(images[0])
    with nothing_left():
        assert await take(there, file) == [image.entries[0].name.rpartition("-")[0], image.name]
    for value in images:
        assert facts(await there.ensure(value, build=False)) == facts(image)
    assert there.jobs == []
    # And it goes on from there.
    file.unlink()
    await export_image(there.store, names[0], file)
    third = make_site(tmp_path / "third")
    await take(third, file)
    assert (await third.ensure(Image.oci(names[1]))).languages == image.languages


async def test_a_container_image_is_found_where_it_was_imported(tmp_path: Path) -> None:
    image, file = await exported(tmp_path)
    there = make_site(tmp_path / "there")
    assert await take(there, file) == [image.name]
    again = await there.ensure(Image.oci(REFERENCE), build=False)
    assert facts(again) == facts(image)
    assert (again.languages, again.command) == (("python",), ("python3", "-m", "app"))
    assert again.settings == image.settings
    assert again.top.stat().st_blocks * 512 < 2**20  # of 8 GiB
    assert await there.store.ensure(image.name, build=False) == again
    (stored,) = [each for each in there.store.list() if each.name == image.name]
    assert (stored.step, stored.current) == (REFERENCE, True)
    before = files_below(tmp_path / "there" / "cache")
    await take(there, file)
    assert files_below(tmp_path / "there" / "cache") == before
    await there.store.prune()
    assert await there.ensure(Image.oci(REFERENCE), build=False) == again


async def test_layers_on_a_container_image_move_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "alpha", "1.0")
    value = Image.oci(REFERENCE).script("one").packages("alpha").env({"A": "c"})
    with serve_index(wheels, monkeypatch):
        here = make_site(tmp_path / "here")
        await fetched(here, tmp_path / "fetched")
        image = await here.ensure(value)
        await export_image(here.store, image.name, tmp_path / "image.tar")
        make_wheel(wheels, "alpha", "2.0")
        there = make_site(tmp_path / "there")
        assert len(await take(there, tmp_path / "image.tar")) == 4
        assert facts(await there.ensure(value)) == facts(image)
        assert (there.jobs, there.asked) == ([], [])
        more = await there.ensure(value.script("more"))
    assert len(there.jobs) == 1
    assert await there.store.remove(REFERENCE) > 0
    assert not any(entry.name in (image.name, more.name) for entry in there.store.list())


async def test_a_name_that_stands_for_what_is_there_is_kept(tmp_path: Path) -> None:
    image, file = await exported(tmp_path)
    there = make_site(tmp_path / "there")
    other = await fetched(there, tmp_path / "other", layer=LAYER + bytes(512))
    await take(there, file)
    assert (await there.ensure(Image.oci(REFERENCE))).name == other.name
    assert facts(await there.store.ensure(image.name, build=False)) == facts(image)
    # It is gone, and so the name is free, although the note of it is not pruned yet.
    await there.store.remove(other.name)
    await take(there, file)
    assert (await there.ensure(Image.oci(REFERENCE), build=False)).name == image.name


async def test_a_name_of_a_file_stands_where_there_is_no_such_file(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    write_layout(layout, LAYER, config=CONFIG)
    reference = f"oci:{layout}"
    here, there = make_site(tmp_path / "here"), make_site(tmp_path / "there")
    image = await fetched(here, tmp_path / "fetched", reference)
    await export_image(here.store, reference, tmp_path / "image.tar")
    shutil.rmtree(layout)
    with pytest.raises(OciError, match="can't be read"):
        await export_image(here.store, reference, tmp_path / "other.tar")
    await export_image(here.store, image.name, tmp_path / "other.tar")
    assert (tmp_path / "other.tar").read_bytes() == (tmp_path / "image.tar").read_bytes()
    with pytest.raises(OciError, match="can't be read"):
        await there.ensure(Image.oci(reference))
    await take(there, tmp_path / "image.tar")
    assert facts(await there.ensure(Image.oci(reference), build=False)) == facts(image)
    # Also where it was fetched from that file.
    await take(here, tmp_path / "image.tar")
    assert facts(await here.ensure(Image.oci(reference), build=False)) == facts(image)
    # A file of that name is what is meant by it.
    write_layout(layout, archive(member("other")))
    with pytest.raises(ImageMissingError):
        await there.ensure(Image.oci(reference), build=False)


async def test_a_node_of_a_fleet_has_it_from_another(tmp_path: Path) -> None:
    here, there = (
        ContainerSite(ImageStore(tmp_path / name, recipes={}, system=System()), after=fill)
        for name in ("here", "there")
    )
    await fetched(here, tmp_path / "fetched")
    value = Image.oci(REFERENCE).script("one")
    image, system = await here.ensure(value), await here.store.ensure_system()
    cargo = describe_cargo(here.store, image, system)
    directories = entries_of(image, system)

    async def send(changed: Cargo) -> None:
        def open_file(entry: int, name: str) -> Receive:
            return receive_from(io.BytesIO((directories[entry] / name).read_bytes()))

        await take_cargo(there.store, changed, open_file, progress=there.progress.append, environment={})

    for references in (("python",), ("docker://a b",), (REFERENCE,) * 101):
        with pytest.raises(ImageError, match="and nothing was fetched"):
            await send(attrs.evolve(cargo, references=references))
    assert there.store.list() == []
    await send(cargo)
    assert facts(await there.ensure(value, build=False)) == facts(image)
    assert there.jobs == []


async def test_two_imports_at_once_are_one(tmp_path: Path) -> None:
    image, file = await exported(tmp_path, "one")
    there = make_site(tmp_path / "there")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(take, there, file)
    assert facts(await there.ensure(Image.oci(REFERENCE).script("one"), build=False)) == facts(image)
    assert len(there.store.list()) == 3
    assert len(list(there.store.containers.iterdir())) == 1
    assert list((tmp_path / "there" / "cache" / "staging").iterdir()) == []


async def test_a_cancelled_import_leaves_whole_entries_only(tmp_path: Path) -> None:
    image, file = await exported(tmp_path, "one")

    async def run() -> None:
        with nothing_left():
            await take(make_site(tmp_path / "there"), file)

    def check() -> None:
        store = ImageStore(tmp_path / "there" / "cache")
        assert list((store.directory / "staging").glob("*")) == []
        for entry in (store.directory / "store").glob("*"):
            assert (entry / "manifest.json").exists()
        for note in store.containers.glob("*"):
            assert read_note(note).manifest

    assert await cancel_at_every_step(run, check=check) > 5
    assert facts(await make_site(tmp_path / "there").ensure(Image.oci(REFERENCE).script("one"), build=False)) == facts(
        image
    )


Values = dict[str, object]


def settings(base: Values) -> Values:
    return cast("Values", cast("Values", base["details"])["settings"])


HOSTILE: Mapping[str, Callable[[Values, Values], object]] = {
    "another digest": lambda base, _: base.update(digest="0" * 64),
    "another name": lambda base, _: base.update(name="oci+0123456789ab"),
    "the name of ours": lambda base, _: base.update(name="python"),
    "a word in the kernel's command line": lambda base, _: details(base).update(languages=["python init=/bin/sh"]),
    "a language twice": lambda base, _: details(base).update(languages=["python", "python"]),
    "no languages": lambda base, _: details(base).pop("languages"),
    "no settings": lambda base, _: details(base).update(settings=None),
    "a user that is no number": lambda base, _: settings(base).update(user="0:0 quiet"),
    "a high user": lambda base, _: settings(base).update(user=2**32 - 1),
    "a group below zero": lambda base, _: settings(base).update(group=-1),
    "a relative directory": lambda base, _: settings(base).update(directory="srv"),
    "a long directory": lambda base, _: settings(base).update(directory="/" + "d" * 500),
    "a directory that is none": lambda base, _: settings(base).update(directory="/a\0b"),
    "a command of a million words": lambda base, _: settings(base).update(command=[""] * 1_000_000),
    "a zero byte in a command": lambda base, _: settings(base).update(command=["a\0b"]),
    "many labels": lambda base, _: settings(base).update(labels={str(number): "" for number in range(10_000)}),
    "another container": lambda base, _: details(base).update(container="0" * 64),
    "a step that is no name": lambda base, _: details(base).update(step="docker:x"),
    "a large disk": lambda base, _: details(base).update(virtual_size=2**40),
    "a layer that is a container image": lambda base, top: (
        top.update(digest=base["digest"], name=base["name"]),
        details(top).update(container=details(base)["container"]),
    ),
    "a layer that is taken for one": lambda base, top: (
        top.update(digest=base["digest"], name=base["name"]),
        details(top).update(settings=settings(base), languages=["python"]),
    ),
    "a manifest that nobody reads again": lambda base, _: details(base).update(more=["x" * 2**20]),
}


def details(manifest: Values) -> Values:
    return cast("Values", manifest["details"])


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Values, Values], object], hostile: Path
) -> None:
    file = tmp_path / "image.tar"
    shutil.copy(hostile, file)
    with pytest.raises(ImageError, match="can't be imported, and nothing was") as caught:
        await take(make_site(tmp_path / "there"), changed(file, change))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    assert not (tmp_path / "there").exists()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of a container image and a layer, which is as it should be."""
    directory = tmp_path_factory.mktemp("hostile")

    async def make() -> Path:
        _, file = await exported(directory, "one")
        return file

    return trio.run(make)


@pytest.mark.parametrize(
    "references",
    [
        ["python"],
        ["docker://a b"],
        ["oci-archive:app.tar"],
        ["oci-archive:/srv/../etc/app.tar"],
        ["docker-daemon:x"],
        ["docker://x\x1b[2J"],
        [3],
        [None],
        [REFERENCE] * 101,
        REFERENCE,
        {REFERENCE: 1},
    ],
)
async def test_names_in_an_archive_are_those_of_container_images(
    tmp_path: Path, hostile: Path, references: object
) -> None:
    file = tmp_path / "image.tar"
    rewrite(hostile, file, references)
    with pytest.raises(ImageError, match="can't be imported, and nothing was"):
        await take(make_site(tmp_path / "there"), file)
    assert not (tmp_path / "there").exists()


async def test_an_archive_without_names_is_one(tmp_path: Path, hostile: Path) -> None:
    rewrite(hostile, tmp_path / "image.tar", None)
    there = make_site(tmp_path / "there")
    name, _ = await take(there, tmp_path / "image.tar")
    assert not there.store.containers.exists()
    assert (await there.store.ensure(name)).language == "python"


def rewrite(source: Path, target: Path, references: object) -> None:
    """Copy an archive with other names in its index; None: it has none."""
    old = source.read_bytes()
    size = tarfile.TarInfo.frombuf(old[:512], "utf-8", "strict").size
    value, rest = json.loads(old[512 : 512 + size]), old[512 + -(-size // 512) * 512 :]
    del value["references"]
    if references is not None:
        value["references"] = references
    data = json.dumps(value).encode()
    info = tarfile.TarInfo("index.json")
    info.size = len(data)
    target.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) + rest)


async def test_a_disk_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)
    data = bytearray(file.read_bytes())
    at = data.index(b"app:x:1234")
    data[at : at + 3] = b"bpp"
    file.write_bytes(data)
    with pytest.raises(ImageCorruptError, match="its digest is another"):
        await take(make_site(tmp_path / "there"), file)
    assert entries(tmp_path / "there") == []
    assert not list((tmp_path / "there" / "cache" / "staging").iterdir())


async def test_a_disk_may_be_as_large_as_an_image_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipe, "_LEAST_SIZE", 12 * 2**30)
    image, file = await exported(tmp_path)
    assert image.virtual_size == 12 * 2**30
    there = make_site(tmp_path / "there")
    await take(there, file)
    assert (await there.store.ensure(image.name)).virtual_size == image.virtual_size


async def test_the_command_says_by_which_names_an_image_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = await exported(tmp_path)
    await read(make_site(tmp_path / "there").store, file, True)
    assert capsys.readouterr().out == f"{image.name}: imported, as {REFERENCE}\n"
    assert (image.entries[0] / IMAGE_NAME).exists()
