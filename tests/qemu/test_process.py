"""Owned processes: run, drained, ended and reaped, with real programs."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left, wait_until
from trio_sandbox import MissingProgramError, SandboxError
from trio_sandbox.qemu import InheritedFds, OwnedProcess, describe_exit, minimal_environment, run_owned

_ENVIRONMENT = minimal_environment()


def _has_memory(pid: int) -> bool:
    """Whether it still takes room: a process that ends gives up its memory before its files, and its name last."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[0]) > 0
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _start(nursery: trio.Nursery, script: str, *, grace: float = 0.0) -> OwnedProcess:
    process: OwnedProcess = await nursery.start(
        functools.partial(run_owned, ["sh", "-c", script], environment=_ENVIRONMENT, grace=grace)
    )
    return process


async def test_output_and_status() -> None:
    with nothing_left():
        process = await run_owned(["sh", "-c", "echo out; echo err >&2; exit 3"], environment=_ENVIRONMENT)
    assert process.output() == "out\nerr\n"
    assert process.returncode == 3
    assert await process.wait() == 3
    assert "exited with status 3" in repr(process)


async def test_it_leads_its_own_process_group_and_has_no_stdin() -> None:
    process = await run_owned(
        ["sh", "-c", "readlink /proc/$$/fd/0; cut -d' ' -f5 /proc/$$/stat; echo $$"], environment=_ENVIRONMENT
    )
    stdin, group, pid = process.output().split()
    assert stdin == "/dev/null"
    assert group == pid == str(process.pid)


async def test_environment_and_directory_are_what_was_asked_for(tmp_path: Path) -> None:
    process = await run_owned(["/bin/sh", "-c", "pwd; env"], environment={"ONLY": "this"}, cwd=tmp_path)
    directory, *environment = process.output().splitlines()
    assert directory == str(tmp_path)
    assert "ONLY=this" in environment
    assert not any(line.startswith("HOME=") for line in environment)


async def test_a_program_that_is_missing_names_its_package() -> None:
    with nothing_left(), pytest.raises(MissingProgramError, match="no-such-program"):
        await run_owned(["no-such-program"], environment=_ENVIRONMENT)


async def test_arguments_too_long_for_the_kernel() -> None:
    with nothing_left(), pytest.raises(ValueError, match="too long"):
        await run_owned(["true", "x" * 2**20], environment=_ENVIRONMENT)


async def test_endless_output_is_drained_and_only_its_end_is_kept() -> None:
    script = "yes 0123456789abcde | head -c 3000000; echo the end"
    process = await run_owned(["sh", "-c", script], environment=_ENVIRONMENT, tail_bytes=1000)
    assert len(process.output()) == 1000
    assert process.output().endswith("the end\n")


async def test_output_is_handed_out_as_it_comes() -> None:
    pieces: list[bytes] = []
    await run_owned(["sh", "-c", "echo one; echo two"], environment=_ENVIRONMENT, on_output=pieces.append)
    assert b"".join(pieces) == b"one\ntwo\n"


async def test_what_the_output_handler_raises_ends_the_process() -> None:
    def refuse(data: bytes) -> None:
        raise LookupError("refused")

    with nothing_left(), pytest.raises(LookupError, match="refused"):
        await run_owned(["sh", "-c", "echo one; sleep 1000"], environment=_ENVIRONMENT, on_output=refuse)


async def test_a_grandchild_that_keeps_the_pipe_does_not_outlive_it() -> None:
    with nothing_left():
        process = await run_owned(["sh", "-c", "sleep 1000 & echo $!"], environment=_ENVIRONMENT)
    assert not _has_memory(int(process.output()))


async def test_cancelled_it_is_killed_with_its_group() -> None:
    with nothing_left():
        async with trio.open_nursery() as nursery:
            process = await _start(nursery, "trap '' TERM; sleep 1000 & echo $!; wait")
            await wait_until(lambda: "\n" in process.output())
            nursery.cancel_scope.cancel()
    assert process.returncode == -signal.SIGKILL
    assert not _has_memory(int(process.output()))


async def test_a_child_that_takes_its_time_to_end_is_waited_for() -> None:
    program = "import os; memory = b'x' * (256 << 20); print(os.getpid(), flush=True); input()"
    async with trio.open_nursery() as nursery:
        process = await _start(nursery, f'sleep 1000 | python3 -c "{program}"; true')
        await wait_until(lambda: "\n" in process.output())
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not _has_memory(int(process.output()))


