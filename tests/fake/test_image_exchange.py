"""Images that move to another store by way of a file, which nobody there believes."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from tests._index import Index, make_wheel, serve_index
from tests._leaks import cancel_at_every_step, nothing_left
from tests._parsers import STRANGERS_DISK
from trio_sandbox import Image, ImageBuildError, ImageCorruptError, ImageError, ImageMissingError, UnknownImageError
from trio_sandbox.cli._image import read, write
from trio_sandbox.image import BuildContext, BuiltImage, ImageStore, LayerJob, export_image, import_images
from trio_sandbox.image._stored import IMAGE_NAME

from .test_image_layers import PYTHON, Base, Site, entries
from .test_image_store import TinyRecipe, files_below

#: Of the disk that the header tells of.
VIRTUAL_SIZE = 2**30


def disk(text: str, size: int = VIRTUAL_SIZE) -> bytes:
    """Make a disk of *size* with a header that may come from anywhere, and holes."""
    head = STRANGERS_DISK[:24] + size.to_bytes(8, "big") + STRANGERS_DISK[32:]
    return head.ljust(2**18, b"\0") + text.encode() + bytes(2**23)


@attrs.define
class Movable(Base):
    """A base with a disk of QEMU's."""

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).write_bytes(disk("base"))
        return {"virtual_size": VIRTUAL_SIZE, "packages": PYTHON}


async def fill(job: LayerJob) -> None:
    await trio.lowlevel.checkpoint()
    job.overlay.write_bytes(disk(job.work.script))


def make_site(directory: Path, base: TinyRecipe | None = None) -> Site:
    store = ImageStore(directory / "cache", recipes={"python": base or Movable()}, system=TinyRecipe("system"))
    return Site(store, after=fill)


async def take(site: Site, file: Path) -> list[str]:
    return list(await import_images(site.store, file, progress=site.progress.append, environment={}))


IMAGE = Image("python").script("one").script("two")


async def exported(directory: Path) -> tuple[BuiltImage, Path]:
    """Make an image, and a file of it."""
    site = make_site(directory / "here")
    image = await site.ensure(IMAGE)
    file = directory / "image.tar"
    assert await export_image(site.store, image.name, file) == file.stat().st_size
    return image, file


async def test_an_image_is_found_where_it_was_imported(tmp_path: Path) -> None:
    image, file = await exported(tmp_path)
    there = make_site(tmp_path / "there")
    with nothing_left():
        assert await take(there, file) == ["python", image.layers[0].parent.name.rpartition("-")[0], image.name]
        again = await there.ensure(IMAGE)
    assert there.jobs == []
    assert (again.digest, again.content) == (image.digest, image.content)
    assert [each.read_bytes() for each in again.layers] == [each.read_bytes() for each in image.layers]
    assert again.top.stat().st_blocks * 512 < 2**21  # holes are holes again
    assert again.top.stat().st_mode & 0o777 == 0o644
    assert await there.store.ensure(image.name, build=False) == again
    before = files_below(tmp_path / "there" / "cache")
    await take(there, file)  # again is no error
    assert files_below(tmp_path / "there" / "cache") == before


async def test_only_what_is_missing_is_taken(tmp_path: Path) -> None:
    image, file = await exported(tmp_path)
    there = make_site(tmp_path / "there")
    lower = await there.ensure(Image("python").script("one"))
    inode = lower.top.stat().st_ino
    await take(there, file)
    assert lower.top.stat().st_ino == inode
    assert (await there.ensure(IMAGE)).content == image.content


async def test_another_build_of_what_is_there_is_refused(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)

    async def build_another(context: BuildContext) -> None:
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).write_bytes(disk("newer packages"))

    there = make_site(tmp_path / "there", Base(make=build_another))
    await there.store.ensure("python")
    before = entries(tmp_path / "there")
    with pytest.raises(
        ImageError, match="another build of python; `trio-sandbox image rm python` removes that"
    ) as caught:
        await take(there, file)
    assert entries(tmp_path / "there") == before
    assert caught.value.retry_safe


async def test_an_image_of_another_version_is_refused(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)
    for there in (
        make_site(tmp_path / "there", Movable(contents="2")),
        Site(ImageStore(tmp_path / "there" / "cache", recipes={}, system=TinyRecipe("system"))),
    ):
        with pytest.raises(ImageError, match="'python' of another version of trio-sandbox"):
            await take(there, file)
    assert not (tmp_path / "there").exists()


def changed(file: Path, change: Callable[[dict[str, object], dict[str, object]], object]) -> Path:
    """Change the manifests of the image and of the top layer in an archive."""
    with tarfile.open(file) as tar:
        parts = [(member, cast("tarfile.ExFileObject", tar.extractfile(member)).read()) for member in tar]
    index = json.loads(parts[0][1])
    change(index["layers"][0], index["layers"][-1])
    data = json.dumps(index).encode()
    parts[0][0].size = len(data)
    parts[0] = (parts[0][0], data)
    result = b"".join(
        member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512) for member, content in parts
    )
    file.write_bytes(result + bytes(1024))
    return file


