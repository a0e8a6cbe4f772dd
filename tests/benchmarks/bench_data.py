"""The image `data` against pip in a guest: the same packages, both from wheels that were fetched before."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from trio_sandbox import HostConfig, SandboxConfig, open_host
from trio_sandbox.bench import Figure
from trio_sandbox.image import ImageStore, default_cache_directory, spell_out

from .bench_packages import _DOWNLOAD as DOWNLOAD, _PIP as PIP, _forget as forget, _seconds as seconds

_OPENED = 3
_IMPORTS = "import numpy, pandas, matplotlib.pyplot"
_PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 34)]


async def measure() -> list[Figure]:
    """Measure with the user's own cache, where the image is built anew."""
    store = ImageStore(default_cache_directory())
    image = spell_out("data")
    assert not isinstance(image, str)
    (step,) = image.steps
    packages = [str(each) for each in getattr(step, "requirements")]  # noqa: B009 - a step of packages
    async with open_host() as host:
        await host.prepare("data")
        by = f"under {host.accelerator.name}"
    with tempfile.TemporaryDirectory(prefix="bench-data-") as wheels:
        await trio.run_process([sys.executable, *DOWNLOAD, "--no-deps", *_PLATFORMS, "-d", wheels, *packages])
        mounted = SandboxConfig(memory_mib=2048, mounts={"/mnt/wheels": Path(wheels)})

        async def by_pip() -> None:
            async with open_host() as host, host.open_sandbox("python", mounted) as sandbox:
                # What Debian has installed pip can not uninstall.
                command = f"{PIP} --no-deps --ignore-installed {' '.join(packages)}"
                await sandbox.run_process(["sh", "-c", command], user="root", check=True)
                await sandbox.run(_IMPORTS, check=True)

        async def by_image(host_config: HostConfig) -> None:
            async with open_host(host_config) as host, host.open_sandbox("data", memory_mib=1024) as sandbox:
                await sandbox.run(_IMPORTS, check=True)

        await forget(store, image)
        built = await seconds(partial(by_image, HostConfig()))
        opened = [await seconds(partial(by_image, HostConfig(build_images=False))) for _ in range(_OPENED)]
        reference = await seconds(by_pip)
    return [
        Figure.of(f"image data, from fetched wheels to its first imports, {by}", [built], "s"),
        Figure.of(f"image data that is there, from opening to its first imports, {by}", opened, "s"),
        Figure.of(f"reference: pip in a guest, with the same wheels as files, and the imports, {by}", [reference], "s"),
        Figure.of("image data against pip in a guest", [built / reference], "x", at_most=1),
    ]
