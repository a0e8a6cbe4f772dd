"""Sandboxes that go on from a template, with real machines: who they are, what they share, and what they don't."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from tests._leaks import nothing_left, wait_until
from trio_sandbox import Host, HostConfig, Sandbox, SandboxConfig, UnknownTemplateError, open_host
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._templates import TemplateStore
from trio_sandbox.qemu import Vm

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

#: What must differ between any two machines, a line each.
IDENTITY = """
import os, random, secrets, socket, ssl, tempfile, uuid
print(os.urandom(16).hex())
print(random.random())
print(uuid.uuid4())
print(uuid.uuid1())
print(uuid.getnode())
print(secrets.token_hex())
print(ssl.RAND_bytes(16).hex())
print(tempfile.mktemp())
print(socket.gethostname())
print(open("/etc/machine-id").read().strip())
print(open("/proc/sys/kernel/random/boot_id").read().strip())
"""
#: Everything of that has been used when the state is saved.
_WARMUP = """
import os, random, socket, ssl, tempfile, threading, time, uuid
random.random(), uuid.uuid1(), uuid.uuid4(), uuid.getnode(), ssl.RAND_bytes(1), os.urandom(1), tempfile.mktemp()
open("/home/user/shared", "w").write("from the template")
begun, state, ticks = time.monotonic(), list(range(1000)), []

def tick():
    while True:
        ticks.append((time.time(), socket.gethostname()))
        time.sleep(0.02)

threading.Thread(target=tick, daemon=True).start()
"""
#: Nobody runs before he can know who and when he is, be it in the middle of a loop.
_TICKS = """
name = socket.gethostname()
while ticks[-1][1] != name: time.sleep(0.01)
first = [name for _, name in ticks].index(name)
print({other for _, other in ticks[:first]}, {other for _, other in ticks[first:]} == {name}, ticks[first][0])
"""


class Store:
    """The store, and a configuration that nobody else uses."""

    def __init__(self) -> None:
        self.cache = default_cache_directory()
        self.store = TemplateStore(self.cache, budget_mib=10**6)
        self.warmup = f"{_WARMUP}\ntoken = {secrets.token_hex(8)!r}"
        self.config = SandboxConfig(memory_mib=192, warmup=self.warmup)

    def made(self) -> list[str]:
        """Give the keys of its templates."""
        return [template.key for template in self.store.list() if template.warmup == self.warmup]


@pytest.fixture
def own() -> Generator[Store]:
    store = Store()
    yield store
    for key in store.made():
        store.store.remove(key)


async def check_clock(sandbox: Sandbox) -> None:
    """The guest's clock is the host's, as exactly as the two were compared: how exactly depends on the load."""

    async def error() -> float:
        await wait_until(lambda: sandbox.statistics().clock_error is not None)
        known = sandbox.statistics().clock_error
        assert known is not None
        return known + 0.05  # it goes wrong by some milliseconds in a minute

    known = await error()
    before = time.time()
    now = await sandbox.run("import time; print(time.time())")
    after = time.time()
    known = max(known, await error())
    assert before - known < float(now.stdout) < after + known


async def test_machines_go_on_from_a_template_and_do_not_boot(own: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Where no template can be made all else works, and takes a boot each time: nobody would notice but here."""
    async with open_host() as host:
        for _ in range(2):
            async with host.open_sandbox(config=own.config) as sandbox:
                machine = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
                assert isinstance(machine, Vm)
                assert machine.config.memory_file is not None
                (key,) = own.made()
                assert machine.config.memory_file.parent.name == key
                mapped = [line.split() for line in Path(f"/proc/{machine.pid}/maps").read_text().splitlines()]
                ram = {permissions for _, permissions, *_, name in mapped if name.endswith(f"{key}/memory")}
                assert ram == {"rw-p"}, "copies of its own"
                # QEMU says nothing: no warning, and that nothing is deprecated.
                assert machine.qemu_output() == ""
    assert caplog.text == ""


async def test_eight_clones(own: Store) -> None:
    """The first makes the template."""
    identities: list[list[str]] = []

    async def use(sandbox: Sandbox, number: int, opening: float) -> None:
        ticks = await sandbox.run(_TICKS)
        in_template, goes_on, first = ticks.stdout.rsplit(maxsplit=2)
        assert (in_template, goes_on) == ("{'sandbox'}", "True")
        assert opening - 0.5 < float(first)
        clock = await sandbox.run("print(time.monotonic() - begun)")
        assert 0 < float(clock.stdout) < 60, "the monotonic clock goes on where it was"
        shown = await sandbox.run(IDENTITY)
        assert (shown.stderr, shown.exit_code) == ("", 0)
        identities.append(shown.stdout.split())
        await check_clock(sandbox)
        # A host name is of use where it can be resolved.
        assert (await sandbox.run("print(socket.gethostbyname(socket.gethostname()))")).stdout == "127.0.0.1\n"
        # What the warm-up left is there, and what one writes, to its memory or its disk, no other sees.
        mine = f"written by {number}"
        written = await sandbox.run(
            f"assert state == list(range(1000)) and open('/home/user/shared').read() == 'from the template'\n"
            f"state[:] = [{mine!r}] * 100_000; print(open('/home/user/shared', 'w').write({mine!r}))"
        )
        assert (written.stdout, written.stderr) == (f"{len(mine)}\n", "")
        everybody_wrote[number].set()
        for event in everybody_wrote:
            await event.wait()
        read = await sandbox.run("print(state[0], set(state) == {state[0]}, open('/home/user/shared').read())")
        assert read.stdout == f"{mine} True {mine}\n"

    async def open_and_use(number: int) -> None:
        opening = time.time()
        async with host.open_sandbox(config=own.config) as sandbox:
            await use(sandbox, number, opening)

    everybody_wrote = [trio.Event() for _ in range(8)]
    with nothing_left():
        async with open_host() as host:
            await host.prepare()
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(open_and_use, number)
            # And once more, from another host: the template is what it was.
            everybody_wrote[:] = [trio.Event()]
            await open_and_use(0)
    assert len(identities) == 9
    for values in zip(*identities, strict=True):
        assert len(set(values)) == 9, values
    assert len(own.made()) == 1


