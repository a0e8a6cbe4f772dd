"""Images with packages: what making a layer takes, finding it, and a first plot; against pip in a guest that has the same wheels as files.

The wheels are fetched before anything is measured, into uv's cache and for pip. That takes the network, the extra ``packages``, and pip.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from trio_sandbox import Host, HostConfig, Image, SandboxConfig, open_host
from trio_sandbox.bench import Figure
from trio_sandbox.image import ImageStore, default_cache_directory

_PACKAGES = ("pandas", "matplotlib")
_MORE = "openpyxl"
_BUILDS, _FOUND, _PLOTS = 2, 20, 10
_IMAGE = Image("python").packages(*_PACKAGES)
_PLOTTING = SandboxConfig(
    memory_mib=1024,
    warmup="import pandas as pd, matplotlib.pyplot as plt; plt.plot(pd.Series([1])); plt.savefig('/dev/null', format='png'); plt.close()",
)
_PLOT = "_ = plt.plot(pd.Series(range(100)).cumsum())"
_DOWNLOAD = ("-m", "pip", "download", "-q", "--only-binary", ":all:", "--python-version", "3.13")
_PIP = "PIP_ROOT_USER_ACTION=ignore pip install -q --no-index --find-links /mnt/wheels"


async def measure() -> list[Figure]:
    """Measure with the user's own cache, where the layers stay."""
    store = ImageStore(default_cache_directory())
    more = _IMAGE.packages(_MORE)
    async with open_host() as host:
        await host.prepare(more)
        by = f"under {host.accelerator.name}"
    builds: list[float] = []
    second: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-packages-") as wheels:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 34)]
        await trio.run_process([sys.executable, *_DOWNLOAD, *platforms, "-d", wheels, *_PACKAGES])
        reference: list[float] = []
        for _ in range(_BUILDS):
            for image, seconds in ((_IMAGE, builds), (more, second)):
                await _forget(store, image)
                async with open_host() as host:
                    seconds.append(await _seconds(partial(host.prepare, image)))
            reference.append(await _pip(Path(wheels)))
    found: list[float] = []
    for _ in range(_FOUND):
        async with open_host(HostConfig(build_images=False)) as host:
            found.append(1000 * await _seconds(partial(host.prepare, _IMAGE)))
    plots, first = await _plots()
    return [
        Figure.of(
            f"image with {' and '.join(_PACKAGES)}, from fetched wheels to a layer, {by}", builds, "s", at_most=20
        ),
        Figure.of(f"reference: pip in a guest, with the same wheels as files, {by}", reference, "s"),
        Figure.of(f"one package more, on a layer that is there, {by}", second, "s"),
        Figure.of("an unchanged image, until it is found intact", found, "ms", at_most=50),
        Figure.of(f"first plot in a sandbox of a template that has plotted, {by}", plots, "s", at_most=0.5),
        Figure.of(f"from opening such a sandbox to the first plot, {by}", first, "s"),
    ]


async def _forget(store: ImageStore, image: Image) -> None:
    """Remove the topmost layer of *image*, and what stands on it."""
    for each in store.list():
        if each.step == str(image.steps[-1]):
            await store.remove(each.name)


async def _pip(wheels: Path) -> float:
    config = SandboxConfig(memory_mib=2048, mounts={"/mnt/wheels": wheels})
    async with open_host() as host, host.open_sandbox("python", config) as sandbox:
        return await _seconds(
            lambda: sandbox.run_process(["sh", "-c", f"{_PIP} {' '.join(_PACKAGES)}"], user="root", check=True)
        )


async def _plots() -> tuple[list[float], list[float]]:
    plots: list[float] = []
    first: list[float] = []
    async with open_host() as host:
        async with host.open_sandbox(_IMAGE, _PLOTTING):
            pass  # makes the template
        for _ in range(_PLOTS):
            start = time.perf_counter()
            plots.append(await _plot(host))
            first.append(time.perf_counter() - start)
    return plots, first


async def _plot(host: Host) -> float:
    async with host.open_sandbox(_IMAGE, _PLOTTING) as sandbox:
        start = time.perf_counter()
        result = await sandbox.run(_PLOT)
        seconds = time.perf_counter() - start
        assert any(display.mime == "image/png" for display in result.displays), result
        return seconds


async def _seconds(action: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await action()
    return time.perf_counter() - start
