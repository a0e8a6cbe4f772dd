"""Whatever a guest says, no message, note or log of ours has in it what a terminal obeys."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from trio_sandbox import (
    OutputLimitError,
    RunFailedError,
    Sandbox,
    SandboxConfig,
    SandboxError,
    SnapshotError,
    Timeouts,
    VmBootError,
    VmDiedError,
    WarmupError,
)
from trio_sandbox.client import ask
from trio_sandbox.guest.trees import HEADER
from trio_sandbox.image import Place
from trio_sandbox.machines._mounts import mount
from trio_sandbox.machines._warm_up import run_trivial_code
from trio_sandbox.qemu._console import describe_end
from trio_sandbox.qemu._snapshot import hold_still
from trio_sandbox.wire import STDERR, STDOUT, RecordStream

from ._guest import FakeMachine, Service, finished, open_fake_sandbox

#: A title, a cleared screen, a line that looks like one of ours, C1, a right-to-left override, a lone surrogate.
HOSTILE = "\x1b]0;PWNED\x07\x1b[2J\r\ntrio-sandbox: all is well\x9b31m\u202e\u200b\ud800\x7f"
HOSTILE_BYTES = HOSTILE.encode("utf-8", "surrogatepass")
#: The same as text that a wire takes.
HOSTILE_TEXT = HOSTILE.replace("\ud800", "")


def texts_of(error: BaseException) -> list[str]:
    """Give all that a traceback prints of an exception, its notes, causes and contexts, and those of its group."""
    texts = [str(error), *getattr(error, "__notes__", ())]
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        if other is not None:
            texts += texts_of(other)
    return texts


def check_text(text: str) -> None:
    for line in text.split("\n"):
        assert line.replace("\t", "").isprintable(), repr(text)
        assert not line.startswith("trio-sandbox:"), repr(text)


Answer = Callable[[RecordStream], Awaitable[None]]


def saying(*messages: Any, end: bool = True) -> Answer:
    """A service that says some messages, whatever it is asked."""

    async def serve(records: RecordStream) -> None:
        await records.receive()
        for message in messages:
            await records.send_json(message)
        if end:
            await records.send_eof()

    return serve


async def give_up(records: RecordStream) -> None:
    await trio.lowlevel.checkpoint()
    records.stream.reset(HOSTILE_TEXT)


async def print_and_give_up(records: RecordStream) -> None:
    await records.receive()
    await records.send(STDOUT, HOSTILE_BYTES)
    await records.send(STDERR, HOSTILE_BYTES)
    records.stream.reset(HOSTILE_TEXT)


async def print_and_fail(records: RecordStream) -> None:
    await records.receive()
    await records.send(STDOUT, HOSTILE_BYTES)
    await records.send(STDERR, HOSTILE_BYTES)
    await records.send_json(finished(1, value=HOSTILE_TEXT), end=True)


async def show_half(records: RecordStream) -> None:
    await records.receive()
    await records.send_json({"display": {"mime": "text/html", "size": 9, "item": 0}})
    await records.send(STDOUT, HOSTILE_BYTES)


async def say_of_a_file(records: RecordStream) -> None:
    await records.stream.receive_some()
    payload = b"%d\0%s\0%s" % (errno.ENOENT, HOSTILE_BYTES, HOSTILE_BYTES)
    await records.stream.send_all(HEADER.pack(b"X", len(payload)) + payload, end=True)


async def say_what_is_no_answer(records: RecordStream) -> None:
    await records.stream.receive_some()
    await records.stream.send_all(HEADER.pack(b"R", len(HOSTILE_BYTES)) + HOSTILE_BYTES, end=True)


async def talk(records: RecordStream) -> None:
    await records.stream.send_all(HOSTILE_BYTES * 10, end=True)


FAILED = {"failed": {"errno": 2, "strerror": HOSTILE_TEXT, "filename": HOSTILE_TEXT}}

ANSWERS: dict[str, Answer] = {
    "failed": saying(FAILED),
    "failed, no errno": saying({"failed": {"strerror": HOSTILE_TEXT}}),
    "failed, in a directory": saying(
        {"failed": {"errno": 2, "strerror": HOSTILE_TEXT, "filename": "/" + HOSTILE_TEXT}}
    ),
    "gives up": give_up,
    "prints and gives up": print_and_give_up,
    "prints and fails": print_and_fail,
    "shows half": show_half,
    "no such message": saying({HOSTILE_TEXT: HOSTILE_TEXT}),
    "no number": saying({"finished": {"exit_code": HOSTILE_TEXT}}),
    "no boolean": saying({"finished": {"exit_code": 0, "restarted": HOSTILE_TEXT}}),
    "no type": saying({"display": {"mime": HOSTILE_TEXT, "size": 1, "item": 0}}),
    "no surrogates": saying({"finished": {"exit_code": 0, "value": HOSTILE}}),
    "no status": saying({"started": 1}, {"exited": {"status": HOSTILE_TEXT}}),
    "started twice": saying({"started": 1}, {"started": 2}),
    "fails after the start": saying({"started": 1}, FAILED),
    "no JSON": talk,
    "nothing": saying(),
    "expired": saying({"finished": {**finished(1)["finished"], "expired": True}}),
    "a file's error": say_of_a_file,
    "no answer": say_what_is_no_answer,
}


REQUESTS: dict[str, Callable[[Sandbox, FakeMachine], Awaitable[object]]] = {
    "run": lambda sandbox, _: sandbox.run("code", check=True),
    "run_process": lambda sandbox, _: sandbox.run_process(["program"], capture_stdout=True),
    "read": lambda sandbox, _: sandbox.path("x").read_bytes(),
    "stat": lambda sandbox, _: sandbox.path("x").stat(),
    "write": lambda sandbox, _: sandbox.path("x").write_bytes(b"x"),
    "iterdir": lambda sandbox, _: sandbox.path("x").iterdir(),
    "open": lambda sandbox, _: sandbox.path("x").open(),
    "download": lambda sandbox, _: sandbox.download("x", "/nonexistent/x"),
    "connect": lambda sandbox, _: sandbox.open_tcp_stream(80),
    "watch": lambda sandbox, _: watch(sandbox),
    "mount": lambda _, machine: mount(machine, [Place("/x", 0, 1)], patience=5),
    "ask": lambda _, machine: ask(machine, {"service": "idle"}, "a question", most=10, patience=5),
}


async def watch(sandbox: Sandbox) -> None:
    async with sandbox.watch("x") as changes:
        async for _ in changes:
            pass


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_no_message_commands_a_terminal(
    request_name: str, answer: str, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "trio_sandbox")
    names: list[str] = [*"code process file tcp watch mounts idle".split()]
    services: dict[str, Service] = dict.fromkeys(names, ANSWERS[answer])
    config, timeouts = SandboxConfig(), Timeouts(interrupt_grace=0.1, kill=0.1)
    async with open_fake_sandbox(services, config=config, timeouts=timeouts) as (sandbox, machine):
        with trio.move_on_after(30):
            try:
                await REQUESTS[request_name](sandbox, machine)
            except (SandboxError, OSError, trio.BrokenResourceError, ValueError) as exc:
                for text in texts_of(exc):
                    check_text(text)
        check_text(repr(sandbox))
        check_text(repr(sandbox.last_output))
        check_text(str(machine.failure))
    for record in caplog.records:
        check_text(record.getMessage())


async def test_a_limit_a_failure_and_a_result_are_quoted() -> None:
    async with open_fake_sandbox({"code": print_and_fail}, config=SandboxConfig(max_output_bytes=20)) as (sandbox, _):
        with pytest.raises(OutputLimitError) as limit:
            await sandbox.run("code")
    async with open_fake_sandbox({"code": print_and_fail}) as (sandbox, _):
        with pytest.raises(RunFailedError) as failed:
            await sandbox.run("code", check=True)
    for error in (limit.value, failed.value):
        assert any("x1b" in text for text in texts_of(error))
        for text in texts_of(error):
            check_text(text)
    check_text(repr(failed.value.result))


async def test_a_console_and_a_panic_are_quoted() -> None:
    for kind in (VmBootError, VmDiedError):
        check_text(str(kind("no", console=HOSTILE)))
    check_text(describe_end(0, "", f"Kernel panic: {HOSTILE}".replace("\r\n", " ")))
    check_text(describe_end(1, HOSTILE, ""))


async def test_a_guest_that_refuses_to_be_saved_is_quoted() -> None:
    async with open_fake_sandbox({"snapshot": give_up}) as (_, machine):
        with pytest.raises(SnapshotError) as caught:
            async with hold_still(machine.guest, b"marker", 5):
                pass
    assert "PWNED" in str(caught.value)
    for text in texts_of(caught.value):
        check_text(text)


async def test_a_failed_warm_up_is_quoted() -> None:
    async with open_fake_sandbox({"code": print_and_fail}) as (_, machine):
        machine.config = SandboxConfig()
        with pytest.raises(WarmupError) as caught:
            await run_trivial_code(machine, "python", Timeouts())  # type: ignore[arg-type]
    assert "PWNED" in str(caught.value)
    for text in texts_of(caught.value):
        check_text(text)
