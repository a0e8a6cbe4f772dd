"""Making an overlay: from the pool, through the storage daemon, and by ``qemu-img create``.

ext4 does not give an inode to a new file within minutes of its last file's deletion, and looks
at each such inode in turn when a file is made. After a few thousand deletions, by earlier runs of
this for instance, making even an empty file takes 0.6 ms instead of 0.01 ms. Hence few files
here, and the empty file among the figures: what it costs is the file system's, not the pool's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time

import trio

from trio_sandbox.bench import Figure
from trio_sandbox.qemu import open_overlay_pool, open_storage_daemon

#: Alternating rounds, so that a machine that gets slower for a while does so for all three.
_ROUNDS = 10
_RUNS = 10
_POOL_RUNS = 30


def _milliseconds_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _qemu_img(*arguments: str) -> None:
    # No Trio in the reference: what it costs to start a process from here is not qemu-img's.
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments], check=True)


async def measure() -> list[Figure]:
    """Measure both ways of ours against ``qemu-img create``, in the same run."""
    empty_file: list[float] = []
    from_pool: list[float] = []
    through_daemon: list[float] = []
    by_qemu_img: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        base = os.path.join(directory, "base.qcow2")
        _qemu_img(base, "8G")
        async with open_storage_daemon(directory=directory) as daemon, open_overlay_pool(daemon) as pool:
            await pool.acquire(base, os.path.join(directory, "first"))
            await daemon.create_overlay(base, os.path.join(directory, "second"))
            for round_ in range(_ROUNDS):
                for run in range(_POOL_RUNS):
                    target = os.path.join(directory, f"pool-{round_}-{run}")
                    start = time.perf_counter()
                    await pool.acquire(base, target)
                    from_pool.append(_milliseconds_since(start))
                for run in range(_RUNS):
                    start = time.perf_counter()
                    os.close(os.open(os.path.join(directory, f"empty-{round_}-{run}"), os.O_CREAT | os.O_EXCL))
                    empty_file.append(_milliseconds_since(start))
                for run in range(_RUNS):
                    target = os.path.join(directory, f"daemon-{round_}-{run}")
                    start = time.perf_counter()
                    await daemon.create_overlay(base, target)
                    through_daemon.append(_milliseconds_since(start))
                for run in range(_RUNS):
                    target = os.path.join(directory, f"qemu-img-{round_}-{run}")
                    start = time.perf_counter()
                    _qemu_img("-b", base, "-F", "qcow2", target)
                    by_qemu_img.append(_milliseconds_since(start))
                    await trio.lowlevel.checkpoint()
    reference = statistics.median(by_qemu_img)
    return [
        Figure.of("an empty file in the same directory", empty_file, "ms"),
        Figure.of("overlay from the pool", from_pool, "ms", at_most=0.2),
        Figure.of("overlay through the storage daemon", through_daemon, "ms"),
        Figure.of("overlay by qemu-img create", by_qemu_img, "ms"),
        Figure(
            name="qemu-img create / overlay from the pool",
            value=reference / statistics.median(from_pool),
            unit="x",
            samples=len(from_pool),
            at_least=50,
        ),
        Figure(
            name="qemu-img create / overlay through the storage daemon",
            value=reference / statistics.median(through_daemon),
            unit="x",
            samples=len(through_daemon),
            at_least=1.5,
        ),
    ]
