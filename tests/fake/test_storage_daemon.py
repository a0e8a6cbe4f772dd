"""`QemuStorageDaemon` with a program that misbehaves in ways which the real one hardly ever does."""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trio_sandbox import QemuStorageDaemonError, Timeouts
from trio_sandbox.qemu import QemuStorageDaemon, open_storage_daemon

from .._leaks import nothing_left


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, 2**20, *[0] * 7)
    path.write_bytes(head.ljust(512, b"\0"))
    return path


@asynccontextmanager
async def fake_daemon(mode: str, tmp_path: Path, timeouts: Timeouts | None = None) -> AsyncGenerator[QemuStorageDaemon]:
    program = tmp_path / "program"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).with_name("_storage_daemon.py")} "$@"\n'
    )
    program.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        async with open_storage_daemon(
            directory=directory, program=str(program), environment={"FAKE": mode}, timeouts=timeouts
        ) as daemon:
            with nothing_left(tmp_path):
                yield daemon


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies while the job runs", "exited with status 1; it said: out of imaginary memory"),
        ("is killed while the job runs", "was ended by SIGKILL"),
        ("talks nonsense", "a line that is not JSON: .*nonsense"),
        ("hangs up, but lives on", "the storage daemon is gone: it was ended by SIGTERM"),
    ],
)
async def test_end_in_the_middle_of_a_creation(mode: str, message: str, base: Path, tmp_path: Path) -> None:
    async with fake_daemon(mode, tmp_path) as daemon:
        with pytest.raises(QemuStorageDaemonError, match=message) as caught:
            await daemon.create_overlay(base, tmp_path / "overlay")
        assert caught.value.__cause__ is not None
        assert not daemon.started
        assert daemon.pid is None
        with pytest.raises(
            QemuStorageDaemonError, match=f"not started: .*{message.removeprefix('the storage daemon is gone: ')}"
        ):
            await daemon.create_overlay(base, tmp_path / "overlay")


async def test_job_that_never_concludes_costs_the_daemon_its_life(base: Path, tmp_path: Path) -> None:
    async with fake_daemon("never concludes", tmp_path, Timeouts(overlay=0.1, process_exit=0.1)) as daemon:
        with pytest.raises(QemuStorageDaemonError, match=r"took more than 0\.1 s") as caught:
            await daemon.create_overlay(base, tmp_path / "overlay")
        assert isinstance(caught.value.__cause__, trio.TooSlowError)
        await daemon._ended.wait()
        assert daemon.pid is None
