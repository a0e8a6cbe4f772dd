"""What a failure shows of what the guest said: results, errors, notes, and the last output of runs that gave no result."""

from __future__ import annotations

import subprocess

import pytest
import trio
import trio.testing

from trio_sandbox import (
    OutcomeUnknownError,
    OutputChunk,
    OutputLimitError,
    ProcessFailedError,
    RunFailedError,
    RunOutput,
    RunRefusedError,
    RunResult,
    SandboxClosedError,
    SandboxConfig,
    VmDiedError,
    constants,
)
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox
from trio_sandbox.wire import STDERR, STDOUT, RecordStream

from ._guest import finished, open_fake_sandbox, receive_json
from ._sandbox import open_local_sandbox

TRACEBACK = b"Traceback ...\nZeroDivisionError: division by zero\n"


async def print_and_wait(records: RecordStream) -> None:
    """A guest whose code prints a line to each stream, and goes on until it is interrupted."""
    request = await receive_json(records)
    await records.send(STDOUT, f"out of {request['code']}\n".encode())
    await records.send(STDERR, b"err\n")
    if await receive_json(records) == {"interrupt": True}:
        await records.send(STDERR, b"KeyboardInterrupt\n")
        await records.send_json(finished(130), end=True)


async def test_a_run_that_fails_is_an_error_only_for_who_asks() -> None:
    async def script(_: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(exit_code=1, stdout="before", stderr=TRACEBACK)

    async with open_scripted_sandbox(script) as sandbox:
        assert not (await sandbox.run("1/0")).ok
        with pytest.raises(RunFailedError, match=r"ZeroDivisionError: division by zero") as caught:
            await sandbox.run("1/0", check=True)
        assert caught.value.result.stdout == "before"
        async with sandbox.stream("1/0") as events:
            *_, last = [event async for event in events]
        assert isinstance(last, RunResult)
        with pytest.raises(RunFailedError, match="ZeroDivisionError"):
            last.check()


@pytest.mark.parametrize("limit", [2, 16 * 2**20])
async def test_want_of_memory_is_said_whatever_the_limit_on_output(limit: int) -> None:
    async def script(call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(exit_code=137 if call.kind == "run" else -9, stderr="no", state_kept=False, oom=True)

    line = "trio-sandbox: the code was killed because the sandbox is out of memory (memory_mib=192)\n"
    config = SandboxConfig(memory_mib=192, max_output_bytes=limit)
    async with open_scripted_sandbox(script, config=config) as sandbox:
        result = await sandbox.run("x = ' ' * 10**12")
        assert (result.oom, result.exit_code, result.stderr) == (True, 137, "no" + line)
        async with sandbox.stream("x = ' ' * 10**12") as events:
            first, last_word, end = [event async for event in events]
        assert (first, last_word) == (OutputChunk("stderr", b"no"), OutputChunk("stderr", line.encode()))
        assert isinstance(end, RunResult)
        assert (end.oom, end.stderr) == (True, "no" + line)
        with pytest.raises(ProcessFailedError, match=r"SIGKILL \(out of memory\)") as caught:
            await sandbox.run_process(["hog"])
        assert caught.value.oom
        async with sandbox.open_process(["hog"], stdin=False) as process:
            assert await process.wait() == -9
            assert process.oom
            assert "out of memory" in repr(process)


async def test_the_result_of_a_stream_has_a_bounded_end_of_the_output() -> None:
    size = constants.OUTPUT_TAIL_BYTES

    async def script(_: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(stdout=b"a" * 10 * size + b"b" * size, stderr="short")

    async with open_scripted_sandbox(script) as sandbox:
        async with sandbox.stream("print") as events:
            *_, last = [event async for event in events]
        assert isinstance(last, RunResult)
        assert last.streamed
        assert (last.stdout_bytes, last.stderr) == (b"b" * size, "short")
        result = await sandbox.run("print")
        assert (len(result.stdout_bytes), result.streamed) == (11 * size, False)


async def test_what_was_printed_before_a_deadline_can_be_had(autojump_clock: trio.testing.MockClock) -> None:
    async with open_fake_sandbox({"code": print_and_wait}) as (sandbox, _):
        before = sandbox.last_output.outcome
        with pytest.raises(trio.TooSlowError), trio.fail_after(1):
            await sandbox.run("one")
        last = sandbox.last_output
        assert last == RunOutput(
            language="python",
            outcome="stopped",
            exit_code=130,
            stdout_bytes=b"out of one\n",
            stderr_bytes=b"err\nKeyboardInterrupt\n",
        )
        assert before == "unsent"
        assert (last.stdout, last.stderr) == ("out of one\n", "err\nKeyboardInterrupt\n")


async def test_the_last_output_is_that_of_the_task_that_asks(autojump_clock: trio.testing.MockClock) -> None:
    seen: dict[str, RunOutput] = {}

    async with open_fake_sandbox({"code": print_and_wait}) as (sandbox, _):

        async def run(name: str, seconds: float, look_at: float) -> None:
            with trio.move_on_after(seconds):
                await sandbox.run(name)
            await trio.sleep_until(look_at)
            seen[name] = sandbox.last_output

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "first", 1, 10)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(run, "second", 2, 5)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(run, "third", 1.5, 5)  # cancelled while the second runs
        last_of_all = sandbox.last_output  # this task has run nothing
        assert [output.stdout for output in sandbox.recent_runs()] == ["out of first\n", "out of second\n"]
    outputs = {name: (output.outcome, output.stdout) for name, output in seen.items()}
    assert outputs == {
        "first": ("stopped", "out of first\n"),
        "second": ("stopped", "out of second\n"),
        "third": ("unsent", ""),
    }
    assert last_of_all.stdout == "out of second\n"


async def test_the_last_output_says_what_became_of_the_run() -> None:
    async def code(records: RecordStream) -> None:
        match (await receive_json(records))["code"]:
            case "ends":
                await records.send_json(finished(3), end=True)
            case "refused":
                await records.send_json({"failed": {"errno": 2, "strerror": "no", "filename": None}}, end=True)
            case "given up":
                await records.send(STDOUT, b"some")
                records.stream.reset("no")
            case other:
                pytest.fail(f"nobody asked for {other}")

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        seen: list[object] = []
        for text, error in (("ends", None), ("refused", RunRefusedError), ("given up", OutcomeUnknownError)):
            if error is None:
                await sandbox.run(text)
            else:
                with pytest.raises(error):
                    await sandbox.run(text)
            seen.append((sandbox.last_output.outcome, sandbox.last_output.exit_code))
        machine.retire("a test")
        with pytest.raises(SandboxClosedError):
            await sandbox.run("ends")
        assert sandbox.last_output.outcome == "unsent"
    assert seen == [("ended", 3), ("refused", None), ("broken", None)]


async def test_errors_of_ours_have_what_was_printed_as_notes() -> None:
    async def script(call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(stdout=b"\x1b[2J" * 100, stderr="why")

    async with open_scripted_sandbox(script, config=SandboxConfig(max_output_bytes=50)) as sandbox:
        with pytest.raises(OutputLimitError) as caught:
            await sandbox.run("print")
    (note,) = caught.value.__notes__
    assert note.startswith("the end of what the run printed to stdout:\n| \\x1b[2J")
    assert "\x1b" not in note


async def test_a_machine_that_ends_in_a_run_leaves_what_was_printed() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.send(STDERR, b"last words\n")
        await records.stream.receive_some()

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        with pytest.raises(OutcomeUnknownError) as caught:
            async with sandbox.stream("work") as events:
                assert await events.__anext__() == OutputChunk("stderr", b"last words\n")
                machine.retire("a test")
                await events.__anext__()
        assert isinstance(caught.value.__cause__, VmDiedError)
        assert caught.value.__notes__ == ["the end of what the run printed to stderr:\n| last words"]
        assert (sandbox.last_output.outcome, sandbox.last_output.stderr) == ("broken", "last words\n")


async def test_a_process_that_fails_explains_itself_captured_or_not() -> None:
    command = ["/bin/sh", "-c", "echo out; echo why >&2; exit 3"]
    async with open_local_sandbox() as (sandbox, _):
        with pytest.raises(
            subprocess.CalledProcessError, match=r"exit status 3; the end of its stderr:\n\| why$"
        ) as caught:
            await sandbox.run_process(command)
        assert isinstance(caught.value, ProcessFailedError)
        assert (caught.value.stdout, caught.value.stderr, caught.value.stderr_tail) == (None, None, b"why\n")
        with pytest.raises(ProcessFailedError, match=r"\| why$") as caught:
            await sandbox.run_process(command, capture_stderr=True)
        assert (caught.value.stderr, caught.value.stderr_tail) == (b"why\n", b"why\n")
        with pytest.raises(ProcessFailedError, match=r"\| out\n\| why$") as caught:
            await sandbox.run_process(command, capture_stdout=True, stderr_to_stdout=True)
        assert caught.value.stdout == b"out\nwhy\n"
        with pytest.raises(ProcessFailedError, match="its stderr is empty"):
            await sandbox.run_process(["/bin/false"])
        assert (await sandbox.run_process(command, check=False)).returncode == 3


async def test_a_process_is_not_waited_for_by_way_of_what_it_left_in_the_background() -> None:
    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run_process(["/bin/sh", "-c", "sleep 3600 & exit 0"])
        with pytest.raises(ProcessFailedError, match=r"\| why$"):
            await sandbox.run_process(["/bin/sh", "-c", "sleep 3600 & echo why >&2; exit 1"])


async def test_a_process_that_prints_without_end_is_not_kept() -> None:
    async with open_local_sandbox() as (sandbox, _):
        with pytest.raises(ProcessFailedError) as caught:
            await sandbox.run_process(["/bin/sh", "-c", "head -c 3000000 /dev/zero >&2; exit 1"])
    assert len(caught.value.stderr_tail) == constants.OUTPUT_TAIL_BYTES


async def test_a_server_whose_log_is_discarded_never_waits_for_a_reader() -> None:
    async with open_local_sandbox() as (sandbox, _):
        command = ["/bin/sh", "-c", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2"]
        async with sandbox.open_process(command, stdin=False, stdout=False, stderr="discard") as process:
            assert await process.wait() == 0
