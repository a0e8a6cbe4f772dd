"""Runs that are handed over in the instant in which the interpreter ends: what it has not begun, another one runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_sandbox import OutputChunk, RunResult
from trio_sandbox.guest.agent.interpreter import Interpreter
from trio_sandbox.guest.agent.run import Run
from trio_sandbox.guest.process_status import read_status

from ._agent import Host, Ran, open_agent
from ._sandbox import open_local_sandbox

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here; tests/qemu has one")

#: Code that makes the interpreter end by itself between two runs, and wait in the middle of that for a line from the FIFO.
ENDING_BY_ITSELF = {
    # It is never a turn of the event loop behind what tells the end of the run.
    "javascript": """
        const fs = require('fs');
        process.on('exit', () => fs.readSync(fs.openSync('FIFO'), Buffer.alloc(1)));
        const wait = () => fs.readlinkSync('/proc/self/fd/1') === '/dev/null' ? process.exit() : setImmediate(wait);
        new Promise((resolve) => setImmediate(async () => {
            resolve();
            for (let turns = 0; turns < 10; turns++) await null;
            wait();
        }))""",
    "shell": "trap 'read -u 5 line 5<FIFO' EXIT; set -t",
}
#: Code that prints the process of the interpreter, and the one that has started it.
PROCESSES = {
    "python": "import os; print(os.getpid(), os.getppid())",
    "javascript": "console.log(process.pid, process.ppid)",
    "shell": "echo $$ $PPID",
}
#: Code that prints what it reads, makes the file FILE, and prints what a variable of an earlier run is now.
CODE = {
    "python": "import sys; print(sys.stdin.read(), globals().get('kept')); open('FILE', 'a').close()",
    "javascript": "console.log(require('fs').readFileSync(0, 'utf8'), globalThis.kept); require('fs').writeFileSync('FILE', '')",
    "shell": 'echo "$(cat)" $kept; : >FILE',
}
#: What it prints where it has another interpreter, without the input.
PRINTED = {"python": "{} None\n", "javascript": "{} undefined\n", "shell": "{}\n"}

every_language = pytest.mark.parametrize(
    "language",
    ["python", pytest.param("javascript", marks=needs_node), pytest.param("shell", marks=needs_bash)],
)
every_porter = pytest.mark.parametrize(
    "language", [pytest.param("javascript", marks=needs_node), pytest.param("shell", marks=needs_bash)]
)


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


@pytest.fixture
def when_handed_over(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is done, one for each run, as soon as an interpreter has been handed it."""
    hand_over, doing = Interpreter._hand_over, list[Callable[[], object]]()

    def hand_over_and_do(self: Interpreter, run: Run) -> bool:
        accepted = hand_over(self, run)
        if doing:
            doing.pop(0)()
        return accepted

    monkeypatch.setattr(Interpreter, "_hand_over", hand_over_and_do)
    return doing


async def stop(pid: int) -> None:
    """Have a process stand still: it takes nothing any more."""
    os.kill(pid, signal.SIGSTOP)
    while read_status(str(pid))[0] != b"T":
        await trio.lowlevel.checkpoint()


async def start(host: Host, language: str) -> tuple[int, int]:
    """Have an interpreter with a variable in it; return its process, and the one that has started it."""
    await host.run("kept = 1" if language != "shell" else "kept=1", language=language)
    pid, parent = map(int, (await host.run(PROCESSES[language], language=language)).stdout.split())
    return pid, parent


async def run(host: Host, language: str, path: Path, *, with_input: bool) -> Ran:
    """Run `CODE`, with some input or without."""
    code = CODE[language].replace("FILE", str(path))
    if not with_input:
        return await host.run(code, language=language)
    async with host.open_run(code, language=language, stdin=(pipe := host.open_pipe()).id) as run:
        await pipe.send_all(b"in")
        await pipe.send_eof()
        return await run.finish()


def ran_anew(language: str, *, with_input: bool) -> Ran:
    return Ran(PRINTED[language].format("in" if with_input else ""), "", 0, restarted=True, state_kept=True)


