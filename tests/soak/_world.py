"""What a part has for itself: a cache, a place for runtime directories, and a mark on its processes; and what is left in them."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from tests._leaks import child_pids, open_fds
from tests._processes import owned
from trio_sandbox import HostConfig, Timeouts, open_host
from trio_sandbox.image import default_cache_directory, try_lock

#: The variable by which a host's processes are known, those of a host within another's process by both tokens.
_OWNER = "TRIO_SANDBOX_OWNER"
#: What of the cache is the user's own: the images. All else is a world's.
_SHARED = ("store", "accelerator.json")


@attrs.define
class World:
    """Where the hosts of a part live."""

    cache: Path
    runtime: Path
    token: str
    _fds: dict[int, str] = attrs.field(factory=open_fds)
    _children: list[int] = attrs.field(factory=child_pids)

    def config(self, *, timeouts: Timeouts | None = None) -> HostConfig:
        """Return the configuration of a host of this world."""
        return HostConfig(cache_dir=self.cache, runtime_dir=self.runtime, timeouts=timeouts or Timeouts())

    def left_by_dead(self) -> list[str]:
        """Tell what is there that not even a process that was killed may leave."""
        found = [f"process {pid}: {command}" for pid, command in owned(self.token).items()]
        found += [f"file {name}" for name in sorted(os.listdir(self.runtime))]
        for directory in (self.cache / "locks", self.cache / "templates/locks"):
            for path in sorted(directory.iterdir()) if directory.is_dir() else ():
                with try_lock(path) as free:
                    if not free:
                        found.append(f"lock {path.name}")
        return found

    def left(self) -> list[str]:
        """Tell what is there that no host needs which was closed, in this process as well."""
        found = [f"in the cache: {path.relative_to(self.cache)}" for path in self._litter()]
        found += [f"descriptor {fd}: {what}" for fd, what in open_fds().items() if fd not in self._fds]
        found += [f"child {pid}" for pid in child_pids() if pid not in self._children]
        return [*self.left_by_dead(), *found]

    def _litter(self) -> list[Path]:
        found = [*(self.cache / "staging").glob("*"), *(self.cache / "templates").glob(".*")]
        named = {json.loads(path.read_text())["directory"] for path in (self.cache / "saved").glob("*.json")}
        return [*found, *(path for path in (self.cache / "saved").glob("*~*") if path.name not in named)]


async def wait_for_none(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Wait until *look* finds nothing, for so many seconds at most; return what it finds."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        await trio.sleep(0.05)
    return found


@contextmanager
def _marked(token: str) -> Generator[None]:
    before = os.environ.get(_OWNER)
    os.environ[_OWNER] = token if before is None else f"{before}:{token}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_OWNER]
        else:
            os.environ[_OWNER] = before


@asynccontextmanager
async def open_world() -> AsyncGenerator[World]:
    """Make a world for the block, whose cache has the image and a template of the default configuration."""
    async with open_host() as host:
        await host.prepare()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/var/tmp") as directory, _marked(token):
        cache, runtime = Path(directory, "c"), Path(directory, "r")
        cache.mkdir()
        runtime.mkdir()
        for name in _SHARED:
            (cache / name).symlink_to(default_cache_directory() / name)
        async with open_host(HostConfig(cache_dir=cache, runtime_dir=runtime)) as host:
            await host.run("1")
        yield World(cache, runtime, token)
