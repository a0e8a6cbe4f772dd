"""`trio_sandbox.testing`: a sandbox whose guest is a script, as users test their programs with it."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step
from trio_sandbox import (
    Display,
    Network,
    OutcomeUnknownError,
    OutputChunk,
    OutputLimitError,
    RunResult,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    VmDiedError,
)
from trio_sandbox.constants import MAXIMUM_VALUE_BYTES
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox


async def print_the_call(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer(stdout=repr(call))


async def test_a_run_is_answered_as_the_script_says() -> None:
    calls: list[Call] = []

    async def answer(call: Call) -> Answer:
        calls.append(call)
        picture = Display("image/png", b"x" * 100_000, 1)
        return Answer(
            stdout="é\n",
            stderr=b"\xff",
            exit_code=3,
            value="42",
            displays=(picture,),
            cpu_seconds=0.25,
            peak_memory_bytes=2**20,
            disk_written_bytes=512,
        )

    async with open_scripted_sandbox(answer) as sandbox:
        assert isinstance(sandbox, Sandbox)
        result = await sandbox.run("print(1)", stdin=b"input", env={"A": "B"}, cwd="/tmp")
        await sandbox.run("#" * 100_000)
    assert calls.pop() == Call(kind="run", code="#" * 100_000, language="python")
    assert calls == [
        Call(kind="run", code="print(1)", language="python", stdin=b"input", env={"A": "B"}, cwd="/tmp"),
    ]
    assert (result.exit_code, result.stdout, result.stderr_bytes, result.value) == (3, "é\n", b"\xff", "42")
    assert result.displays == (Display("image/png", b"x" * 100_000, 1),)
    assert (result.restarted, result.state_kept) == (False, True)
    assert (result.cpu_seconds, result.peak_memory_bytes, result.disk_written_bytes) == (0.25, 2**20, 512)


async def test_an_interpreter_that_is_gone_is_told_of_by_the_next_run() -> None:
    async def answer(call: Call) -> Answer:
        return Answer(state_kept=call.code != "os._exit(0)")

    async with open_scripted_sandbox(answer) as sandbox:
        results = [await sandbox.run(code) for code in ("1", "os._exit(0)", "2", "3")]
    assert [(result.restarted, result.state_kept) for result in results] == [
        (False, True),
        (False, False),
        (True, True),
        (False, True),
    ]


async def test_events_come_as_from_a_guest() -> None:
    async with open_scripted_sandbox(print_the_call) as sandbox, sandbox.stream("1") as events:
        chunk, result = [event async for event in events]
    assert isinstance(chunk, OutputChunk)
    assert chunk.data.startswith(b"Call(kind='run', code='1'")
    assert isinstance(result, RunResult)


async def test_a_process_is_answered_as_the_script_says() -> None:
    async def answer(call: Call) -> Answer:
        return Answer(stdout=call.stdin.upper(), stderr=" ".join(call.argv), exit_code=len(call.argv) - 1)

    async with open_scripted_sandbox(answer) as sandbox:
        completed = await sandbox.run_process(["tr"], stdin=b"a" * 200_000, capture_stdout=True, capture_stderr=True)
        assert (completed.stdout, completed.stderr) == (b"A" * 200_000, b"tr")
        merged = await sandbox.run_process(["tr"], stdin=b"a", capture_stdout=True, stderr_to_stdout=True)
        assert merged.stdout == b"Atr"
        with pytest.raises(subprocess.CalledProcessError) as raised:
            await sandbox.run_process(["tr", "a", "b"])
        assert raised.value.returncode == 2


@pytest.mark.parametrize("reads_input", [False, True])
async def test_a_deadline_stops_the_answer_and_the_sandbox_lives_on(
    reads_input: bool, autojump_clock: trio.testing.MockClock
) -> None:
    stopped: list[str] = []

    async def answer(call: Call) -> Answer:
        if "while True" in call.code:
            try:
                await trio.sleep_forever()
            finally:
                stopped.append(call.code)
        return Answer(stdout="again")

    async with open_scripted_sandbox(answer) as sandbox:
        with trio.move_on_after(10) as scope:
            async with sandbox.stream("while True: pass", stdin=reads_input) as events:
                async for _ in events:
                    pass
        assert scope.cancelled_caught
        assert trio.current_time() - scope.deadline < 1
        assert stopped == ([] if reads_input else ["while True: pass"])  # its input has not ended yet
        assert (await sandbox.run("1")).stdout == "again"


async def test_a_process_can_be_killed_and_signalled() -> None:
    async def answer(call: Call) -> Answer:
        await trio.sleep_forever()
        raise AssertionError

    async with open_scripted_sandbox(answer) as sandbox:
        async with sandbox.open_process(["sleep", "1000"]) as process:
            process.terminate()
            assert await process.wait() == -15
        async with sandbox.open_process(["sleep", "1000"]) as process:
            pass
        assert process.returncode == -9


async def test_limits_are_those_of_the_configuration() -> None:
    async def answer(call: Call) -> Answer:
        return Answer(stdout="y\n" * 1000)

    async with open_scripted_sandbox(answer, config=SandboxConfig(max_output_bytes=100)) as sandbox:
        with pytest.raises(OutputLimitError):
            await sandbox.run("1")
        with pytest.raises(OutputLimitError):
            await sandbox.run("1")


async def test_a_machine_that_dies_is_an_outcome_that_nobody_knows() -> None:
    async def answer(call: Call) -> Answer:
        raise VmDiedError("QEMU was killed")

    async with open_scripted_sandbox(answer) as sandbox:
        with pytest.raises(OutcomeUnknownError) as raised:
            await sandbox.run("1")
        assert isinstance(raised.value.__cause__, VmDiedError)
        with pytest.raises(SandboxClosedError):
            await sandbox.run("2")


async def test_what_is_wrong_in_the_script_comes_out_of_the_block() -> None:
    async def answer(call: Call) -> Answer:
        raise ZeroDivisionError("in the script")

    async def fail() -> None:
        async with open_scripted_sandbox(answer) as sandbox:
            await sandbox.run("1")

    with pytest.raises(ZeroDivisionError, match="in the script"):
        await fail()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("stdout", None, TypeError),
        ("stderr", 5, TypeError),
        ("stdout", "\ud800", ValueError),
        ("exit_code", 256, ValueError),
        ("exit_code", -65, ValueError),
        ("exit_code", True, TypeError),
        ("value", 5, TypeError),
        ("value", "x" * (MAXIMUM_VALUE_BYTES + 1), ValueError),
        ("displays", None, TypeError),
        ("displays", ["text"], TypeError),
        ("displays", (Display("text/plain", "text"),), TypeError),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        ("cpu_seconds", math.nan, ValueError),
        ("cpu_seconds", -0.1, ValueError),
        ("cpu_seconds", "1", TypeError),
        ("peak_memory_bytes", -1, ValueError),
        ("disk_written_bytes", 2**70, ValueError),
        ("state_kept", None, TypeError),
        ("oom", 1, TypeError),
    ],
)
def test_an_answer_that_no_guest_gives_is_refused(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="surrogates" if value == "\ud800" else f"`{field}` m"):
        Answer(**{field: value})  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "the script must return an Answer for run 'x', not None"),
        (Answer(exit_code=-9), "after signal n it is 128"),
    ],
)
async def test_a_script_that_returns_no_answer_is_told_so(wrong: Answer, message: str) -> None:
    async def answer(_call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return wrong

    with pytest.raises((TypeError, ValueError), match=message):
        async with open_scripted_sandbox(answer) as sandbox:
            await sandbox.run("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer": 5}, "`answer` must be a function"),
        ({"before": 5}, "`before` must be a function"),
        ({"config": {}}, "`config` must be a SandboxConfig"),
        ({"state": 5}, "`state` must be a dict"),
        ({"files": {"/a": "text"}}, "the content of the file '/a' must be bytes, not str"),
        ({"files": {5: b""}}, "path must be str, not 5"),
        ({"files": {"/a\0b": b""}}, "must not hold a NUL"),
    ],
)
async def test_arguments_of_a_scripted_sandbox_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        async with open_scripted_sandbox(arguments.pop("answer", print_the_call), **arguments):
            pytest.fail("it was opened")


async def test_scripted_files_can_not_do_what_no_file_can() -> None:
    async with open_scripted_sandbox(print_the_call, files={"/home/user/there/file": b"1"}) as sandbox:
        there = sandbox.path("there")
        await there.rename("there")
        for inside in ("there/inside", "./there/inside", "there/../there/inside"):
            with pytest.raises(OSError, match="Invalid argument"):
                await there.rename(inside)
        await (there / "twin").hardlink_to("there/file")
        await (there / "twin").rename("there/file")
        assert len(list(await there.iterdir())) == 2
        with pytest.raises(OSError, match="name too long"):
            await sandbox.path("x" * 256).write_bytes(b"")
        async with await (there / "file").open("r+b") as file:
            with pytest.raises(OSError, match="Invalid argument"):
                await file.truncate(-1)
            with pytest.raises(OSError, match="too large"):
                await file.truncate(2**60)
            await file.seek(2**60)
            with pytest.raises(OSError, match="too large"):
                await file.write(b"x")
        assert await (there / "file").read_bytes() == b"1"


async def test_who_puts_it_to_sleep_while_its_block_exits_is_told_so() -> None:
    ends: list[str] = []

    async def hibernate(sandbox: Sandbox) -> None:
        try:
            await sandbox.hibernate()
        except SandboxError as exc:
            ends.append(type(exc).__name__)

    async with trio.open_nursery() as nursery:
        for steps in range(30):
            async with open_scripted_sandbox(print_the_call) as sandbox:
                nursery.start_soon(hibernate, sandbox)  # noqa: ASYNC111 - that it outlives the block is the point
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
    assert set(ends) == {"OutcomeUnknownError", "SandboxClosedError"}


async def test_what_is_not_scripted_says_so() -> None:
    async with open_scripted_sandbox(print_the_call) as sandbox:
        with pytest.raises(OutcomeUnknownError, match="has runs, processes and files only"):
            await sandbox.open_tcp_stream(80)
        with pytest.raises(OSError, match="not supported"):
            async with sandbox.watch("/"):
                pytest.fail("it is watched")


async def test_after_the_block_it_is_closed() -> None:
    async with open_scripted_sandbox(print_the_call) as sandbox:
        pass
    with pytest.raises(SandboxClosedError, match="block has exited"):
        await sandbox.run("1")


async def test_it_may_be_cancelled_anywhere() -> None:
    async def use() -> None:
        async with open_scripted_sandbox(print_the_call) as sandbox:
            await sandbox.run("1")
            await sandbox.run_process(["true"])

    assert await cancel_at_every_step(use) > 10


async def test_a_script_calls_the_functions_that_a_run_may_call() -> None:
    async def search(text: str, limit: int = 1) -> list[str]:
        await trio.lowlevel.checkpoint()
        return [text] * limit

    def fail() -> None:
        raise LookupError("why")

    async def answer(call: Call) -> Answer:
        if not call.functions:
            return Answer(stdout="none")
        found = await call.functions["search"]("a", limit=2)
        with pytest.raises(RuntimeError, match=r"^LookupError: why$"):
            await call.functions["fail"]()
        return Answer(stdout=repr([sorted(call.functions), found]))

    async with open_scripted_sandbox(answer) as sandbox:
        assert (await sandbox.run("1")).stdout == "none"
        result = await sandbox.run("1", functions={"search": search, "fail": fail})
    assert result.stdout == "[['fail', 'search'], ['a', 'a']]"


async def test_a_function_that_a_script_calls_is_cancelled_with_the_run() -> None:
    called = trio.Event()

    async def wait() -> None:
        called.set()
        await trio.sleep_forever()

    async def answer(call: Call) -> Answer:
        await call.functions["wait"]()
        return Answer()

    async with open_scripted_sandbox(answer) as sandbox, trio.open_nursery() as nursery:

        async def run() -> None:
            await sandbox.run("1", functions={"wait": wait})

        nursery.start_soon(run)
        await called.wait()
        nursery.cancel_scope.cancel()
    assert sandbox.last_output.outcome == "stopped"


async def test_a_policy_for_the_network_can_be_put_in_force_and_nothing_connects() -> None:
    async with open_scripted_sandbox(print_the_call) as sandbox:
        async with sandbox.network(Network.allow("example.org")):
            await sandbox.run("1")
        with sandbox.watch_network():
            assert sandbox.network_statistics().connections == 0


async def test_a_directory_is_worked_on_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("mine")
    (tmp_path / "a").write_text("one")

    async def work(call: Call) -> Answer:
        call.files["/home/user/work/a"] = b"two"
        call.files["/home/user/work/b"] = b"new"
        call.files["/home/user/work/.git/config"] = b"theirs"
        return Answer()

    asked: list[str] = []
    async with open_scripted_sandbox(work, before=asked.append) as sandbox:
        await sandbox.push(tmp_path, "work")
        assert await sandbox.pull("work", tmp_path) == ()
        await sandbox.run("work()")
        assert [str(change) for change in await sandbox.pull("work", tmp_path)] == ["changed a", "added b"]
    assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / ".git" / "config").read_text() == "mine"
    assert [each for each in asked if each.split()[0] in ("push", "pull")] == [
        "push /home/user/work",
        *["pull /home/user/work"] * 2,
    ]