async def test_a_template_whose_state_is_damaged_inside(own: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Its sizes and times are right: only QEMU can notice. The user gets a machine, which has been warmed up."""
    async with open_host() as host:
        async with host.open_sandbox(config=own.config) as sandbox:
            assert (await sandbox.run("print(len(state))")).stdout == "1000\n"
            # The machines that run are not disturbed by what happens to their template.
            (key,) = own.made()
            template = own.store.find(key)
            assert template is not None
            status = template.devices.stat()
            state = template.devices.read_bytes()
            template.devices.write_bytes(state[: len(state) // 2] + bytes(len(state) - len(state) // 2))
            os.utime(template.devices, ns=(status.st_atime_ns, status.st_mtime_ns))
            with nothing_left():
                async with host.open_sandbox(config=own.config) as other:
                    assert (await other.run("print(len(state), token)")).stdout.startswith("1000 ")
            assert "could not start from it" in caplog.text
            assert own.made() == []
            assert (await sandbox.run("print(len(state))")).stdout == "1000\n"


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """The user's cache at another place, where it can't be written to; the user's own is empty then."""
    (cache := tmp_path / "cache").mkdir()
    subprocess.run(["mount", "--bind", default_cache_directory(), cache], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        yield cache
    finally:
        subprocess.run(["umount", cache], check=True)


async def used_memory(host: Host, config: SandboxConfig) -> Path:
    """Use a sandbox; return the file of the RAM that it went on from."""
    async with host.open_sandbox(config=config) as sandbox:
        assert (await sandbox.run("print(len(state))")).stdout == "1000\n"
        machine = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
        assert isinstance(machine, Vm)
        assert machine.config.memory_file is not None
        return machine.config.memory_file


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount something read-only")
async def test_a_cache_that_is_read_only(
    own: Store, read_only: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its images are used, and its templates, and what is made goes to the user's own cache."""
    async with open_host(HostConfig(cache_dir=read_only)) as host:
        for _ in range(2):
            assert (await used_memory(host, own.config)).is_relative_to(tmp_path / "own")
    assert own.made() == []
    async with open_host(HostConfig(cache_dir=own.cache)) as host:
        await used_memory(host, own.config)
    shutil.rmtree(tmp_path / "own")
    async with open_host(HostConfig(cache_dir=read_only)) as host:
        assert (await used_memory(host, own.config)).is_relative_to(read_only)
    assert caplog.text == ""


async def test_without_templates(own: Store) -> None:
    async with (
        open_host(HostConfig(templates=False)) as host,
        host.open_sandbox(config=SandboxConfig(memory_mib=192, warmup=own.warmup)) as sandbox,
    ):
        assert (await sandbox.run("print(len(state))")).stdout == "1000\n"
        assert (await sandbox.run("import socket; print(socket.gethostname())")).stdout.startswith("sandbox-")
    assert own.made() == []


_BUILDER = """
import sys, trio
from trio_sandbox import Host, HostConfig, SandboxConfig, open_host

async def main():
    config = HostConfig(progress=lambda step: print(step.message, flush=True))
    async with open_host(config) as host, host.open_sandbox(config=SandboxConfig(memory_mib=192, warmup=sys.argv[1])):
        pass

trio.run(main)
"""


async def test_kill_9_while_a_template_is_made(own: Store) -> None:
    templates = default_cache_directory() / "templates"
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", _BUILDER, own.warmup], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    async with process.stdout:
        try:
            said = b""
            while b"booting a VM" not in said:
                piece = await process.stdout.receive_some()
                assert piece, said
                said += bytes(piece)
            await wait_until(lambda: _open_in(process.pid, templates) != [])
            staging = _open_in(process.pid, templates)[0]  # it is locked until it is made
            await wait_until(lambda: _users(staging / "memory") != [])
        finally:
            process.kill()
            with trio.move_on_after(10, shield=True):
                await process.wait()
    await wait_until(lambda: _users(staging / "memory") == [])
    assert own.made() == []
    own.store.prune()
    assert not staging.exists()
    with pytest.raises(UnknownTemplateError):
        own.store.remove(staging.name.removeprefix(".staging-").partition("-")[0])


def _open_in(pid: int, templates: Path) -> list[Path]:
    """Templates in the making that a process has a file of open: other tests make some, too."""
    found: list[Path] = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            path = descriptor.readlink()
        except OSError:
            continue  # it was closed
        found += [parent for parent in (path, *path.parents) if parent.match(f"{templates}/.staging-*")]
    return found


def _users(path: Path) -> list[int]:
    """Who has *path* mapped."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path) in (process / "maps").read_text():
                found.append(int(process.name))
        except OSError:
            pass  # it has ended
    return found
