"""The part `faults`: hosts on which something is wrong. A full disk, limits, a cache that is gone, a clock that jumps, a loop that is blocked.

Each operation is one fault. Whatever it is, errors are those that are documented, what can go on goes on with the right values, and
nothing is left of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from tests._disks import filled, small_disk
from trio_sandbox import (
    CapacityError,
    ImageMissingError,
    Sandbox,
    SandboxConfig,
    SnapshotError,
    TemplateError,
    Timeouts,
    open_host,
)
from trio_sandbox.image import default_cache_directory

from ._report import Budget, Report
from ._world import World, open_world, wait_for_none

#: Seconds for a program, or an operation, on the slowest machine.
_PATIENCE = 300.0
#: Seconds after which nothing may be left.
_CLEAN_BOUND = 10.0
_MIB = 2**20
#: What fails for want of room.
_FULL = (SnapshotError, CapacityError, OSError)


async def soak(budget: Budget, report: Report) -> None:
    """Soak faults of the host."""
    rng = random.Random(budget.seed)
    async with open_world() as world:
        while True:
            faults = list(_FAULTS.items())
            rng.shuffle(faults)
            for name, fault in faults:
                if not budget.is_left(report.operations.total()) or report.is_hopeless:
                    return
                report.operations[name] += 1
                started = time.monotonic()
                try:
                    with trio.fail_after(_PATIENCE):
                        wrong = await fault(Case(world, rng))
                except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
                    wrong = [f"{type(exc).__name__}: {exc}"]
                wrong += [f"left: {what}" for what in await wait_for_none(world.left, _CLEAN_BOUND)]
                for complaint in wrong:
                    report.fail(f"#{report.operations.total()}, {name}: {complaint}")
                report.slowest = max(report.slowest, round(time.monotonic() - started, 1))


@attrs.define
class Case:
    """One fault."""

    world: World
    rng: random.Random

    async def program(
        self, what: str, argument: str, *, prefix: tuple[str, ...] = (), may_fail: bool = False
    ) -> list[str]:
        """Run one of `_program`; return what is wrong with what it says. *may_fail*: errors are right, if they are documented."""
        command = [*prefix, *self.command(what, argument)]
        completed = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        return judge(argument, completed.returncode, completed.stdout, completed.stderr, may_fail=may_fail)

    def command(self, what: str, argument: str) -> list[str]:
        """Return the command line of one of `_program`."""
        places = (str(self.world.cache), str(self.world.runtime))
        return [sys.executable, "-m", "tests.soak._program", what, *places, argument]


def judge(argument: str, status: int, stdout: bytes, stderr: bytes, *, may_fail: bool = False) -> list[str]:
    """Tell what is wrong with what a program of `_program` says of itself."""
    lines = stdout.splitlines()
    if status or not lines:
        return [f"{argument}: it ended with {status}: {stderr.decode(errors='replace')[-1000:]}"]
    entries: list[tuple[str, str, str]] = json.loads(lines[-1])
    expected = ("result", "error") if may_fail else ("result",)
    wrong = [f"{argument}: {what}: nobody expects {came_to}" for what, came_to, kind in entries if kind not in expected]
    for what, came_to, kind in entries:
        if kind == "result" and what.startswith("computes") and came_to != "42\n":
            wrong.append(f"{argument}: {what}: it is {came_to!r}")
    return wrong


async def _compute(sandbox: Sandbox, expected: str = "42", code: str = "print(6 * 7)") -> list[str]:
    result = await sandbox.run(code)
    return (
        [] if result.stdout == f"{expected}\n" else [f"{code}: {result!r} {result.stdout!r} {result.stderr[-200:]!r}"]
    )


# --- Disks ---


@contextmanager
def _disk(size: int) -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ts-") as directory, small_disk(Path(directory), size) as disk:
        yield disk


async def _full_runtime_directory(case: Case) -> list[str]:
    async def checkpoint(sandbox: Sandbox) -> None:
        (await sandbox.checkpoint()).discard()

    async def fork(sandbox: Sandbox) -> None:
        async with sandbox.fork(1) as (child,):
            await child.run("1")

    async def sleep(sandbox: Sandbox) -> None:
        await sandbox.hibernate()
        await sandbox.resume()

    async def save(sandbox: Sandbox) -> None:
        await sandbox.save("full", replace=True)

    wrong: list[str] = []
    with _disk(400 * _MIB) as disk:
        config = attrs.evolve(case.world.config(), runtime_dir=disk)
        async with open_host(config) as host, host.open_sandbox() as sandbox:
            await sandbox.run("x = 0")
            for count in range(1, 9):
                operation = case.rng.choice((checkpoint, fork, sleep, save))
                with filled(disk, leave=case.rng.choice((0, 4096, 2**20, 20 * _MIB, 60 * _MIB))):
                    try:
                        await operation(sandbox)
                    except _FULL as exc:
                        if not getattr(exc, "retry_safe", True):
                            wrong.append(f"{operation.__name__}: a retry is not safe after {exc!r}")
                    if sandbox.statistics().hibernated:
                        continue  # there is no room for waking it up
                    wrong += await _compute(sandbox, str(count), f"x = {count}; print(x)")
                if sandbox.statistics().hibernated:
                    await sandbox.resume()
            for operation in (checkpoint, fork, sleep, save):
                await operation(sandbox)
    return wrong


async def _full_cache(case: Case) -> list[str]:
    wrong: list[str] = []
    with _disk(360 * _MIB) as disk:
        for name in ("store", "accelerator.json"):
            (disk / name).symlink_to(default_cache_directory() / name)
        config = attrs.evolve(case.world.config(), cache_dir=disk)
        small = SandboxConfig(memory_mib=128)
        async with open_host(config) as host:
            with filled(disk, leave=case.rng.choice((0, 4096, 30 * _MIB, 100 * _MIB))):
                async with host.open_sandbox(config=small) as sandbox:  # it boots where it can have no template
                    wrong += await _compute(sandbox)
            wrong += [f"left in the cache: {path.name}" for path in (disk / "templates").glob(".*")]
        # Not of a template: a file system in memory takes room for the pages of a file that are only read, and this one is full.
        async with open_host(attrs.evolve(config, templates=False)) as host:
            async with host.open_sandbox(config=small) as sandbox:
                await sandbox.run("x = 5")
                with filled(disk, leave=case.rng.choice((0, 4096, 30 * _MIB))):
                    try:
                        await sandbox.save("full")
                        wrong.append("it was saved where there is no room")
                    except _FULL:
                        pass
                    wrong += await _compute(sandbox, "5", "print(x)")
                wrong += [f"left in the cache: {path.name}" for path in (disk / "saved").glob("*~*")]
                await sandbox.save("full")
            async with host.open_sandbox(template="full") as sandbox:
                wrong += await _compute(sandbox, "5", "print(x)")
    return wrong


# --- Limits ---


async def _descriptors(case: Case) -> list[str]:
    return await case.program(
        "limited", f"RLIMIT_NOFILE={case.rng.choice((24, 32, 48, 64, 96, 128, 256))}", may_fail=True
    )


async def _address_space(case: Case) -> list[str]:
    return await case.program("limited", f"RLIMIT_AS={case.rng.choice((250, 400, 700, 1000)) * _MIB}", may_fail=True)


async def _file_size(case: Case) -> list[str]:
    return await case.program("limited", f"RLIMIT_FSIZE={case.rng.choice((1, 50, 130)) * _MIB}", may_fail=True)


# --- The cache ---


async def _read_only_cache(case: Case) -> list[str]:
    cache = str(case.world.cache)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")))
    return await case.program("once", f"q = {case.rng.random()}", prefix=(*prefix, "sh", "-c", mount, cache))


async def _deleted_cache(case: Case) -> list[str]:
    async with open_host(case.world.config()) as host:
        image, system = await host._images.ensure("python")  # pyright: ignore[reportPrivateUsage]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/var/tmp") as directory:
        cache = Path(directory, "c")

        def fill() -> None:
            (cache / "store").mkdir(parents=True)
            for entry in (image.path.parent, system.disk.parent):
                command = ["cp", "-a", "--sparse=always", "--reflink=auto", str(entry), str(cache / "store")]
                subprocess.run(command, check=True)
            (cache / "accelerator.json").symlink_to(default_cache_directory() / "accelerator.json")

        await trio.to_thread.run_sync(fill)
        config = attrs.evolve(case.world.config(), cache_dir=cache, build_images=False)
        async with open_host(config) as host, host.open_sandbox() as sandbox:
            await sandbox.run("x = 6")
            await trio.to_thread.run_sync(shutil.rmtree, cache)
            wrong += await _compute(sandbox, "6", "print(x)")
            await sandbox.run_process(["/bin/ls"])
            for what, operation, expected in (
                ("checkpoint", sandbox.checkpoint, SnapshotError),
                ("save", partial(sandbox.save, "deleted"), (SnapshotError, TemplateError, OSError)),
                ("another", partial(host.run, "1"), ImageMissingError),
            ):
                try:
                    await operation()
                except expected:
                    continue
                except Exception as exc:  # noqa: BLE001  whatever it is, it is told
                    wrong.append(f"{what}: nobody expects {exc!r}")
                else:
                    wrong.append(f"{what}: it was done, without an image")
            wrong += await _compute(sandbox, "6", "print(x)")
            shutil.rmtree(cache, ignore_errors=True)
            await trio.to_thread.run_sync(fill)
            if (await host.run("print(1)")).stdout != "1\n":
                wrong.append("what is opened when the cache is there again does not compute")
    return wrong


async def _two_hosts_one_cache(case: Case) -> list[str]:
    """Two programs make one template at the same time; in half of the cases one of them is killed."""
    warmup, victim = f"q = {case.rng.random()}", case.rng.random() < 0.5
    before = set(os.listdir(case.world.cache / "templates"))
    wrong: list[str] = []
    async with trio.open_nursery() as nursery:

        async def use() -> None:
            wrong.extend(await case.program("once", warmup))

        nursery.start_soon(use)
        if victim:
            command = case.command("once", warmup)
            other = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                await trio.sleep(case.rng.uniform(0.5, 8))
            finally:
                other.kill()
                with trio.CancelScope(shield=True):
                    await other.wait()
        else:
            nursery.start_soon(use)
    made = set(os.listdir(case.world.cache / "templates")) - before - {"locks"}
    if len([name for name in made if not name.startswith(".")]) != 1:
        wrong.append(f"there is not one template more, but these: {sorted(made)}")
    return wrong


# --- Time ---


async def _clock_jumps(case: Case) -> list[str]:
    """Somebody sets our clock, and sets it again. A guest's follows, and what is measured with another clock is as it was."""
    wrong: list[str] = []
    offset = 0.0
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + offset
    time.time_ns = lambda: real_ns() + int(offset * 10**9)
    try:
        async with open_host(case.world.config()) as host, host.open_sandbox() as sandbox:
            await sandbox.run("import time")
            for jump in case.rng.sample((3600.0, -86400.0, 10.0, -10.0), 2):
                offset += jump
                result = await sandbox.run("a = time.monotonic(); time.sleep(1); print(time.monotonic() - a)")
                if not 0.9 < float(result.stdout) < 30 or not 0.9 < result.duration < 30:
                    wrong.append(f"{jump:+g} s: a second took {result.stdout.strip()} s, or {result.duration} s")
                await trio.sleep(8)  # our clock is looked at each five seconds
                wrong += await _clock_is_right(sandbox, f"{jump:+g} s")
                async with host.open_sandbox() as other:
                    await trio.sleep(2)
                    wrong += await _clock_is_right(other, f"a new sandbox after {jump:+g} s")
    finally:
        time.time, time.time_ns = real, real_ns
    return wrong


