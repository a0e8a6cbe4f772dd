"""Spans, numbers and the ids of log records, of sandboxes on fake machines."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from opentelemetry import context, metrics, trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

import trio_sandbox
from tests._leaks import cancel_at_every_step
from tests._telemetry import Telemetry, attributes_of, of_its_own, telemetry
from trio_sandbox import (
    CapacityError,
    Host,
    NetworkEvent,
    OutputLimitError,
    RunFailedError,
    RunRefusedError,
    RunTimings,
    Sandbox,
    SandboxConfig,
    SandboxError,
    VmBootError,
    aio,
    blocking,
)
from trio_sandbox._observe import UNSEEN, add_span, is_observed, measure, part_logger, record, serving, span
from trio_sandbox._otel import INSTRUMENTS
from trio_sandbox.aio._door import open_root as open_aio
from trio_sandbox.blocking._door import open_root as open_blocking
from trio_sandbox.client import RunTrace
from trio_sandbox.network._connections import Outcome
from trio_sandbox.network._journal import Journal
from trio_sandbox.sandbox import ObservedSandbox
from trio_sandbox.sandbox._observed import run_span
from trio_sandbox.wire import DISPLAY, JSON, STDERR, STDOUT, RecordStream

from ._guest import finished, open_fake_sandbox, receive_json
from ._host import open_fake_host
from ._sandbox import open_local_sandbox
from .test_lifecycle import open_site

#: What must never be told: code, output, names that a guest chooses.
SECRET = "tr0ub4dor"


@pytest.fixture
def seen() -> Generator[Telemetry]:
    with telemetry() as seen:
        yield seen


@pytest.fixture
async def host(tmp_path: Path) -> AsyncGenerator[Host]:
    async with open_fake_host(tmp_path) as host:
        yield host


async def echo(records: RecordStream) -> None:
    """A guest that prints the code it is given."""
    request = await receive_json(records)
    await records.send(STDOUT, request["code"].encode())
    await records.send_json(finished(), end=True)


def nothing_secret(seen: Telemetry) -> bool:
    """Whether nothing that was told has the secret in it."""
    numbers = [attributes for name in INSTRUMENTS for attributes, _ in seen.numbers(name)]
    return SECRET not in "".join(each.to_json() for each in seen.spans()) + json.dumps(numbers)


# --- Spans ---


async def test_a_start_from_a_template_is_told_part_by_part_as_the_tasks_are_nested(
    seen: Telemetry, host: Host
) -> None:
    async with host.open_sandbox("python", memory_mib=128):
        pass
    async with host.open_sandbox("python", memory_mib=128) as sandbox:
        result = await sandbox.run(SECRET)
    assert result.ok
    first, second = seen.spans("sandbox")
    assert [seen.path(each) for each in seen.spans("boot")] == [["sandbox", "start", "template", "boot"]]
    assert {key: attributes_of(first)[key] for key in ("kind", "image", "memory_mib", "vcpus", "outcome")} == {
        "kind": "template",
        "image": "python",
        "memory_mib": 128,
        "vcpus": 1,
        "outcome": "ok",
    }
    assert attributes_of(second)["sandbox_id"] == sandbox.id != attributes_of(first)["sandbox_id"]
    assert [seen.path(each) for each in seen.within(second)] == [
        ["sandbox"],
        ["sandbox", "start"],
        ["sandbox", "start", "admit"],
        ["sandbox", "start", "restore"],
        ["sandbox", "start", "restore", "qemu"],
        ["sandbox", "start", "restore", "load"],
        ["sandbox", "start", "restore", "hello"],
        ["sandbox", "run"],
        ["sandbox", "teardown"],
    ]
    assert nothing_secret(seen)


async def test_forks_are_told_inside_the_fork_and_their_runs_inside_them(seen: Telemetry, host: Host) -> None:
    async with host.open_sandbox("python", memory_mib=128) as sandbox:
        async with sandbox.fork(2) as children:
            for child in children:
                await child.run("1")
        await sandbox.run("2")
    forks = [each for each in seen.spans("sandbox") if attributes_of(each)["kind"] == "fork"]
    assert [seen.path(each) for each in forks] == [["sandbox", "fork", "sandbox"]] * 2
    assert {attributes_of(each)["sandbox_id"] for each in forks} == {child.id for child in children}
    # Whose task runs them is in the block of the first sandbox.
    assert [attributes_of(each)["sandbox_id"] for each in seen.spans("run")] == [
        *(child.id for child in children),
        sandbox.id,
    ]
    assert seen.total("starts", kind="fork") == 2


async def test_a_start_that_fails_is_told_with_its_kind_of_error(seen: Telemetry, host: Host) -> None:
    with pytest.raises(CapacityError):
        async with host.open_sandbox("python", memory_mib=2**20):
            pass
    with trio.CancelScope() as scope:
        scope.cancel(reason="a test")
        async with host.open_sandbox("python", memory_mib=128):
            pass
    failed, cancelled = seen.spans("sandbox")
    assert (attributes_of(failed)["outcome"], attributes_of(failed)["error.type"]) == ("error", "CapacityError")
    assert attributes_of(failed)["kind"] == "template", "what it was to be"
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert attributes_of(cancelled)["outcome"] == "cancelled"
    assert cancelled.status.status_code is trace.StatusCode.UNSET
    assert trace.get_current_span() is trace.INVALID_SPAN, "nothing is left behind"
    assert [seen.total("starts", outcome=outcome) for outcome in ("ok", "error", "cancelled")] == [0, 1, 1]
    assert seen.total("sandboxes.open") == 0


async def test_an_error_of_the_users_block_tells_no_more_than_its_kind(seen: Telemetry, host: Host) -> None:
    with pytest.raises(ValueError, match=SECRET):
        async with host.open_sandbox("python", memory_mib=128):
            raise ValueError(SECRET)
    whole = seen.span("sandbox")
    assert (attributes_of(whole)["error.type"], list(whole.events)) == ("ValueError", [])
    assert seen.total("starts", outcome="ok") == 1, "it did start"
    assert attributes_of(seen.span("teardown"))["outcome"] == "ok", "it did end well"
    assert nothing_secret(seen)


async def test_a_run_tells_when_its_first_output_came_and_how_it_ended(seen: Telemetry) -> None:
    async with open_fake_sandbox({"code": echo}) as (sandbox, _):
        with trace.get_tracer("the program's").start_as_current_span("trio_sandbox.request"):
            result = await sandbox.run(SECRET)
    assert result.stdout == SECRET
    assert [seen.path(each) for each in seen.spans()] == [
        ["request"],
        ["request", "run"],
        ["request", "run", "first_output"],
    ]
    assert attributes_of(seen.span("run")) == {
        "sandbox_id": sandbox.id,
        "run_id": f"{sandbox.id}.1",
        "language": "python",
        "code_characters": len(SECRET),
        "exit_code": 0,
        "outcome": "ended",
    }
    assert nothing_secret(seen)
    run, first = seen.span("run"), seen.span("first_output")
    assert run.start_time <= first.start_time <= first.end_time <= run.end_time  # type: ignore[operator]


class Counted(SpanProcessor):
    """Counts spans that are not over."""

    def __init__(self) -> None:
        self.open = 0

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        self.open += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.open -= 1


async def test_wherever_a_sandbox_and_a_run_are_cancelled_all_spans_are_over_and_none_is_current() -> None:
    counted = Counted()

    async def use() -> None:
        with ObservedSandbox("python", SandboxConfig(), "boot") as observed:
            async with open_fake_sandbox({"code": echo}) as (sandbox, _):
                with observed.body():
                    await sandbox.run("1")

    def check() -> None:
        assert counted.open == 0
        assert trace.get_current_span() is trace.INVALID_SPAN
        assert told.total("sandboxes.open") == 0

    with telemetry(counted) as told:
        steps = await cancel_at_every_step(use, check=check)
        assert steps > 5
        assert told.total("starts") == steps


@pytest.mark.parametrize(
    ("answer", "error", "outcome"),
    [
        (
            [(JSON, b'{"failed": {"errno": 2, "strerror": "tr0ub4dor", "filename": "node"}}')],
            RunRefusedError,
            "refused",
        ),
        ([(STDERR, b"tr0ub4dor"), finished(1)], RunFailedError, "ended"),
        ([(STDOUT, bytes(100))], OutputLimitError, "stopped"),
        ([(b"?", b"tr0ub4dor")], SandboxError, "broken"),
    ],
)
async def test_a_run_that_goes_wrong_tells_how_and_nothing_of_what_it_said(
    answer: list[tuple[bytes, bytes] | dict[str, object]], error: type[Exception], outcome: str, seen: Telemetry
) -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        for each in answer:
            if isinstance(each, tuple):
                await records.send(*each)
            else:
                await records.send_json(each, end=True)
        while (request := await receive_json(records)) is not None:
            if "interrupt" in request:
                await records.send_json(finished(130), end=True)

    async with open_fake_sandbox({"code": code}, config=SandboxConfig(max_output_bytes=10)) as (sandbox, _):
        with pytest.raises(error):
            await sandbox.run(SECRET, check=True)
    assert attributes_of(seen.span("run"))["outcome"] == outcome
    assert seen.total("runs", outcome=outcome, language="python") == 1
    assert nothing_secret(seen)


async def test_runs_of_other_tasks_are_where_these_are(seen: Telemetry) -> None:
    """Each task has a context of its own, which is a copy of its parent's."""

    async def work(name: str) -> None:
        with trace.get_tracer("the program's").start_as_current_span(f"trio_sandbox.{name}"):
            await sandbox.run(name)

    async with open_fake_sandbox({"code": echo}) as (sandbox, _), trio.open_nursery() as nursery:
        for name in ("left", "right"):
            nursery.start_soon(work, name)
    assert sorted(seen.path(each) for each in seen.spans("run")) == [["left", "run"], ["right", "run"]]


