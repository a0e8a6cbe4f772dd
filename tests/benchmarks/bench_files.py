"""Files to and from a guest, against what the same bytes take through a process's standard input and output.

The reference goes the same way through port, agent and pipes, without a file helper and without a disk. So
the ratio tells what files cost, and the reference what the port and the agent's Python allow on this machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from trio_sandbox import Sandbox, open_host
from trio_sandbox.bench import Figure, durations

_ROUNDS = 5
_SIZE = 64 * 2**20
_FILES = 1000
_FILE_SIZE = 1000


async def measure() -> list[Figure]:
    """Measure in one sandbox; rounds alternate, so that a machine that gets slower for a while does so for all."""
    with tempfile.TemporaryDirectory(prefix="bench-files-") as name:
        async with open_host() as host, host.open_sandbox() as sandbox:
            return await _measure(sandbox, Path(name), f"under {sandbox.accelerator}")


async def _measure(sandbox: Sandbox, directory: Path, by: str) -> list[Figure]:
    large, tree, back = directory / "large", directory / "tree", directory / "back"
    data = os.urandom(_SIZE)
    await trio.Path(large).write_bytes(data)
    await trio.to_thread.run_sync(_make_tree, tree)

    async def drop(name: str) -> None:
        await sandbox.run_process(["rm", "-rf", name])

    async def swallow() -> None:
        await sandbox.run_process(["sh", "-c", "cat > /dev/null"], stdin=data)

    up: list[float] = []
    down: list[float] = []
    reference: list[float] = []
    tree_up: list[float] = []
    tree_down: list[float] = []
    for _ in range(_ROUNDS):
        reference.append(_SIZE / 1e6 / await _seconds(swallow))
        up.append(_SIZE / 1e6 / await _seconds(lambda: sandbox.upload(large, "large")))
        down.append(_SIZE / 1e6 / await _seconds(lambda: sandbox.download("large", back)))
        tree_up.append(await _seconds(lambda: sandbox.upload(tree, "tree")))
        tree_down.append(await _seconds(lambda: sandbox.download("tree", directory / "tree back")))
        await trio.run_process(["rm", "-rf", str(directory / "tree back")])
        await drop("large")
        await drop("tree")
    path = sandbox.path("small")
    await path.write_text("hello")
    stat = await durations(path.stat, runs=200, warm_up=10)
    write = await durations(lambda: path.write_text("hello"), runs=100, warm_up=10)
    return [
        Figure.of(f"upload of 64 MiB, {by}", up, "MB/s", at_least=40),
        Figure.of(f"download of 64 MiB, {by}", down, "MB/s", at_least=40),
        Figure.of("reference: 64 MiB to a process's standard input", reference, "MB/s"),
        Figure.of("upload against the reference", [a / b for a, b in zip(up, reference, strict=True)], "x"),
        Figure.of(f"upload of {_FILES} files of {_FILE_SIZE} bytes, {by}", tree_up, "s", at_most=3),
        Figure.of(f"download of {_FILES} files of {_FILE_SIZE} bytes, {by}", tree_down, "s"),
        Figure.of(f"GuestPath.stat, {by}", stat, "ms"),
        Figure.of(f"GuestPath.write_text of 5 bytes, {by}", write, "ms"),
    ]


def _make_tree(tree: Path) -> None:
    for number in range(_FILES):
        directory = tree / f"directory {number % 10}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file {number}").write_bytes(os.urandom(_FILE_SIZE))


async def _seconds(operation: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await operation()
    return time.perf_counter() - start
