"""Runs against a scripted guest: results, limits, cancellation, and guests that break the rules."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step, count_steps
from trio_sandbox import (
    Display,
    GuestProtocolError,
    OutcomeUnknownError,
    OutputChunk,
    OutputLimitError,
    RunRefusedError,
    RunResult,
    SandboxClosedError,
    SandboxConfig,
    Timeouts,
)
from trio_sandbox.client._failures import guest_failures
from trio_sandbox.wire import DISPLAY, JSON, STDERR, STDOUT, RecordStream, encode_json

from ._guest import finished, open_fake_sandbox, receive_json

Requests = list[Any]

#: What comes before a display of two bytes.
SHOWN = b'{"display": {"mime": "image/png", "size": 2, "item": 0}}'


async def echo(records: RecordStream) -> None:
    """A guest that prints the code it is given."""
    request = await receive_json(records)
    await records.send(STDOUT, request["code"].encode())
    await records.send_json(finished(), end=True)


async def test_a_run_gathers_each_stream_in_order_and_tells_how_it_ended() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for tag, data in [(STDOUT, b"a"), (STDERR, b"b\xff"), (STDOUT, b"c"), (STDERR, b"d")]:
            await records.send(tag, data)
        await records.send_json(finished(3, restarted=True, state_kept=True), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        result = await sandbox.run("whatever")
    assert (result.stdout_bytes, result.stderr_bytes) == (b"ac", b"b\xffd")
    assert (result.stdout, result.stderr) == ("ac", "b�d")
    assert (result.exit_code, result.restarted, result.state_kept) == (3, True, True)
    assert result.duration >= 0
    assert result.accelerator == "tcg"


async def test_a_run_waits_for_its_answer_and_takes_no_other_turn_of_the_scheduler() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        end = encode_json(finished())
        await records.send_and_close([(STDOUT, b"a"), (STDERR, b"b"), (STDOUT, b"c"), (JSON, end)])

    async def run() -> None:
        result = await sandbox.run("whatever")
        assert (result.stdout, result.stderr) == ("ac", "b")

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        with trio.CancelScope(shield=True):  # from the deadline of every test, which a task of its own would follow
            assert await count_steps(run) == 1


async def test_the_request_carries_code_language_environment_and_directory() -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        requests.append(await receive_json(records))
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}, config=SandboxConfig(max_output_bytes=100)) as (sandbox, _):
        with trio.CancelScope(shield=True):  # from the deadline of every test
            await sandbox.run("x = '\ud800'", env={"A": "ü"}, cwd="/tmp")
    assert requests == [
        {
            "language": "python",
            "code": "x = '\ud800'",
            "env": {"A": "ü"},
            "cwd": "/tmp",
            "display_limit": 100,
        }
    ]


async def test_events_come_in_order_and_the_result_is_the_last() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.send(STDERR, b"1")
        await records.send(STDOUT, b"2")
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _), sandbox.stream("code") as events:
        first, second, last = [event async for event in events]
    assert (first, second) == (OutputChunk("stderr", b"1"), OutputChunk("stdout", b"2"))
    assert isinstance(last, RunResult)
    assert (last.stdout_bytes, last.stderr_bytes, last.streamed, last.exit_code) == (b"2", b"1", True, 0)


async def show(records: RecordStream, mime: str, size: int, item: int, *pieces: bytes) -> None:
    await records.send_json({"display": {"mime": mime, "size": size, "item": item}})
    for data in pieces:
        await records.send(DISPLAY, data)


async def test_a_run_gathers_what_was_shown_and_the_last_value() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await show(records, "image/png", 3, 0, b"a", b"bc")
        await records.send(STDOUT, b"between")
        await show(records, "text/html", 3, 1, "<\u00fc".encode())
        await show(records, "text/plain", 0, 1)
        await records.send_json(finished(value="[1]"), end=True)

    shown = (Display("image/png", b"abc"), Display("text/html", "<\u00fc".encode(), 1), Display("text/plain", b"", 1))
    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        result = await sandbox.run("whatever")
        assert (result.stdout, result.value, result.displays) == ("between", "[1]", shown)
        assert result.displays[1].text == "<\u00fc"
        assert "3 displays" in repr(result)
        async with sandbox.stream("whatever") as events:
            first, *others, last = [event async for event in events]
        assert (first, *others) == (shown[0], OutputChunk("stdout", b"between"), *shown[1:])
        assert isinstance(last, RunResult)
        assert (last.value, last.displays) == ("[1]", ())


async def test_a_reader_cancelled_in_the_middle_of_a_display_loses_nothing() -> None:
    go_on = trio.Event()

    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await show(records, "image/png", 3, 0, b"a")
        await go_on.wait()
        await records.send(DISPLAY, b"bc")
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _), sandbox.stream("whatever") as events:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(events.__anext__)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel(reason="a test")
        go_on.set()
        assert await events.__anext__() == Display("image/png", b"abc")


async def test_a_display_larger_than_the_limit_stops_the_run_and_is_not_sent() -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.send(STDERR, b"before")
        await show(records, "text/html", 2, 0, b"ok")
        await show(records, "image/png", 101, 1)
        requests.append(await receive_json(records))
        await show(records, "image/png", 102, 2)
        await show(records, "image/png", 4, 2, b"late")
        await records.send_json(finished(130), end=True)

    async with open_fake_sandbox({"code": code}, config=SandboxConfig(max_output_bytes=100)) as (sandbox, machine):
        with pytest.raises(OutputLimitError, match=r"image/png of 101 bytes, of which 100 are allowed") as caught:
            await sandbox.run("whatever")
        assert (caught.value.stdout_bytes, caught.value.stderr_bytes) == (b"", b"before")
        assert caught.value.displays == (Display("text/html", b"ok"),)
        # Whoever reads them one by one may go on.
        async with sandbox.stream("whatever") as events:
            seen: list[object] = []
            while not seen or not isinstance(seen[-1], RunResult):
                try:
                    seen.append(await events.__anext__())
                except OutputLimitError:
                    seen.append("too large")
                    await events._send_request({"interrupt": True})
        assert [type(event).__name__ for event in seen] == [
            *("OutputChunk", "Display", "str", "str", "Display", "RunResult")
        ]
        assert machine.failure is None
    assert requests == [{"interrupt": True}] * 2


@pytest.mark.parametrize(
    ("sizes", "words"), [([60, 40, 1], "showed more than 100 bytes"), ([0] * 1001, "more than 1000 objects")]
)
async def test_displays_are_limited_together_as_well(sizes: list[int], words: str) -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for item, size in enumerate(sizes):
            await show(records, "image/png", size, item, *[b"x" * size for _ in range(size > 0)])
        assert await receive_json(records) == {"interrupt": True}
        await records.send_json(finished(130), end=True)

    async with open_fake_sandbox({"code": code}, config=SandboxConfig(max_output_bytes=100)) as (sandbox, machine):
        with pytest.raises(OutputLimitError, match=words) as caught:
            await sandbox.run("whatever")
        assert len(caught.value.displays) == len(sizes) - 1
        assert machine.failure is None


async def test_a_run_reads_what_it_is_given() -> None:
    received: list[bytes] = []
    pipes: dict[int, RecordStream] = {}

    async def pipe(records: RecordStream) -> None:
        pipes[records.stream.id] = records
        await trio.sleep_forever()

    async def code(records: RecordStream) -> None:
        request = await receive_json(records)
        stream = pipes[request["stdin"]].stream
        received.append(b"".join([data async for data in stream]))
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code, "pipe": pipe}) as (sandbox, _):
        await sandbox.run("read", stdin=b"x" * 1_000_000)
        await sandbox.run("read", stdin=memoryview(bytearray(b"view")))
        async with sandbox.stream("read", stdin=True) as events:
            assert events.stdin is not None
            await events.stdin.send_all(b"one, ")
            await events.stdin.send_all(b"two")
            await events.stdin.aclose()
            assert isinstance(await events.__anext__(), RunResult)
    assert received == [b"x" * 1_000_000, b"view", b"one, two"]


async def test_input_that_nobody_reads_delays_no_result() -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        requests.append(await receive_json(records))
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        await sandbox.run("pass", stdin=b"x" * 1_000_000)
        async with sandbox.stream("pass") as events:
            assert events.stdin is None
            await events.__anext__()
    assert ["stdin" in request for request in requests] == [True, False]


@pytest.mark.parametrize("stdin", ["text", True, None, 5])
async def test_input_of_other_kinds_is_refused_before_anything_is_sent(stdin: Any) -> None:
    async with open_fake_sandbox({"code": echo}) as (sandbox, _):
        with pytest.raises(TypeError, match="`stdin` must be bytes"):
            await sandbox.run("work", stdin=stdin)
        assert sandbox.statistics().runs == 0


async def test_runs_of_several_tasks_take_turns() -> None:
    running = 0

    async def code(records: RecordStream) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await echo(records)
        running -= 1

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        results: list[str] = []

        async def run(text: str) -> None:
            results.append((await sandbox.run(text)).stdout)

        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(run, str(n))
        assert sorted(results) == list("01234")
        assert sandbox.statistics().runs == 5


@pytest.mark.parametrize("tag", [STDOUT, STDERR])
async def test_a_run_that_prints_too_much_is_stopped_and_what_came_is_kept(tag: bytes) -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for _ in range(4):
            await records.send(tag, b"x" * 30)
        requests.append(await receive_json(records))
        await records.send_json(finished(1), end=True)

    async with open_fake_sandbox({"code": code}, config=SandboxConfig(max_output_bytes=100)) as (sandbox, machine):
        with pytest.raises(OutputLimitError, match="more than 100 bytes") as caught:
            await sandbox.run("flood")
        assert machine.failure is None
    assert requests == [{"interrupt": True}]
    kept, other = caught.value.stdout_bytes, caught.value.stderr_bytes
    assert {kept, other} == {b"x" * 100, b""}
    assert not caught.value.retry_safe


async def test_output_of_exactly_the_limit_is_no_error() -> None:
    async with open_fake_sandbox({"code": echo}, config=SandboxConfig(max_output_bytes=5)) as (sandbox, _):
        assert (await sandbox.run("12345")).stdout == "12345"


async def test_a_cancelled_run_is_interrupted_and_the_sandbox_lives_on(autojump_clock: trio.testing.MockClock) -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        if (await receive_json(records))["code"] == "fine":
            await records.send_json(finished(), end=True)
            return
        await records.send(STDOUT, b"on its way")
        requests.append(await receive_json(records))
        await records.send(STDOUT, b"KeyboardInterrupt")
        await records.send_json(finished(1), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        start = trio.current_time()
        with trio.move_on_after(1) as scope:
            await sandbox.run("forever")
        assert scope.cancelled_caught
        assert trio.current_time() - start == 1
        assert requests == [{"interrupt": True}]
        assert (await sandbox.run("fine")).exit_code == 0
        assert machine.failure is None


async def test_what_ignores_the_interrupt_is_killed_after_the_grace(autojump_clock: trio.testing.MockClock) -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for _ in range(2):
            requests.append((trio.current_time() - start, await receive_json(records)))
        await records.send_json(finished(137, state_kept=False), end=True)

    async with open_fake_sandbox({"code": code}, timeouts=Timeouts(interrupt_grace=2)) as (sandbox, machine):
        start = trio.current_time()
        with trio.move_on_after(1):
            await sandbox.run("ignores SIGINT")
        assert trio.current_time() - start == 3
        assert [request for _, request in requests] == [{"interrupt": True}, {"kill": True}]
        assert machine.failure is None


async def test_a_guest_that_ignores_the_kill_loses_its_machine_in_bounded_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def code(records: RecordStream) -> None:
        while await receive_json(records) is not None:
            pass

    timeouts = Timeouts(interrupt_grace=2, kill=4)
    async with open_fake_sandbox({"code": code}, timeouts=timeouts) as (sandbox, machine):
        start = trio.current_time()
        with trio.move_on_after(1):
            await sandbox.run("wedged")
        assert trio.current_time() - start == 1 + 2 + 4
        assert "did not end when it was killed" in str(machine.failure)
        with pytest.raises(SandboxClosedError, match="was not sent") as caught:
            await sandbox.run("again")
        assert caught.value.__cause__ is machine.failure
        assert caught.value.retry_safe


async def test_a_run_cancelled_while_it_waits_its_turn_was_never_sent(autojump_clock: trio.testing.MockClock) -> None:
    started: list[str] = []

    async def code(records: RecordStream) -> None:
        started.append((await receive_json(records))["code"])
        await trio.sleep(10)
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _), trio.open_nursery() as nursery:
        nursery.start_soon(sandbox.run, "first")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await sandbox.run("second")
    assert started == ["first"]


async def test_cancelled_at_every_step_a_run_leaves_the_sandbox_usable() -> None:
    async def code(records: RecordStream) -> None:
        request = await receive_json(records)
        if request is None:
            return
        await records.send(STDOUT, request["code"].encode())
        await records.send_json(finished(), end=True)
        while await records.receive() is not None:
            pass

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        assert await cancel_at_every_step(lambda: sandbox.run("work")) > 3
        assert (await sandbox.run("probe")).stdout == "probe"
        assert machine.failure is None


@pytest.mark.parametrize(
    ("records_sent", "words"),
    [
        ([(JSON, b"garbage")], "not JSON"),
        ([(JSON, b'{"started": 1}')], "answered a run with Started"),
        ([(b"?", b"")], "unknown kind b'\\?'"),
        ([(DISPLAY, b"x")], "unknown kind b'D'"),
        ([(JSON, SHOWN), (STDOUT, b"x")], "in the middle of a display"),
        ([(JSON, SHOWN), (DISPLAY, b"")], "other than the 2 bytes of a display"),
        ([(JSON, SHOWN), (DISPLAY, b"xyz")], "other than the 2 bytes of a display"),
        ([(JSON, SHOWN), (DISPLAY, b"x")], "without saying how"),
        ([(JSON, SHOWN.replace(b"2", b"-2"))], "'size' must be from 0"),
        ([], "without saying how"),
        ([(STDOUT, b"x")], "without saying how"),
    ],
)
async def test_a_guest_that_breaks_the_rules_loses_its_machine(
    records_sent: list[tuple[bytes, bytes]], words: str
) -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for tag, payload in records_sent:
            await records.send(tag, payload)
        await records.send_eof()
        await trio.sleep_forever()

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError, match=words) as caught:
            await sandbox.run("work")
        assert machine.failure is not None
        assert not caught.value.retry_safe
        with pytest.raises(SandboxClosedError):
            await sandbox.run("more")


async def test_a_record_without_end_is_refused_before_it_is_stored() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.stream.send_all(b"J\xff\xff\xff\xff" + b"x" * 1000)
        await trio.sleep_forever()

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError, match="4294967295 bytes"):
            await sandbox.run("work")
        assert machine.failure is not None


async def test_a_machine_that_dies_in_the_middle_leaves_the_outcome_unknown() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.send(STDOUT, b"half")
        machine.retire("QEMU was killed")
        await trio.sleep_forever()

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        with pytest.raises(OutcomeUnknownError, match="may have had its effect") as caught:
            await sandbox.run("work")
        assert caught.value.__cause__ is machine.failure
        assert not caught.value.retry_safe


async def test_what_the_guest_refuses_to_run_is_an_error_that_may_be_retried() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await records.send_json({"failed": {"errno": 0, "strerror": "no interpreter for 'cobol'"}}, end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, machine):
        with pytest.raises(RunRefusedError, match="cobol") as caught:
            await sandbox.run("work", language="cobol")
        assert caught.value.retry_safe
        assert machine.failure is None


async def test_a_directory_that_is_not_there_is_named() -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        failed = {"errno": errno.ENOENT, "strerror": "No such file or directory", "filename": "/none"}
        await records.send_json({"failed": failed}, end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        with pytest.raises(RunRefusedError, match=r"No such file or directory: '/none'$"):
            await sandbox.run("work", cwd="/none")


async def test_a_language_without_a_name_is_not_that_of_the_image() -> None:
    requests: Requests = []

    async def code(records: RecordStream) -> None:
        requests.append(await receive_json(records))
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        await sandbox.run("work", language="")
        with pytest.raises(TypeError, match="`language` must be str, not int"):
            await sandbox.run("work", language=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert [request["language"] for request in requests] == [""]


async def test_a_channel_that_closed_after_its_machine_was_ended_tells_why() -> None:
    async with open_fake_sandbox({"code": echo}) as (_, machine):
        machine.retire("the sandbox was reverted to a checkpoint")
        with pytest.raises(OutcomeUnknownError, match="may have had its effect") as caught:
            async with guest_failures(machine, "the process"):
                raise trio.ClosedResourceError
        assert caught.value.__cause__ is machine.failure


async def test_a_run_in_the_block_of_a_run_would_wait_for_itself() -> None:
    async with open_fake_sandbox({"code": echo}) as (sandbox, _):
        async with sandbox.stream("outer") as events:
            with pytest.raises(RuntimeError, match="in the block of another run of this sandbox"):
                await sandbox.run("inner")
            received = [event async for event in events]
        assert received[0] == OutputChunk("stdout", b"outer")
        assert (await sandbox.run("after")).stdout == "after"


async def test_a_sandbox_whose_block_was_left_sends_nothing() -> None:
    async with open_fake_sandbox({"code": echo}) as (sandbox, _):
        pass
    with pytest.raises(SandboxClosedError, match="block has exited"):
        await sandbox.run("work")
    assert "closed" in repr(sandbox)
