"""Images and overlays for tests, made and looked at by qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trio_sandbox.qemu import QemuStorageDaemon


def make_base(path: Path, size: str = "64M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
    return path


def qemu_img_overlay(base: Path, path: Path) -> Path:
    """Make the overlay that ours are compared with."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(path)], check=True)
    return path


def info(path: Path) -> dict[str, Any]:
    result = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True)
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def assert_overlay(path: Path, base: Path, size: int = 64 * 2**20) -> None:
    """Assert that *path* is a sound overlay of *base*, by qemu-img's judgement."""
    facts = info(path)
    assert facts["format"] == "qcow2"
    assert facts["backing-filename"] == str(base)
    assert facts["backing-filename-format"] == "qcow2"
    assert facts["virtual-size"] == size
    check = subprocess.run(["qemu-img", "check", "--output=json", str(path)], check=True, capture_output=True)
    report = json.loads(check.stdout)
    assert report["check-errors"] == 0
    assert "corruptions" not in report
    assert "leaks" not in report


def overlays_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("overlay*"))


@contextmanager
def small_disk(path: Path, size: str) -> Generator[Path]:
    """Mount a file system at *path* that is soon full."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def send_signal(daemon: QemuStorageDaemon, number: int) -> None:
    assert daemon.pid is not None  # and not 0, which would be all of us
    os.kill(daemon.pid, number)
