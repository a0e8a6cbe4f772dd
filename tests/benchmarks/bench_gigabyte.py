"""A file of 1 GiB to a guest and back: that it is the same, how fast that is, and that memory stays flat."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from pathlib import Path

import trio

from trio_sandbox import open_sandbox
from trio_sandbox.bench import Figure

_SIZE = 2**30
_PIECE = 2**20


async def measure() -> list[Figure]:
    """Measure once: it takes a minute or more."""
    with tempfile.TemporaryDirectory(prefix="bench-gigabyte-") as name:
        sent, back = Path(name) / "sent", Path(name) / "back"
        digest = await trio.to_thread.run_sync(_make, sent)
        async with open_sandbox() as sandbox:
            before = _peak_memory()
            start = time.perf_counter()
            await sandbox.upload(sent, "large")
            uploaded = time.perf_counter()
            await sandbox.download("large", back)
            downloaded = time.perf_counter()
            grown = _peak_memory() - before
            if await trio.to_thread.run_sync(_digest, back) != digest:
                raise AssertionError("what came back is not what was sent")
            by = f"under {sandbox.accelerator}"
        return [
            Figure.of(f"upload of 1 GiB, {by}", [_SIZE / 1e6 / (uploaded - start)], "MB/s", at_least=40),
            Figure.of(f"download of 1 GiB, {by}", [_SIZE / 1e6 / (downloaded - uploaded)], "MB/s", at_least=40),
            Figure.of("growth of our process's memory meanwhile", [grown], "MiB", at_most=32),
        ]


def _make(path: Path) -> str:
    with path.open("wb") as file:
        for _ in range(_SIZE // _PIECE):
            file.write(os.urandom(_PIECE))
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
