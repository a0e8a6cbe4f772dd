"""A control group for an agent in this process."""

from __future__ import annotations

import os
import select
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def own_cgroup() -> Generator[str]:
    """Yield a control group of our own, in which nothing must be left."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    base = next((mount[1] for mount in mounts if mount[2] == "cgroup2"), None)
    if base is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    path = Path(base) / f"trio-sandbox-test-{os.getpid()}"
    path.mkdir()
    try:
        yield str(path)
        # The spawner has killed what was left; it need not have been there to see the end.
        with (path / "cgroup.events").open() as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while "populated 1" in os.pread(events.fileno(), 256, 0).decode():
                assert poll.poll(20_000), "something in the control group survived its spawner"
    finally:
        (path / "cgroup.kill").write_text("1")
        for child in path.iterdir():
            if child.is_dir():
                child.rmdir()
        path.rmdir()