async def test_what_a_function_of_the_host_does_is_inside_the_run(seen: Telemetry) -> None:
    def search() -> None:
        with trace.get_tracer("the program's").start_as_current_span("trio_sandbox.search"):
            pass

    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run("search()", functions={"search": search}, check=True)
    assert seen.path(seen.span("search")) == ["run", "search"]


async def test_a_process_tells_its_status_and_not_its_arguments(seen: Telemetry) -> None:
    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run_process(["sh", "-c", f"exit 3 # {SECRET}"], check=False)
    assert attributes_of(seen.span("process")) == {"sandbox_id": sandbox.id, "exit_status": 3, "outcome": "ok"}
    assert nothing_secret(seen)


async def test_decisions_about_the_network_are_told_in_the_sandboxes_span_without_names(
    seen: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    with ObservedSandbox("python", SandboxConfig(), "boot") as observed, observed.body():
        journal = Journal()
        journal.context = observed.context
    # Whatever task carries it out.
    outcomes: list[Outcome] = ["closed", "refused by policy"]
    for outcome in outcomes:
        journal.tell(
            NetworkEvent(
                host=SECRET,
                port=443,
                address=None,
                outcome=outcome,
                error=SECRET,
                started=0.0,
                duration=2.0,
                bytes_sent=3,
                bytes_received=4,
            )
        )
    closed, refused = sorted(seen.spans("network"), key=lambda each: str(attributes_of(each)["outcome"]))
    assert seen.path(refused) == ["sandbox", "network"]
    assert attributes_of(closed) == {"outcome": "closed", "bytes_sent": 3, "bytes_received": 4}
    assert closed.end_time is not None
    assert closed.start_time is not None
    assert (closed.end_time - closed.start_time) / 1e9 == pytest.approx(2)
    assert seen.total("network.decisions", outcome="refused by policy") == 1
    assert nothing_secret(seen)
    assert [record.__dict__["sandbox_id"] for record in caplog.records] == [observed.id]


async def test_what_becomes_of_a_sandbox_is_told(seen: Telemetry, tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        sandbox = site.sandbox
        checkpoint = await sandbox.checkpoint()
        await sandbox.revert(checkpoint)
        await sandbox.save("mine")
        await sandbox.hibernate()
        await sandbox.resume()
        with pytest.raises(KeyError):
            async with sandbox.transaction():
                raise KeyError
    told = [each for each in seen.spans() if each.parent is None and "sandbox_id" in attributes_of(each)]
    assert [each.name.removeprefix("trio_sandbox.") for each in told] == [
        *("checkpoint", "revert", "save", "hibernate", "resume"),
        *("checkpoint", "revert"),  # of the transaction
    ]
    assert {attributes_of(each)["sandbox_id"] for each in told} == {sandbox.id}
    assert {attributes_of(each)["outcome"] for each in told} == {"ok"}


# --- Numbers ---


async def test_numbers_tell_of_starts_runs_and_open_sandboxes(seen: Telemetry, host: Host) -> None:
    async with host.open_sandbox("python", memory_mib=128) as sandbox:
        for code in ("1", "2"):
            await sandbox.run(code)
        assert seen.total("sandboxes.open") == 1
    assert seen.total("sandboxes.open") == 0
    assert seen.total("starts", kind="template", outcome="ok") == 1
    assert seen.total("start.duration", kind="template") == 1
    assert seen.total("admission.duration") == 1
    assert seen.total("runs", language="python", outcome="ended") == 2
    assert seen.total("run.duration", language="python", outcome="ended") == 2


async def test_where_there_are_only_numbers_they_are_told(seen: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    async with open_fake_sandbox({"code": echo}) as (sandbox, _):
        await sandbox.run("1")
    assert seen.total("runs") == 1
    assert seen.spans() == []


def test_a_number_that_there_is_not_is_our_mistake(seen: Telemetry) -> None:
    with pytest.raises(KeyError):
        measure("nonsense")


# --- Where nobody looks, and where looking fails ---


def test_what_nobody_looks_at_is_no_object_and_imports_nothing() -> None:
    program = """
import sys, trio, trio_sandbox.host
from trio_sandbox._observe import UNSEEN, is_observed, measure, add_span, span
from trio_sandbox.client import RunTrace
from trio_sandbox.sandbox._observed import run_span
assert span("run", language="python") is UNSEEN
assert run_span(RunTrace("python"), "s", "s.1", "code") is UNSEEN
assert not is_observed()
measure("runs")
add_span("first_output", 1.0)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_a_provider_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others import OpenTelemetry's interface as well."""
    with of_its_own():
        assert span("run") is UNSEEN
        assert not is_observed()
        assert run_span(RunTrace("python"), "s", "s.1", "code") is UNSEEN
        metrics.set_meter_provider(metrics.NoOpMeterProvider())
        assert not is_observed()
    with telemetry(), monkeypatch.context() as patch:
        assert is_observed()
        patch.setattr(trace, "_TRACER_PROVIDER", None)
        assert is_observed(), "there are meters"


class Broken(SpanProcessor):
    """Fails wherever it can."""

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        if span.name.endswith(".run"):
            raise RuntimeError("no start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("no end")


async def test_an_exporter_that_fails_disturbs_nobody_and_is_told_once(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, version: str) -> None:
        raise RuntimeError("no meter")

    monkeypatch.setattr("trio_sandbox._otel._failures._told", float("-inf"))
    with telemetry(Broken()) as seen:
        monkeypatch.setattr(seen.meters, "get_meter", fail)
        async with host.open_sandbox("python", memory_mib=128) as sandbox:
            assert (await sandbox.run("1")).ok
    (told,) = [record for record in caplog.records if record.name == "trio_sandbox.telemetry"]
    assert "the sandboxes continue" in told.getMessage()
    assert seen.spans("sandbox")
    assert trace.get_current_span() is trace.INVALID_SPAN, "nothing is left behind"


# --- A recording of our own ---


async def test_a_recording_has_the_spans_of_its_block_and_of_tasks_in_it() -> None:
    async def inner() -> None:
        with span("inner", size=1) as recorded:
            recorded.set(more="x")
            await trio.lowlevel.checkpoint()

    with record() as recording:
        with span("outer"):
            async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - the task is what is wanted
                nursery.start_soon(inner)
            add_span("added", 1000.0)
        unfinished = span("unfinished")
        unfinished.__enter__()
    with span("after"):
        pass
    found = recording.spans()
    assert [(each.name, each.depth) for each in found] == [
        ("outer", 0),
        ("added", 1),
        ("inner", 1),
        ("unfinished", 0),
    ]
    outer, added, within, unfinished_one = found
    assert within.attributes == {"size": 1, "more": "x", "outcome": "ok"}
    assert unfinished_one.ended is None
    assert added.began == outer.began, "it is not before what it is in"
    assert outer.ended is not None
    assert within.ended is not None
    assert outer.began <= within.began <= within.ended <= outer.ended


async def test_recordings_side_by_side_do_not_see_each_other() -> None:
    names: list[list[str]] = []

    async def work(name: str) -> None:
        with record() as recording:
            with span(name):
                await trio.testing.wait_all_tasks_blocked()
            names.append([each.name for each in recording.spans()])

    async with trio.open_nursery() as nursery:
        for name in ("a", "b"):
            nursery.start_soon(work, name)
    assert sorted(names) == [["a"], ["b"]]


# --- The log ---


def test_a_record_says_what_it_is_about(caplog: pytest.LogCaptureFixture) -> None:
    log = part_logger("a_part")
    with serving("s1"):
        with serving("s2", "s2.7"):
            log.warning("one of %d", 2)
        log.warning("two")
    log.warning("three")
    found = [
        (each.name, each.getMessage(), each.__dict__["sandbox_id"], each.__dict__["run_id"]) for each in caplog.records
    ]
    assert found == [
        ("trio_sandbox.a_part", "one of 2", "s2", "s2.7"),
        ("trio_sandbox.a_part", "two", "s1", None),
        ("trio_sandbox.a_part", "three", None, None),
    ]
    assert caplog.records[0].funcName == "test_a_record_says_what_it_is_about"


def test_every_part_logs_what_its_records_are_about() -> None:
    package = Path(trio_sandbox.__file__).parent
    loggers = {path.name for path in package.rglob("*.py") if "getLogger(" in path.read_text()}
    assert loggers == {"_observe.py", "_otel.py"}, "others have a part_logger"


async def test_what_a_run_is_told_of_has_its_ids(caplog: pytest.LogCaptureFixture) -> None:
    def search() -> None:
        logging.getLogger("mine").warning("a line of the user's own")
        raise ValueError("no")

    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run("1")
        await sandbox.run("search()", functions={"search": search})
    mine, ours = caplog.records
    assert (ours.name, ours.__dict__["sandbox_id"], ours.__dict__["run_id"]) == (
        "trio_sandbox.functions",
        sandbox.id,
        f"{sandbox.id}.2",
    )
    assert "sandbox_id" not in mine.__dict__


async def test_what_goes_wrong_in_a_sandboxes_start_has_its_id_and_the_users_block_none(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = part_logger("a_part")

    def starting(self: Host) -> None:
        log.warning("starting")

    monkeypatch.setattr(Host, "_check_open", starting)
    async with host.open_sandbox("python", memory_mib=128) as sandbox:
        log.warning("the block")
    ids = [each.__dict__["sandbox_id"] for each in caplog.records]
    assert ids == [None, sandbox.id, None], "before the start, in the task that starts it, and in the user's block"


async def test_a_transaction_that_can_not_be_undone_is_told_with_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise VmBootError("no room")

    async with open_site(tmp_path) as site:
        with pytest.raises(KeyError):
            async with site.sandbox.transaction():
                site.launcher.opening = fail
                raise KeyError
        (told,) = [each for each in caplog.records if "could not be reverted" in each.getMessage()]
        assert told.__dict__["sandbox_id"] == site.sandbox.id


# --- Timings of a run ---


async def test_a_runs_timings_count_from_the_call(autojump_clock: trio.testing.MockClock) -> None:
    async def code(records: RecordStream) -> None:
        await receive_json(records)
        await trio.sleep(1)
        await records.send(STDERR, b"first")
        await records.send(STDOUT, b"second")
        await trio.sleep(3)
        await records.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        results: dict[str, RunTimings] = {}

        async def run(name: str) -> None:
            result = await sandbox.run(name)
            results[name] = result.timings
            assert result.duration == result.timings.ended - result.timings.sent

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "a")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(run, "b")
    assert results["a"] == RunTimings(sent=0, first_output=1, ended=4)
    assert results["b"] == RunTimings(sent=4, first_output=5, ended=8), "it waited for its turn"


@pytest.mark.parametrize(
    ("records", "expected"),
    [([], None), ([(JSON, b'{"display": {"mime": "image/png", "size": 2, "item": 0}}'), (DISPLAY, b"ab")], 1.0)],
)
async def test_what_is_displayed_is_output_too_and_without_any_there_is_no_first(
    records: list[tuple[bytes, bytes]], expected: float | None, autojump_clock: trio.testing.MockClock
) -> None:
    async def code(stream: RecordStream) -> None:
        await receive_json(stream)
        await trio.sleep(1)
        for tag, data in records:
            await stream.send(tag, data)
        await stream.send_json(finished(), end=True)

    async with open_fake_sandbox({"code": code}) as (sandbox, _):
        assert (await sandbox.run("1")).timings.first_output == expected


# --- Through the other doors ---


@asynccontextmanager
async def open_observed() -> AsyncGenerator[Sandbox]:
    with span("sandbox"):
        async with open_local_sandbox() as (sandbox, _):
            yield sandbox


def test_what_is_asked_by_the_blocking_door_is_inside_the_span_of_who_asks(seen: Telemetry) -> None:
    tracer = trace.get_tracer("the program's")
    with tracer.start_as_current_span("trio_sandbox.outer"):
        with open_blocking(open_observed, blocking.Sandbox) as sandbox:
            with tracer.start_as_current_span("trio_sandbox.request"):
                sandbox.run("1")
    assert seen.path(seen.span("sandbox")) == ["outer", "sandbox"]
    assert seen.path(seen.span("run")) == ["outer", "request", "run"]


def test_what_is_asked_by_the_door_for_asyncio_is_inside_the_span_of_who_asks(seen: Telemetry) -> None:
    tracer = trace.get_tracer("the program's")

    async def ask(sandbox: aio.Sandbox, name: str) -> None:
        with tracer.start_as_current_span(f"trio_sandbox.{name}"):
            await sandbox.run("1")

    async def main() -> None:
        async with open_aio(open_observed, aio.Sandbox) as sandbox:
            await asyncio.gather(ask(sandbox, "left"), ask(sandbox, "right"))

    asyncio.run(main())
    assert sorted(seen.path(each) for each in seen.spans("run")) == [["left", "run"], ["right", "run"]]