async def _clock_is_right(sandbox: Sandbox, when: str) -> list[str]:
    before = time.time()
    told = float((await sandbox.run("import time; print(time.time())")).stdout)
    return (
        [] if before - 1 < told < time.time() + 1 else [f"{when}: the guest's clock is off by {told - before:+.2f} s"]
    )


async def _suspended(case: Case) -> list[str]:
    """The program is stopped for longer than a guest may be silent."""
    program = await trio.lowlevel.open_process(
        case.command("suspended", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stderr is not None
    said, errors = bytearray(), bytearray()

    async def read(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
        async for data in stream:
            into += data

    async with program.stdout, program.stderr:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, program.stderr, errors)
                nursery.start_soon(read, program.stdout, said)
                while b"ready" not in said and program.poll() is None:
                    await trio.sleep(0.02)
                await trio.sleep(case.rng.uniform(0, 2))
                program.send_signal(signal.SIGSTOP)
                await trio.sleep(case.rng.choice((1, 8, 12)))
                program.send_signal(signal.SIGCONT)
                status = await program.wait()
        finally:
            program.kill()
            with trio.CancelScope(shield=True):
                await program.wait()
    if status:
        return judge("", status, bytes(said), bytes(errors))
    entries = {what: came_to for what, came_to, _ in json.loads(said.splitlines()[-1])}
    wrong = (
        [] if (entries["counted"], entries["computes"], entries["opened"]) == ("99", "3", "42\n") else [f"{entries}"]
    )
    if abs(float(entries["clock"]) - float(entries["own clock"])) > 1:
        wrong.append(f"a guest's clock is off: {entries}")
    return wrong


async def _blocked_loop(case: Case) -> list[str]:
    """Nothing of ours has a turn for two seconds, again and again, while runs go on."""
    wrong: list[str] = []
    async with (
        open_host(case.world.config(timeouts=Timeouts(agent_silence=1.5))) as host,
        host.open_sandbox() as sandbox,
    ):
        await sandbox.run("x = 1; import time")

        async def count() -> None:
            for number in range(20):
                wrong.extend(await _compute(sandbox, str(number), f"time.sleep(0.1); print({number})"))

        async def print_much() -> None:
            code = "for _ in range(50): print('x' * 10_000); time.sleep(0.02)"
            async with host.open_sandbox() as other:
                printed = (await other.run(f"import time\n{code}")).stdout
            if printed != ("x" * 10_000 + "\n") * 50:
                wrong.append(f"{len(printed)} bytes came of 500050")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            nursery.start_soon(print_much)
            for _ in range(3):
                await trio.sleep(case.rng.uniform(0.2, 1))
                time.sleep(2)  # noqa: ASYNC251  that is the fault
        with trio.move_on_after(0.5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sandbox.run, "for i in range(100): x = i; time.sleep(0.05)")
                await trio.sleep(0.2)
                time.sleep(4)  # noqa: ASYNC251  the deadline passes meanwhile, and the guest keeps it by itself
        reached = int((await sandbox.run("print(x)")).stdout)
        if not scope.cancelled_caught or reached > 50:
            wrong.append(f"a deadline of 0.5 s passed in a blocked loop, and the code got to {reached} of 100")
    return wrong


async def _forked(case: Case) -> list[str]:
    return await case.program("forked", case.rng.choice(("ends", "exits", "raises", "goes on", "outlives")))


_FAULTS: dict[str, Callable[[Case], Awaitable[list[str]]]] = {
    "the disk of the runtime directory is full": _full_runtime_directory,
    "the disk of the cache is full": _full_cache,
    "few descriptors": _descriptors,
    "little address space": _address_space,
    "small files": _file_size,
    "the cache is read-only": _read_only_cache,
    "the cache is deleted": _deleted_cache,
    "two programs and one cache": _two_hosts_one_cache,
    "the clock jumps": _clock_jumps,
    "the program is suspended": _suspended,
    "the loop is blocked": _blocked_loop,
    "the program forks": _forked,
}