async def test_a_disk_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    image, file = await exported(tmp_path)
    data = bytearray(file.read_bytes())
    data[-2 * 2**20] ^= 1  # in the last layer's disk
    file.write_bytes(data)
    there = make_site(tmp_path / "there")
    with (
        nothing_left(),
        pytest.raises(ImageCorruptError, match=f"{image.name.replace('+', '.')} is not what was built"),
    ):
        await take(there, file)
    assert len(entries(tmp_path / "there")) == 2  # those below are whole
    assert not list((tmp_path / "there" / "cache" / "staging").iterdir())


async def test_a_disk_that_names_other_files_is_refused_whatever_its_digest(tmp_path: Path) -> None:
    async def point_elsewhere(job: LayerJob) -> None:
        await trio.lowlevel.checkpoint()
        job.overlay.write_bytes(disk("x").replace(bytes(8), (2**14).to_bytes(8, "big"), 1))

    site = make_site(tmp_path / "here")
    site.after = point_elsewhere
    image = await site.ensure(Image("python").script("one"))
    # Nobody exports such a disk by mistake.
    with pytest.raises(
        ImageError, match=r"can't be moved to another machine: it names a backing file.*image rm python\+"
    ):
        await export_image(site.store, image.name, tmp_path / "image.tar")
    assert not (tmp_path / "image.tar").exists()

    _, file = await exported(tmp_path / "other")
    there = make_site(tmp_path / "there")
    changed(file, lambda base, _: cast("dict[str, object]", base["details"]).update(virtual_size=2**31))
    with (
        nothing_left(),
        pytest.raises(ImageError, match="the disk of python: it is a disk of 1073741824 bytes, and not of"),
    ):
        await take(there, file)
    assert entries(tmp_path / "there") == []


async def test_a_layer_has_the_name_of_its_digest(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)
    changed(file, lambda _, top: top.update(name="python+0123456789ab"))
    with pytest.raises(ImageError, match="not the name of that layer"):
        await take(make_site(tmp_path / "there"), file)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("what", ["directory", "pipe", "missing", "empty", "text"])
async def test_what_is_no_archive_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "image.tar"
    if what == "directory":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what != "missing":
        file.write_text("" if what == "empty" else "hello" * 1000)
    with pytest.raises(ImageError if what in ("empty", "text") else OSError):
        await take(make_site(tmp_path / "there"), file)
    assert not (tmp_path / "there").exists()


async def test_what_was_chosen_moves_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", "alpha", "1.0")
    image = Image("python").packages("alpha")
    with serve_index(tmp_path / "index", monkeypatch) as index:
        assert isinstance(index, Index)
        site = make_site(tmp_path / "here")
        built = await site.ensure(image)
        await export_image(site.store, built.name, tmp_path / "image.tar")
        make_wheel(tmp_path / "index", "alpha", "2.0")
        there = make_site(tmp_path / "there")
        await take(there, tmp_path / "image.tar")
        assert (await there.ensure(image)).content == built.content
        assert there.jobs == []
    (lock,) = (tmp_path / "there" / "cache" / "pylocks").iterdir()
    assert lock.stat().st_mode & 0o777 == 0o644
    lock.write_text("damaged")
    await take(there, tmp_path / "image.tar")
    assert lock.read_text() == "damaged"  # nothing that is there is replaced


async def test_an_export_leaves_a_whole_file_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = make_site(tmp_path / "here")
    image = await site.ensure(IMAGE)
    file = tmp_path / "out" / "image.tar"
    file.parent.mkdir()

    async def export() -> None:
        with nothing_left():
            await export_image(site.store, image.name, file)
        file.unlink()

    def check() -> None:
        assert list(file.parent.iterdir()) == []

    assert await cancel_at_every_step(export, check=check) > 3
    await write(site.store, image.name, file)
    assert capsys.readouterr().out == f"{image.name}: {file}, 25 MiB\n"
    content = file.read_bytes()
    with pytest.raises(FileExistsError):
        await export_image(site.store, image.name, file)
    assert file.read_bytes() == content
    with pytest.raises(UnknownImageError):
        await export_image(site.store, "none", file)
    image.top.write_bytes(b"damaged")
    with pytest.raises(ImageCorruptError):
        await export_image(site.store, image.name, tmp_path / "out" / "other")
    await site.store.remove("python")
    with pytest.raises(ImageMissingError):
        await export_image(site.store, "python", tmp_path / "out" / "other")
    check_only = {path.name for path in file.parent.iterdir()}
    assert check_only == {"image.tar"}


async def test_a_cancelled_import_leaves_whole_layers_only(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)

    async def run() -> None:
        with nothing_left():
            await take(make_site(tmp_path / "there"), file)

    def check() -> None:
        for entry in (tmp_path / "there" / "cache" / "store").glob("*"):
            assert (entry / "manifest.json").exists()
        assert list((tmp_path / "there" / "cache" / "staging").glob("*")) == []

    assert await cancel_at_every_step(run, check=check) > 5
    there = make_site(tmp_path / "there")
    await there.ensure(IMAGE)
    assert there.jobs == []


async def test_a_store_that_cant_be_written_is_one_error(tmp_path: Path) -> None:
    _, file = await exported(tmp_path)
    (tmp_path / "there").write_text("a file")
    with pytest.raises(ImageBuildError, match="can't be written"):
        await take(make_site(tmp_path / "there"), file)


async def test_the_command_says_what_was_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, file = await exported(tmp_path)
    await read(make_site(tmp_path / "there").store, file, True)
    assert capsys.readouterr().out.splitlines()[-1] == f"{image.name}: imported"