async def test_cancelled_it_may_say_goodbye() -> None:
    async with trio.open_nursery() as nursery:
        process = await _start(
            nursery, "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done", grace=60
        )
        await wait_until(lambda: "ready" in process.output())
        nursery.cancel_scope.cancel()
    assert process.returncode == 7
    assert process.output().endswith("bye\n")


async def test_cancelled_it_may_say_more_than_a_pipe_takes() -> None:
    async with trio.open_nursery() as nursery:
        goodbye = "trap 'head -c 1000000 /dev/zero; echo bye; exit 7' TERM"
        process = await _start(nursery, f"{goodbye}; echo ready; while :; do sleep 0.01; done", grace=60)
        await wait_until(lambda: "ready" in process.output())
        nursery.cancel_scope.cancel()
    assert process.returncode == 7
    assert process.output().endswith("bye\n")


async def test_cancelled_and_deaf_to_term_it_is_killed_after_the_grace() -> None:
    async with trio.open_nursery() as nursery:
        process = await _start(nursery, "trap '' TERM; echo ready; while :; do sleep 0.01; done", grace=0.05)
        await wait_until(lambda: "ready" in process.output())
        nursery.cancel_scope.cancel()
    assert process.returncode == -signal.SIGKILL


async def test_killed_by_hand() -> None:
    async with trio.open_nursery() as nursery:
        process = await _start(nursery, "sleep 1000")
        assert "running with PID" in repr(process)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        process.kill()  # It is gone: no error, and nobody else is hit.


async def test_inherited_descriptors_are_the_childs_alone() -> None:
    with nothing_left(), InheritedFds() as inherited:
        ours, theirs = inherited.socketpair()
        with ours:
            argv = [sys.executable, "-ISc", f"import os; os.write({theirs}, b'hello')"]
            await run_owned(argv, environment=_ENVIRONMENT, inherited=inherited)
            assert ours.recv(100) == b"hello"
            assert ours.recv(100) == b""  # Nobody has the other end any more.


async def test_cancelled_at_every_step() -> None:
    async def attempt() -> None:
        with nothing_left():
            inherited = InheritedFds()
            inherited.open("/dev/null", os.O_RDONLY)
            await run_owned(["true"], environment=_ENVIRONMENT, inherited=inherited)

    await attempt()
    assert await cancel_at_every_step(attempt, every_task=True) > 4


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(0, "exited with status 0"), (-9, "was ended by SIGKILL"), (-63, "was ended by signal 63")],
)
def test_describe_exit(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words


@contextlib.contextmanager
def sigchld(handler: Callable[[int, object], object] | signal.Handlers) -> Generator[None]:
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def reap_every_child(number: int, frame: object) -> None:
    """Do what a program does that takes every child for its own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.mark.parametrize("handler", [signal.SIG_IGN, reap_every_child], ids=["ignored", "reaped by others"])
@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -KILL $$", -9), ("true", 0), ("sleep 0.1", 0)])
async def test_the_status_is_known_where_somebody_else_reaps(
    handler: Callable[[int, object], object] | signal.Handlers, script: str, status: int
) -> None:
    with sigchld(handler), nothing_left():
        process = await run_owned(["sh", "-c", f"echo out; {script}"], environment=_ENVIRONMENT)
    assert (process.returncode, process.output()) == (status, "out\n")


async def test_a_status_that_nobody_knows_is_not_taken_for_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOTTY, "an older kernel")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    with sigchld(signal.SIG_IGN), nothing_left(), pytest.raises(SandboxError, match=r"signal\.SIG_DFL"):
        await run_owned(["true"], environment=_ENVIRONMENT)
    with sigchld(signal.SIG_IGN), nothing_left():
        async with trio.open_nursery() as nursery:
            await _start(nursery, "sleep 1000")
            nursery.cancel_scope.cancel()


async def test_programs_do_not_inherit_that_sigchld_is_ignored() -> None:
    with sigchld(signal.SIG_IGN):
        process = await run_owned(
            ["sh", "-c", "grep SigIgn /proc/self/status; readlink /proc/self/fd/0"], environment=_ENVIRONMENT
        )
    _, ignored, stdin = process.output().split()
    assert not int(ignored, 16) & 1 << signal.SIGCHLD - 1
    assert stdin == "/dev/null"


async def test_cancelled_where_sigchld_is_ignored() -> None:
    async def start() -> None:
        await run_owned(["sh", "-c", "sleep 0.1 & true"], environment=_ENVIRONMENT)

    with sigchld(signal.SIG_IGN), nothing_left():
        assert await cancel_at_every_step(start, every_task=True) > 4
