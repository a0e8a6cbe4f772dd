"""What a process leaves behind when it ends: `run_process` lets it go on, as Trio's does, and never waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import OutputLimitError, Sandbox

from ._sandbox import open_local_sandbox

#: A shell that leaves a process behind and says its number; by what that one holds.
LEAVING = {
    "nothing": "sleep 1000 >/dev/null 2>&1 & echo $!",
    "the output": "sleep 1000 & echo $!",
    "a session of its own": "setsid sleep 1000 & echo $!",
}


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


def lives(pid: int) -> bool:
    try:
        return "(sleep) Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


OUTPUTS: dict[str, dict[str, Any]] = {
    "stdout": {"capture_stdout": True},
    "both": {"capture_stdout": True, "capture_stderr": True},
    "together": {"capture_stdout": True, "stderr_to_stdout": True},
    "unchecked": {"capture_stdout": True, "check": False},
    "input": {"capture_stdout": True, "stdin": b"x" * 300_000},
}


@pytest.mark.parametrize("how", OUTPUTS)
@pytest.mark.parametrize("holding", LEAVING)
async def test_what_is_left_behind_goes_on(sandbox: Sandbox, holding: str, how: str) -> None:
    done = await sandbox.run_process(LEAVING[holding], shell=True, **OUTPUTS[how])
    pid = int(done.stdout)
    await sandbox.run_process(["true"])
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not lives(pid))


async def test_all_that_the_process_printed_is_there(sandbox: Sandbox) -> None:
    done = await sandbox.run_process(
        "sleep 1000 & echo $! >&2; head -c 3000000 /dev/zero", shell=True, capture_stdout=True, capture_stderr=True
    )
    assert len(done.stdout) == 3_000_000
    os.kill(int(done.stderr), signal.SIGKILL)


async def test_the_last_in_a_pipeline_may_still_print(sandbox: Sandbox) -> None:
    done = await sandbox.run_process("(sleep 0.05; echo late) & echo first", shell=True, capture_stdout=True)
    assert done.stdout == b"first\nlate\n"


async def test_what_is_printed_later_is_discarded_and_hurts_nobody(sandbox: Sandbox, tmp_path: Path) -> None:
    writer = f"while sleep 0.1; do head -c 100000 /dev/zero || exit; echo x >> {tmp_path}/wrote; done"
    done = await sandbox.run_process(f"({writer}) & echo $!", shell=True, capture_stdout=True, check=False)
    pid = int(done.stdout.split()[0].strip(b"\0"))
    written = (tmp_path / "wrote").stat().st_size if (tmp_path / "wrote").exists() else 0
    await wait_until(lambda: (tmp_path / "wrote").exists() and (tmp_path / "wrote").stat().st_size > written + 10)
    os.kill(pid, signal.SIGKILL)


async def start(sandbox: Sandbox, path: Path, after: str) -> None:
    await sandbox.run_process(f"sleep 1000 & echo $! > {path}; {after}", shell=True, capture_stdout=True)


async def left(path: Path) -> int:
    await wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


async def test_cancelling_kills_it_all(sandbox: Sandbox, tmp_path: Path) -> None:
    # Also in the moment in which the shell is over and its output is not.
    for number, after in enumerate(("sleep 1000", "true")):
        path = tmp_path / str(number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, sandbox, path, after)
            pid = await left(path)
            assert lives(pid)
            nursery.cancel_scope.cancel(reason="a test")
        await wait_until(lambda pid=pid: not lives(pid))  # type: ignore[misc]


async def test_a_deadline_and_too_much_output_kill_it_all(sandbox: Sandbox, tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, sandbox, tmp_path / "deadline", "sleep 1000")
            await left(tmp_path / "deadline")
            scope.deadline = trio.current_time()
    assert scope.cancelled_caught
    with pytest.raises(OutputLimitError):
        await start(sandbox, tmp_path / "output", "cat /dev/zero")
    for name in ("deadline", "output"):
        pid = await left(tmp_path / name)
        await wait_until(lambda pid=pid: not lives(pid))  # type: ignore[misc]


async def test_a_process_that_fails_leaves_as_much(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="status 3"):
        await start(sandbox, tmp_path / "failed", "exit 3")
    pid = await left(tmp_path / "failed")
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)


async def test_open_process_kills_what_is_left(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["sh", "-c", LEAVING["nothing"]]) as process:
        assert process.stdout is not None
        pid = int(b"".join([data async for data in process.stdout]))
        assert await process.wait() == 0
        assert lives(pid)
    await wait_until(lambda: not lives(pid))


async def test_a_terminal_is_hung_up(sandbox: Sandbox, tmp_path: Path) -> None:
    up = tmp_path / "up"  # by then it ignores the signal
    daemon = f"nohup sh -c ': > {up}; exec sleep 1000' >/dev/null 2>&1 & until [ -e {up} ]; do :; done"
    done = await sandbox.run_process(
        f"sleep 1000 & echo $!; {daemon}; echo $!", shell=True, pty=True, capture_stdout=True
    )
    gone, kept = map(int, done.stdout.split())
    await wait_until(lambda: not lives(gone))
    assert lives(kept)
    os.kill(kept, signal.SIGKILL)
