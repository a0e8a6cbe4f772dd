"""The part `crash`: whatever dies or stands still, in the middle of a mixed load; and the program itself.

Each operation is one crash. It has a host of its own, with one sandbox that is hit and one that is not. Errors must be those that are
documented, come within a bound and tell truly whether a retry is safe; the other sandbox is unharmed, the host opens new ones, and
when it is closed nothing is left of it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from subprocess import PIPE

import attrs
import trio

from trio_sandbox import Host, Sandbox, SandboxClosedError, open_host
from trio_sandbox.qemu import make_marked

from ._crashes import BOUND, CANCEL_BOUND, CRASHES, TIMEOUTS, Crash, Scene, judge
from ._load import Load
from ._report import Budget, Report
from ._world import World, open_world, wait_for_none

#: Seconds after which nothing may be left of a host that was closed, or whose process is dead.
CLEAN_BOUND = 10.0
#: Seconds that a host may take to close, whatever of it stands still.
CLOSE_BOUND = 30.0
#: What is done to the program itself.
_KILLED, _KILLED_EARLY = "the program is killed", "the program is killed while it starts"
_STOPPED = "the program is stopped and goes on, and is killed then"
_BUSY = ("run", "shell", "stream", "process", "file", "tunnel", "fork", "checkpoint")
#: How many of the sandboxes that are hit are the ones that are saved and put to sleep.
_ASLEEP_SHARE = 0.3
#: How old what a dead owner left must be for others to remove it.
_OLD = 3600


async def soak(budget: Budget, report: Report) -> None:
    """Soak crashes."""
    rng = random.Random(budget.seed)
    seen = _Seen()
    async with open_world() as world:
        for crash in _plan(rng):
            if not budget.is_left(report.operations.total()) or report.is_hopeless:
                break
            name = crash if isinstance(crash, str) else crash.name
            report.operations[name] += 1
            try:
                if isinstance(crash, str):
                    wrong = await _crash_program(crash, world, rng, seen)
                else:
                    wrong = await _Round(crash, world, rng, report, seen).run()
            except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
                wrong = [f"{type(exc).__name__}: {exc}"]
            wrong += [f"left: {what}" for what in await wait_for_none(world.left, CLEAN_BOUND)]
            for complaint in wrong:
                report.fail(f"#{report.operations.total()}, {name}: {complaint}")
    report.notes += seen.notes()


@attrs.define
class _Seen:
    """What came of crashes, for people."""

    errors: dict[str, dict[str, set[str]]] = attrs.field(factory=dict[str, dict[str, set[str]]])
    """By crash and error: what raised it."""
    gone_after: list[float] = attrs.field(factory=list[float])

    def notes(self) -> Iterator[str]:
        """Yield a line for each."""
        for crash, errors in sorted(self.errors.items()):
            told = (f"{error} of {', '.join(sorted(kinds))}" for error, kinds in sorted(errors.items()))
            yield f"{crash}: {'; '.join(told)}"
        if self.gone_after:
            yield f"what killed programs leave was gone after {max(self.gone_after):.1f} s at most"


def _plan(rng: random.Random) -> Iterator[Crash | str]:
    """Yield every crash once, in any order, and again."""
    while True:
        crashes: list[Crash | str] = [*CRASHES, _KILLED, _KILLED_EARLY, _STOPPED]
        rng.shuffle(crashes)
        yield from crashes


@attrs.define
class _Round:
    """One crash of a part of a host."""

    crash: Crash
    world: World
    rng: random.Random
    report: Report
    seen: _Seen
    wrong: list[str] = attrs.field(factory=list[str])

    async def run(self) -> list[str]:
        """Do it, and return what is wrong."""
        async with open_host(self.world.config(timeouts=TIMEOUTS)) as host, host.open_sandbox() as other:
            await other.run("x = 7")
            async with host.open_sandbox() as sandbox:
                await self._hit(Scene(host, sandbox, self.rng))
                started = time.monotonic()
            self._bound("the block took {} to be left", time.monotonic() - started, CLOSE_BOUND)
            with trio.fail_after(BOUND):
                if (await other.run("print(x)")).stdout != "7\n":
                    self.wrong.append("the other sandbox has lost its variables")
                await self._open_another(host)
            started = time.monotonic()
        self._bound("the host took {} to close", time.monotonic() - started, CLOSE_BOUND)
        return self.wrong

    def _bound(self, what: str, seconds: float, bound: float) -> None:
        self.report.slowest = max(self.report.slowest, round(seconds, 1))
        if seconds > bound:
            self.wrong.append(what.format(f"{seconds:.1f} s"))

    async def _open_another(self, host: Host) -> None:
        if (await host.run("print(6 * 7)")).stdout != "42\n":
            self.wrong.append("another sandbox does not compute")

    async def _hit(self, scene: Scene) -> None:
        crash, sandbox = self.crash, scene.sandbox
        sleeps = not crash.in_guest and self.rng.random() < _ASLEEP_SHARE
        if sleeps:
            await sandbox.run("v = 7")
        load = Load(sandbox, "soaked", may_lose_state=crash.loses_state)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.serve, *(("life",) if sleeps else _BUSY))
            with trio.fail_after(BOUND):
                while not load.done and not load.failures:
                    await trio.sleep(0.01)
            await trio.sleep(self.rng.uniform(0, 1.5))
            hit_at = time.monotonic()
            await crash.hit(scene)
            await trio.sleep(self.rng.uniform(0.5, 2))
            if crash.stands_still and (crash.then != "ends" or self.rng.random() < 0.5):
                await self._cancel_some(sandbox)
            if crash.then == "ends" and not sleeps:
                await self._wait_told(load)
            load.stop()
            stopped_at = time.monotonic()
            if crash.stands_still and crash.then != "ends":
                nursery.cancel_scope.cancel(reason="it would wait for ever")
            else:
                nursery.cancel_scope.deadline = trio.current_time() + BOUND
        self._bound("the load took {} to end", time.monotonic() - stopped_at, BOUND)
        self.wrong += judge(crash, load.failures, hit_at)
        for failure in load.failures:
            self.seen.errors.setdefault(crash.name, {}).setdefault(type(failure.error).__name__, set()).add(
                failure.kind
            )
        await self._look(sandbox, load, sleeps=sleeps)

    async def _wait_told(self, load: Load) -> None:
        """Wait until everybody was told that the sandbox is closed."""
        silent = set(_BUSY)
        with trio.move_on_after(BOUND):
            while silent:
                await trio.sleep(0.02)
                silent -= {failure.kind for failure in load.failures if isinstance(failure.error, SandboxClosedError)}
        if silent:
            self.wrong.append(f"after {BOUND:g} s nobody has told {', '.join(sorted(silent))}")

    async def _cancel_some(self, sandbox: Sandbox) -> None:
        """Check that whatever stands still, a cancelled caller is soon back."""
        path = sandbox.path("/home/user/cancelled")
        for what, operation in (
            ("a run", lambda: sandbox.run("print(1)")),
            ("a process", lambda: sandbox.run_process(["true"])),
            ("a file", lambda: path.write_bytes(b"x")),
        ):
            started = time.monotonic()
            with trio.move_on_after(1):
                try:
                    await operation()
                except self.crash.errors:
                    pass  # its machine was ended, as the one before was not acknowledged
            self._bound(f"{what} that was cancelled after 1 s took {{}}", time.monotonic() - started, CANCEL_BOUND)

    async def _look(self, sandbox: Sandbox, load: Load, *, sleeps: bool) -> None:
        """Check what the sandbox is afterwards."""
        then = "either" if sleeps and self.crash.then == "ends" else self.crash.then
        try:
            with trio.fail_after(BOUND):
                if sleeps:
                    with suppress(*self.crash.errors):  # what is sent before its end is known
                        await load.resume()
                        await load.do_life()
                    await load.resume()
                    await load.do_life()
                else:
                    await load.do_run()
                    if self.crash.then == "lives":
                        for operation in (load.do_shell, load.do_process, load.do_file, load.do_fork):
                            await operation()
        except SandboxClosedError as exc:
            if then == "lives":
                self.wrong.append(f"it did not survive: {exc}, because of {exc.__cause__}")
            elif not exc.retry_safe:
                self.wrong.append(f"it is closed, and a retry is not safe: {exc}")
        else:
            if then == "ends":
                self.wrong.append("it lives on")


async def _crash_program(how: str, world: World, rng: random.Random, seen: _Seen) -> list[str]:
    """Kill a program that has sandboxes; return what is wrong."""
    wrong: list[str] = []
    command = [sys.executable, "-m", "tests.soak._victim", str(world.cache), str(world.runtime)]
    program = await trio.lowlevel.open_process(command, stdout=PIPE, stderr=PIPE)
    assert program.stdout is not None
    assert program.stderr is not None
    async with program.stdout, program.stderr:
        try:
            if how == _KILLED_EARLY:
                await trio.sleep(rng.uniform(0.05, 1.5))
            else:
                await _receive(program.stdout, b"ready")
                await trio.sleep(rng.uniform(0, 8))
            if how == _STOPPED:
                program.send_signal(signal.SIGSTOP)
                await trio.sleep(rng.uniform(1, 6))
                program.send_signal(signal.SIGCONT)
                for _ in range(3):  # what was done before may be in the pipe
                    await _receive(program.stdout, b"done")
            if program.poll() is not None:
                said = bytes(await program.stderr.receive_some(10_000)).decode(errors="replace")
                wrong.append(f"it ended with {program.returncode} by itself: {said[-500:]}")
        finally:
            program.kill()
            with trio.CancelScope(shield=True):
                await program.wait()
    started = time.monotonic()
    wrong += [f"left by the dead: {what}" for what in await wait_for_none(world.left_by_dead, CLEAN_BOUND)]
    seen.gone_after.append(time.monotonic() - started)
    return [*wrong, *await _open_next(world)]


async def _receive(stream: trio.abc.ReceiveStream, word: bytes) -> None:
    with trio.fail_after(BOUND):
        while word not in (data := await stream.receive_some()):
            if not data:
                raise EOFError(f"the program ended before it said {word!r}")


async def _open_next(world: World) -> list[str]:
    """Open a host where there is something of a dead one, and something that only looks so; return what is wrong."""
    ours, foreign = world.runtime / "trio-sandbox-0123456789ab", world.runtime / "trio-sandbox-ba9876543210"
    make_marked(ours)
    foreign.mkdir()
    for directory in (ours, foreign):
        (directory / "file").write_text("something")
        os.utime(directory, (time.time() - _OLD, time.time() - _OLD))
    wrong: list[str] = []
    async with open_host(world.config()) as host:
        if ours.exists():
            wrong.append("the next host leaves what a dead one left")
        if not (foreign / "file").exists():
            wrong.append("the next host removes what is not ours")
        if (await host.run("print(6 * 7)")).stdout != "42\n":
            wrong.append("the next host's sandbox does not compute")
    (foreign / "file").unlink()
    foreign.rmdir()
    return wrong