@pytest.mark.parametrize("with_input", [False, True])
@every_porter
async def test_an_interpreter_that_ends_by_itself(
    host: Host, tmp_path: Path, when_handed_over: list[Callable[[], object]], language: str, with_input: bool
) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    writer = os.open(fifo, os.O_RDWR)
    try:
        await host.run(ENDING_BY_ITSELF[language].replace("FIFO", str(fifo)), language=language)
        when_handed_over.append(lambda: os.write(writer, b"\n"))
        assert await run(host, language, tmp_path / "file", with_input=with_input) == ran_anew(
            language, with_input=with_input
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("with_input", [False, True])
@every_language
async def test_an_interpreter_that_is_killed(
    host: Host, tmp_path: Path, when_handed_over: list[Callable[[], object]], language: str, with_input: bool
) -> None:
    pid, _ = await start(host, language)
    await stop(pid)
    when_handed_over.append(lambda: os.kill(pid, signal.SIGKILL))
    assert await run(host, language, tmp_path / "file", with_input=with_input) == ran_anew(
        language, with_input=with_input
    )
    assert (await host.run(PROCESSES[language], language=language)).restarted is False


@every_porter
async def test_a_porter_that_has_yet_to_read_of_the_run(
    host: Host, tmp_path: Path, when_handed_over: list[Callable[[], object]], language: str
) -> None:
    pid, porter = await start(host, language)
    await stop(porter)
    os.kill(pid, signal.SIGKILL)
    when_handed_over.append(lambda: os.kill(porter, signal.SIGCONT))
    assert await run(host, language, tmp_path / "file", with_input=False) == ran_anew(language, with_input=False)


@pytest.mark.parametrize(("request_", "exit_code"), [("interrupt", 130), ("kill", 137), ("deadline", 130)])
@every_language
async def test_a_run_that_was_stopped_before_it_has_begun_is_not_begun_elsewhere(
    host: Host,
    tmp_path: Path,
    when_handed_over: list[Callable[[], object]],
    language: str,
    request_: str,
    exit_code: int,
) -> None:
    pid, _ = await start(host, language)
    await stop(pid)
    handed_over = trio.Event()
    when_handed_over.append(handed_over.set)
    code = CODE[language].replace("FILE", str(tmp_path / "file"))
    async with host.open_run(code, language=language) as run:
        await handed_over.wait()
        await run.records.send_json({request_: 0 if request_ == "deadline" else True})
        await wait_all_tasks_blocked(0.05)
        if request_ != "kill":
            os.kill(pid, signal.SIGKILL)
        assert await run.finish() == Ran("", "", exit_code, restarted=False, state_kept=False)
    assert (await host.run(PROCESSES[language], language=language)).restarted
    assert not (tmp_path / "file").exists()


async def test_a_run_goes_to_one_more_interpreter_and_no_further(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends interpreters as they come can't keep us busy for ever."""
    await stop((await start(host, "python"))[0])
    hand_over, times = Interpreter._hand_over, 0

    def hand_over_and_end(self: Interpreter, run: Run) -> bool:
        nonlocal times
        times += 1
        accepted = hand_over(self, run)
        self._child.signal(int(signal.SIGKILL))
        return accepted

    monkeypatch.setattr(Interpreter, "_hand_over", hand_over_and_end)
    async with host.open_run(CODE["python"].replace("FILE", str(tmp_path / "file"))) as run:
        assert "ended with status -9 before it took code" in (await run.failure())["strerror"]
    assert times == 2
    monkeypatch.undo()
    assert (await host.run("print(1)")).stdout == "1\n"
    assert not (tmp_path / "file").exists()


def double(number: int) -> int:
    return 2 * number


async def test_what_streams_and_may_call_functions_goes_on_in_another_interpreter(
    when_handed_over: list[Callable[[], object]],
) -> None:
    async with open_local_sandbox() as (sandbox, _):
        pid = int((await sandbox.run("import os; print(os.getpid())")).stdout)
        await stop(pid)
        when_handed_over.append(lambda: os.kill(pid, signal.SIGKILL))
        code = "print(double(int(input())), flush=True); print(input())"
        async with sandbox.stream(code, stdin=True, functions={"double": double}) as events:
            assert events.stdin is not None
            await events.stdin.send_all(b"21\n")
            seen = list[object]()
            async for event in events:
                seen.append(event)
                if isinstance(event, OutputChunk) and event.data == b"42\n":
                    await events.stdin.send_all(b"end\n")
        *_, result = seen
        assert isinstance(result, RunResult)
        assert (result.stdout, result.restarted, result.state_kept) == ("42\nend\n", True, True)
