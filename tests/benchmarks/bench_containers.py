"""A container image of 100 MB, from an archive to the first output; and, once it is there, against the built-in image in turns."""

from __future__ import annotations

import gzip
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import trio

from tests._oci import archive, member, write_layout
from trio_sandbox import Host, HostConfig, Image, UnknownImageError, open_host
from trio_sandbox.bench import Figure
from trio_sandbox.image import ImageStore, default_cache_directory

from ._unmeasured import UnmeasuredError

_ARCHIVE_BYTES = 100 * 10**6
#: Bytes of one file that fills it up.
_FILE_BYTES = 10**6
_FETCHED, _STARTS = 3, 10
_BOOTING = HostConfig(templates=False)


async def measure() -> list[Figure]:
    """Measure with the user's own cache, from which the image is removed again."""
    if shutil.which("skopeo") is None:
        raise UnmeasuredError("skopeo, which fetches container images, is not installed")
    store = ImageStore(default_cache_directory())
    async with open_host() as host:
        await host.prepare("python")  # its user land is that of the container image, too
        by = f"under {host.accelerator.name}"
    with tempfile.TemporaryDirectory(prefix="bench-containers-") as directory:
        reference = f"oci-archive:{await trio.to_thread.run_sync(_make_archive, store, Path(directory))}"
        image = Image.oci(reference)
        try:
            return await _measure(store, image, by)
        finally:
            with trio.CancelScope(shield=True):
                await _forget(store, image)


async def _measure(store: ImageStore, image: Image, by: str) -> list[Figure]:
    beyond: list[float] = []
    for _ in range(_FETCHED):
        await _forget(store, image)
        async with open_host(_BOOTING) as host:
            first = await _first_output(host, image)
            beyond.append(first - await _first_output(host, image))
    ours: list[float] = []
    built_in: list[float] = []
    async with open_host() as host:
        for each in (image, "python"):
            await _first_output(host, each)  # makes the template
        for _ in range(_STARTS):
            ours.append(await _first_output(host, image))
            built_in.append(await _first_output(host, "python"))
    return [
        Figure.of(
            f"a container image of {_ARCHIVE_BYTES // 10**6} MB, from an archive to first output beyond the boot, {by}",
            beyond,
            "s",
            at_most=15,
        ),
        Figure.of(f"the same image from its template to first output, {by}", ours, "s"),
        Figure.of(f"reference: the image python from its template to first output, {by}", built_in, "s"),
        Figure(
            name="container image against built-in image, medians",
            value=statistics.median(ours) / statistics.median(built_in),
            unit="x",
            samples=_STARTS,
            at_most=1.2,
        ),
    ]


async def _forget(store: ImageStore, image: Image) -> None:
    with suppress(UnknownImageError):  # it is not there yet, or nothing could be made of it
        await store.remove(image.name)


def _make_archive(store: ImageStore, directory: Path) -> Path:
    """Make an archive of an image with Debian's Python, filled up with what can't be packed."""
    (base,) = [each for each in store.list() if each.name == "system-base" and each.current]
    layers = [(base.path / "userland.tar").read_bytes()]
    packed = [gzip.compress(layers[0], 1)]
    files = (_ARCHIVE_BYTES - len(packed[0])) // _FILE_BYTES
    layers.append(archive(*(member(f"srv/data/{number}", os.urandom(_FILE_BYTES)) for number in range(files))))
    packed.append(gzip.compress(layers[1], 1))
    write_layout(directory / "image", *layers, packed=packed, config={"Cmd": ["python3"]})
    with tarfile.open(target := directory / "image.tar", "w") as tar:
        tar.add(directory / "image", ".")
    return target


async def _first_output(host: Host, image: str | Image) -> float:
    start = time.perf_counter()
    async with host.open_sandbox(image) as sandbox:
        result = await sandbox.run("print(1)", language="python")
        seconds = time.perf_counter() - start
        assert result.stdout == "1\n", result
        return seconds
