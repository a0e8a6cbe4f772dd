"""`trio_sandbox.blocking` and `trio_sandbox.aio`, with a real agent in this process behind them."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests import generate_doors
from tests.fake._sandbox import open_local_sandbox
from trio_sandbox import Display, OutputChunk, RunResult, SandboxClosedError, SandboxError, aio, blocking
from trio_sandbox.aio._door import open_root as open_aio
from trio_sandbox.blocking._door import open_root as open_blocking
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

ROOT = Path(__file__).parents[2]


def open_sandbox() -> AbstractContextManager[blocking.Sandbox]:
    return open_blocking(open_local_sandbox, lambda portal, pair: blocking.Sandbox(portal, pair[0]))


def open_aio_sandbox() -> AbstractAsyncContextManager[aio.Sandbox]:
    return open_aio(open_local_sandbox, lambda portal, pair: aio.Sandbox(portal, pair[0]))


# --- What is generated ---


@pytest.mark.parametrize(("path", "text"), [pytest.param(*item, id=str(item[0])) for item in generate_doors.files()])
def test_the_doors_are_what_the_generator_makes(path: Path, text: str) -> None:
    assert path.read_text("utf-8") == text, "run python -m tests.generate_doors"


@pytest.mark.parametrize("door", [blocking, aio])
@pytest.mark.parametrize("name", sorted(generate_doors.DOORS.keys() - {"GuestConnection"}))
def test_a_door_has_all_that_the_api_for_trio_has(door: Any, name: str) -> None:
    def public(kind: type) -> set[str]:
        return {each for each in dir(kind) if not each.startswith("_")}

    missing = public(generate_doors.ORIGINALS[name]) - public(getattr(door, name)) - generate_doors.LEFT_OUT
    assert missing <= ({"aclose"} if door is blocking or name == "FileChanges" else set())


@pytest.mark.parametrize("original", [each for group in generate_doors.OPENERS.values() for each in group])
@pytest.mark.parametrize("door", [blocking, aio])
def test_functions_that_open_take_the_same(door: Any, original: Callable[..., object]) -> None:
    ours, theirs = (
        [*inspect.signature(each).parameters.values()] for each in (original, getattr(door, original.__name__))
    )
    if ours[0].name == "host":
        theirs[0] = theirs[0].replace(annotation=ours[0].annotation)  # there, a host of the door's own
    assert ours == theirs


# --- Blocking ---


def test_a_blocking_sandbox() -> None:
    with open_sandbox() as sandbox:
        assert repr(sandbox) == "<trio_sandbox.blocking.Sandbox 'python', 256 MiB: open>"
        sandbox.run("x = 6")
        assert sandbox.run("x * 7").value == "42"
        with sandbox.stream("print('a'); import sys; sys.stdin.read(); print('b')", stdin=True) as events:
            assert next(events) == OutputChunk("stdout", b"a\n")
            assert events.stdin is not None
            events.stdin.close()
            *chunks, result = events
            assert chunks == [OutputChunk("stdout", b"b\n")]
            assert isinstance(result, RunResult)
        assert sandbox.run_process(["echo", sandbox.path("/a")], capture_stdout=True).stdout == b"/a\n"
        with sandbox.open_process(["cat"]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.send_all(b"hello")
            process.stdin.close()
            assert b"".join(process.stdout) == b"hello"
            assert process.wait() == process.returncode == 0
        with sandbox.open_process(["sleep", "60"]) as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait() == -signal.SIGTERM


def test_files_by_the_blocking_door(tmp_path: Path) -> None:
    with open_sandbox() as sandbox:
        directory = sandbox.path(str(tmp_path))
        path = directory / "a.txt"
        assert (path.name, path.parent, path < directory / "b") == ("a.txt", directory, True)
        with sandbox.watch(directory) as changes:
            assert path.write_text("one\ntwo\n") == 8
            assert changes.receive().path.parent == directory
        with path.open() as text:
            assert list(text) == ["one\n", "two\n"]
        with path.open("rb") as data:
            assert isinstance(data, blocking.GuestFile)
            assert data.read(3) == b"one"
        assert data.closed
        assert list(directory.iterdir()) == list(directory.glob("*.txt")) == [path]
        sandbox.download(path, tmp_path / "b.txt")
        assert (tmp_path / "b.txt").read_text() == "one\ntwo\n"
        with pytest.raises(FileNotFoundError):
            (directory / "none").read_text()


def test_a_deadline_stops_the_code_and_keeps_the_state() -> None:
    with open_sandbox() as sandbox:
        sandbox.run("x = 1")
        with pytest.raises(TimeoutError, match="deadline"):
            with blocking.fail_after(0.5):
                sandbox.run("while True: x += 1")
        assert sandbox.last_output.outcome in ("stopped", "unsent")  # a machine may be slow
        with blocking.move_on_after(0.5) as limit:
            sandbox.run("while True: x += 1")
        assert limit.expired
        with blocking.move_on_after(60) as limit:
            assert sandbox.run("x >= 1").value == "True"
        assert not limit.expired
        with blocking.move_on_after(60) as outer, pytest.raises(TimeoutError), blocking.fail_after(0):
            sandbox.run("raise AssertionError")
        assert not outer.expired
        with blocking.move_on_after(0) as outer, blocking.move_on_after(60) as inner:
            sandbox.run("1")
        assert (outer.expired, inner.expired) == (True, False)


def test_a_block_inside_a_deadline_is_left_by_who_entered_it() -> None:
    with open_sandbox() as sandbox:
        with blocking.move_on_after(0.2) as limit, sandbox.stream("print(1)\nwhile True: pass") as events:
            for event in events:
                assert isinstance(event, OutputChunk)
        assert limit.expired
        assert sandbox.run("1").state_kept


@pytest.mark.parametrize(
    ("seconds", "kind"),
    [("1", TypeError), (None, TypeError), (True, TypeError), (-1, ValueError), (float("nan"), ValueError)],
)
def test_deadlines_that_are_none(seconds: Any, kind: type[Exception]) -> None:
    for bounded in (blocking.fail_after, blocking.move_on_after):
        with pytest.raises(kind, match="`seconds` must be"):
            with bounded(seconds):
                pytest.fail("it was entered")


def interrupt_when(wait: Callable[[], object]) -> threading.Thread:
    """Have Ctrl-C come when *wait* returns, in another thread."""
    main = threading.main_thread()

    def send() -> None:
        wait()
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


#: Code that says when it runs, and goes on for ever.
ENDLESS = "x = 5\nprint('begun', flush=True)\nwhile True: pass"


def wait_for_output(sandbox: blocking.Sandbox) -> None:
    while not any(run.stdout for run in sandbox.recent_runs()):
        time.sleep(0.01)


def test_ctrl_c_stops_the_run_and_keeps_the_sandbox() -> None:
    with open_sandbox() as sandbox:
        thread = interrupt_when(lambda: wait_for_output(sandbox))
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(ENDLESS)
        thread.join()
        # The guest has acknowledged it already.
        assert (sandbox.last_output.outcome, sandbox.last_output.exit_code) == ("stopped", 130)
        assert sandbox.run("x").value == "5"


def test_ctrl_c_while_a_block_is_entered_leaves_it() -> None:
    entered, left = threading.Event(), threading.Event()

    @asynccontextmanager
    async def open_slowly() -> AsyncGenerator[None]:
        try:
            entered.set()
            await trio.sleep_forever()
            yield
        finally:
            left.set()

    thread = interrupt_when(entered.wait)
    with pytest.raises(KeyboardInterrupt):
        with open_blocking(open_slowly, lambda _, value: value):
            pytest.fail("it was entered")
    assert left.is_set()
    thread.join()


def test_what_comes_out_of_a_block_passes_it_unchanged() -> None:
    seen: list[BaseException] = []

    @asynccontextmanager
    async def notice() -> AsyncGenerator[None]:
        try:
            yield
        except BaseException as exc:
            seen.append(exc)
            raise

    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            with open_blocking(notice, lambda _, value: value):
                raise error
        assert seen.pop() is caught.value is error


def test_a_block_that_deals_with_an_exception_ends_it() -> None:
    @asynccontextmanager
    async def forgive() -> AsyncGenerator[None]:
        try:
            yield
        except ValueError:
            await trio.lowlevel.checkpoint()

    with open_blocking(forgive, lambda _, value: value):
        raise ValueError("forgiven")


def test_what_a_block_raises_when_it_is_left() -> None:
    @asynccontextmanager
    async def fail() -> AsyncGenerator[None]:
        yield
        raise SandboxError("broken")

    with pytest.raises(SandboxError, match="broken"):
        with open_blocking(fail, lambda _, value: value):
            pass


def test_functions_of_the_host_may_block_and_use_the_sandbox() -> None:
    with open_sandbox() as sandbox:

        def ask(name: str) -> str:
            return sandbox.run_process(["echo", name], capture_stdout=True).stdout.decode()

        def run() -> None:
            sandbox.run("1")

        functions: dict[str, Callable[..., object]] = {"ask": ask, "run": run}
        assert sandbox.run("print(ask('me'), end='')", functions=functions).stdout == "me\n"
        assert "in the block of another run" in sandbox.run("run()", functions=functions).stderr

        async def wrong() -> None: ...

        with pytest.raises(TypeError, match="must not be async"):
            sandbox.run("1", functions={"wrong": wrong})


def test_a_thread_in_the_block_of_a_run_is_told_that_it_would_wait_for_itself() -> None:
    with open_sandbox() as sandbox, sandbox.stream("1"), pytest.raises(RuntimeError, match="would wait for"):
        sandbox.run("2")


def test_threads_side_by_side_have_a_last_output_each() -> None:
    with open_sandbox() as sandbox:
        said: dict[int, str] = {}

        def work(number: int) -> None:
            for _ in range(5):
                sandbox.run(f"print({number})")
                said[number] = sandbox.last_output.stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert said == {number: f"{number}\n" for number in range(4)}


def test_after_the_block_requests_are_refused_and_what_is_known_can_be_asked() -> None:
    with open_sandbox() as sandbox:
        sandbox.run("print(1)")
        path = sandbox.path("/tmp")
    with pytest.raises(SandboxClosedError):
        sandbox.run("1")
    with pytest.raises(SandboxClosedError):
        path.exists()
    with pytest.raises(SandboxClosedError):
        with sandbox.stream("1"):
            pytest.fail("it was entered")
    assert sandbox.last_output.stdout == "1\n"
    assert sandbox.statistics().runs == 1
    assert "closed" in repr(sandbox)


def test_a_thread_that_waits_when_the_block_is_left_is_told_so() -> None:
    with open_sandbox() as sandbox:
        begun = threading.Event()
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                sandbox.run("begun()\nwhile True: pass", functions={"begun": begun.set})
            except SandboxError as exc:
                errors.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()
    thread.join()
    assert len(errors) == 1


def test_a_block_is_entered_once() -> None:
    block = open_sandbox()
    with block:
        pass
    with pytest.raises(RuntimeError, match="entered before"):
        with block:
            pytest.fail("it was entered")


def test_a_callback_in_the_trio_thread_is_told_that_it_can_not_wait(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with open_sandbox() as sandbox, pytest.raises(RuntimeError, match="would wait for itself"):
        sandbox.upload(tmp_path / "a", str(tmp_path / "b"), progress=lambda _: sandbox.run("1"))


def test_a_display_comes_through_the_blocking_door() -> None:
    async def answer(_: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(displays=(Display("image/png", b"x"),))

    with open_blocking(lambda: open_scripted_sandbox(answer), blocking.Sandbox) as sandbox:
        assert sandbox.run("1").displays == (Display("image/png", b"x"),)


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    head = "from tests.fake.test_doors import open_sandbox, open_aio_sandbox\n"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", head + text]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


FORKING = """
import os, sys
with open_sandbox() as sandbox:
    sandbox.run("x = 1")
    child = os.fork()
    if child == 0:
        try:
            sandbox.run("x = 2")
        except RuntimeError as exc:
            print("refused:", exc, flush=True)
        with open_sandbox() as own:
            print("own:", own.run("1").value, flush=True)
        sys.exit(7)
    print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print("parent:", sandbox.run("x").value)
