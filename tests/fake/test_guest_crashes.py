"""What serves a sandbox in its guest is killed, or stands still, in the middle of all kinds of requests; with a real agent in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
import trio

from tests._leaks import wait_until
from tests._processes import birth, descendants
from trio_sandbox import OutcomeUnknownError, RunResult, Sandbox, SandboxClosedError, Timeouts

from ._guest import FakeMachine
from ._sandbox import open_local_sandbox

Servant = Literal["spawner", "interpreter", "porter", "file helper"]


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def find(servant: Servant) -> int:
    """Find one of the agent's in this process. A fork of the spawner that executes no program looks as it does."""
    (spawner,) = [process.pid for process in descendants(os.getpid()) if b"spawner.main" in command(process.pid)][:1]
    forks = [pid for pid in children(spawner) if command(pid) == command(spawner)]
    found = {
        "spawner": [spawner],
        "porter": [pid for pid in forks if children(pid)],
        "file helper": [pid for pid in forks if not children(pid)],
        "interpreter": [pid for pid in children(spawner) if b'"trio_sandbox_"' in command(pid)],
    }[servant]
    (pid,) = found
    return pid


def written_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[3])


class Box:
    """A sandbox with something in each place that can be lost."""

    def __init__(self, sandbox: Sandbox, machine: FakeMachine, directory: Path) -> None:
        self.sandbox, self.machine, self.directory = sandbox, machine, directory

    async def python(self) -> tuple[str, bool]:
        result = await self.sandbox.run("print(globals().get('x'))")
        return result.stdout.strip(), result.restarted

    async def shell(self) -> tuple[str, bool]:
        result = await self.sandbox.run("echo ${x:-None}", language="shell")
        return result.stdout.strip(), result.restarted

    async def read(self) -> bytes:
        return await self.sandbox.path(str(self.directory / "file")).read_bytes()

    async def check(self, *, lost: Literal["python", "shell", ""] = "") -> None:
        """Assert that all is there, but the variables of what was lost, and that all goes on."""
        for language, state in (("python", self.python), ("shell", self.shell)):
            assert await state() == (("None", True) if lost == language else ("1", False))
        assert await self.read() == b"content"
        assert (await self.sandbox.run_process(["cat"], stdin=b"x", capture_stdout=True)).stdout == b"x"
        assert self.machine.failure is None


@asynccontextmanager
async def open_box(directory: Path) -> AsyncGenerator[Box]:
    async with open_local_sandbox(timeouts=Timeouts(interrupt_grace=0.2, kill=0.5)) as (sandbox, machine):
        box = Box(sandbox, machine, directory)
        await sandbox.run("x = 1")
        await sandbox.run("x=1", language="shell")
        await sandbox.path(str(directory / "file")).write_bytes(b"content")
        yield box


@pytest.mark.parametrize(("servant", "lost"), [("interpreter", "python"), ("porter", "shell"), ("file helper", "")])
async def test_one_that_is_killed_is_replaced_and_its_neighbours_keep_all(
    tmp_path: Path, servant: Servant, lost: Literal["python", "shell", ""]
) -> None:
    async with open_box(tmp_path) as box:
        pid = find(servant)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not birth(pid))
        await box.check(lost=lost)


RUNS = [("interpreter", "python", "while True: pass"), ("porter", "shell", "while :; do :; done")]


@pytest.mark.parametrize(("servant", "language", "code"), RUNS)
async def test_a_run_whose_interpreter_is_killed_says_so(
    tmp_path: Path, servant: Servant, language: Literal["python", "shell"], code: str
) -> None:
    async with open_box(tmp_path) as box:
        say = "print('go', flush=True)" if language == "python" else "echo go"
        async with box.sandbox.stream(f"{say}\n{code}", language=language) as events:
            async for event in events:
                if isinstance(event, RunResult):
                    assert not event.state_kept
                    assert event.exit_code == 137
                else:
                    os.kill(find(servant), signal.SIGKILL)
        await box.check(lost=language)


@pytest.mark.parametrize(("servant", "lost"), [("interpreter", "python"), ("porter", "shell"), ("file helper", "")])
async def test_whatever_stands_still_a_cancelled_caller_is_back_and_the_next_one_served(
    tmp_path: Path, servant: Servant, lost: Literal["python", "shell", ""]
) -> None:
    async with open_box(tmp_path) as box:
        requests: dict[Servant, Callable[[], Awaitable[object]]] = {
            "interpreter": box.python,
            "porter": box.shell,
            "file helper": box.read,
        }
        os.kill(find(servant), signal.SIGSTOP)
        with trio.move_on_after(0.3) as scope:
            await requests[servant]()
        assert scope.cancelled_caught
        await box.check(lost=lost)


@pytest.mark.parametrize("servant", ["spawner", "interpreter", "porter", "file helper"])
async def test_what_stood_still_and_goes_on_has_lost_nothing(tmp_path: Path, servant: Servant) -> None:
    async with open_box(tmp_path) as box:
        pid = find(servant)
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(box.check)
            await trio.sleep(0.2)  # for the requests to be under way; whether they are makes no difference
            os.kill(pid, signal.SIGCONT)


async def test_a_spawner_that_stands_still_costs_the_machine_once_a_caller_is_cancelled(tmp_path: Path) -> None:
    """It can't acknowledge that a process was killed, and nothing else could say that it does not go on."""
    async with open_box(tmp_path) as box:
        spawner = find("spawner")
        try:
            with trio.CancelScope() as scope:
                async with box.sandbox.open_process(["cat"]):
                    os.kill(spawner, signal.SIGSTOP)
                    scope.cancel(reason="the test's")
                    await trio.sleep_forever()
            with pytest.raises(SandboxClosedError) as caught:
                await box.python()
            assert caught.value.retry_safe
        finally:
            os.kill(spawner, signal.SIGCONT)  # it ends with its agent


async def test_an_upload_whose_file_helper_is_killed_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1 << 20) * 100)
    async with open_box(tmp_path) as box:

        async def kill() -> None:
            helper = find("file helper")
            await wait_until(lambda: written_bytes(helper) > 1 << 20)
            os.kill(helper, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(OutcomeUnknownError, match="the file helper was killed") as caught:
                await box.sandbox.upload(source, str(target))
            nursery.cancel_scope.cancel(reason="it is over")
        assert not caught.value.retry_safe
        assert not target.exists()
        await box.check()