"""


def test_a_fork_is_refused_its_parents_sandbox_and_may_open_its_own() -> None:
    done = run_program(FORKING)
    assert done.returncode == 0, done.stderr
    refused, own, child, parent = done.stdout.splitlines()
    assert refused.startswith("refused: nothing was done: process ")
    assert "is a fork of" in refused
    assert (own, child, parent) == ("own: 1", "child: 7", "parent: 1")


UNFINISHED = """
import contextlib
from trio_sandbox.blocking._door import open_root

@contextlib.asynccontextmanager
async def told():
    yield
    print("left")

manager = open_root(told, lambda _, value: value)
manager.__enter__()
"""


def test_a_program_that_ends_without_leaving_its_block_has_it_left() -> None:
    done = run_program(UNFINISHED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


# --- asyncio ---


def test_a_sandbox_for_asyncio(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_aio_sandbox() as sandbox:
            assert repr(sandbox) == "<trio_sandbox.aio.Sandbox 'python', 256 MiB: open>"
            await sandbox.run("x = 6")
            assert (await sandbox.run("x * 7")).value == "42"
            async with sandbox.stream("print('a')") as events:
                found = [event async for event in events]
            assert found[0] == OutputChunk("stdout", b"a\n")
            path = sandbox.path(str(tmp_path)) / "a"
            await path.write_text("one\ntwo\n")
            async with await path.open() as file:
                assert [line async for line in file] == ["one\n", "two\n"]
            async with sandbox.open_process(["cat"]) as process:
                process.terminate()
                assert await process.wait() == -signal.SIGTERM
            results = await asyncio.gather(*(sandbox.run(f"print({n})") for n in range(4)))
            assert [result.stdout for result in results] == ["0\n", "1\n", "2\n", "3\n"]

    asyncio.run(main())


def test_cancelling_waits_until_the_guest_has_stopped() -> None:
    async def main() -> None:
        async with open_aio_sandbox() as sandbox:
            task = asyncio.create_task(sandbox.run(ENDLESS))
            while not any(run.stdout for run in sandbox.recent_runs()):
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # more than once is no more than once
            with pytest.raises(asyncio.CancelledError):
                await task
            (output,) = sandbox.recent_runs()
            assert (output.outcome, output.exit_code) == ("stopped", 130)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await sandbox.run("while True: pass")
            assert (await sandbox.run("x")).value == "5"

    asyncio.run(main())


def test_functions_are_called_in_asyncio_and_cancelled_with_the_run() -> None:
    async def main() -> None:
        async with open_aio_sandbox() as sandbox:
            ended: list[str] = []

            async def add(x: int) -> int:
                await asyncio.sleep(0)
                return x + 1

            async def wait() -> None:
                begun.set()
                try:
                    await asyncio.sleep(3600)
                finally:
                    ended.append("wait")

            async def again() -> None:
                await sandbox.run("1")

            begun = asyncio.Event()
            functions: dict[str, Callable[..., object]] = {"add": add, "wait": wait, "again": again, "plain": lambda: 7}
            assert (await sandbox.run("add(1) + plain()", functions=functions)).value == "9"
            assert "in the block of another run" in (await sandbox.run("again()", functions=functions)).stderr
            task = asyncio.create_task(sandbox.run("wait()", functions=functions))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == ["wait"]

    asyncio.run(main())


def test_one_task_may_enter_a_block_and_another_leave_it() -> None:
    async def main() -> None:
        block = open_aio_sandbox()
        entering = asyncio.create_task(block.__aenter__())
        sandbox = await entering
        assert (await sandbox.run("1")).value == "1"
        leaving = asyncio.create_task(block.__aexit__(None, None, None))
        await leaving
        with pytest.raises(SandboxClosedError):
            await sandbox.run("1")

    asyncio.run(main())


def test_cancelling_while_a_block_is_entered_leaves_it() -> None:
    async def main() -> None:
        entered, left = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        @asynccontextmanager
        async def open_slowly() -> AsyncGenerator[None]:
            try:
                loop.call_soon_threadsafe(entered.set)
                await trio.sleep_forever()
                yield
            finally:
                left.set()

        task = asyncio.create_task(open_aio(open_slowly, lambda _, value: value).__aenter__())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left.is_set()

    asyncio.run(main())


def test_trio_and_no_loop_are_told_the_way() -> None:
    async def enter() -> None:
        async with aio.open_sandbox():
            pytest.fail("it was entered")

    for start in (lambda: trio.run(enter), lambda: enter().send(None)):
        with pytest.raises(RuntimeError, match=r"needs asyncio, and no task of it runs here: .*asyncio.run"):
            start()


def test_no_thread_and_no_descriptor_is_left() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with open_sandbox() as sandbox:
        sandbox.run("1")
    before = count()
    for _ in range(3):
        with open_sandbox() as sandbox:
            sandbox.run("1")
    assert count() == before
    for thread in threading.enumerate():
        if thread.name == "trio_sandbox portal":
            thread.join(10)
    assert "trio_sandbox portal" not in [thread.name for thread in threading.enumerate()]
