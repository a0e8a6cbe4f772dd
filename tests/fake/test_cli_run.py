"""`trio-sandbox run` on a host that plays a script."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import attrs
import pytest
import trio
import trio.testing

from trio_sandbox import (
    Display,
    HostConfig,
    OutputChunk,
    Progress,
    RunResult,
    SandboxConfig,
    SandboxError,
    UnknownImageError,
    VmBootError,
)
from trio_sandbox.cli._run import OutputClosedError, RunRequest, run_until_signal

Step = OutputChunk | Display | RunResult | Callable[[], Awaitable[object]]


def result(exit_code: int = 0) -> RunResult:
    return RunResult(exit_code=exit_code, duration=0.01, restarted=False, state_kept=True, accelerator="tcg")


@attrs.define
class FakeHost:
    """Plays *script* for any code, and logs what is done to it."""

    script: list[Step]
    log: list[str] = attrs.field(factory=list[str])
    boot_error: Exception | None = None
    prepare_error: Exception | None = None
    config: HostConfig | None = None
    accelerator: str = "tcg"

    @asynccontextmanager
    async def open(self, config: HostConfig) -> AsyncGenerator[FakeHost]:
        self.config = config
        self.log.append("host opened")
        try:
            yield self
        finally:
            self.log.append("host closed")

    async def prepare(self, image: str, /) -> None:
        await trio.lowlevel.checkpoint()
        assert self.config is not None
        self.config.progress(Progress(f"image {image}", "unpacking", 0.5))
        if self.prepare_error is not None:
            raise self.prepare_error

    @asynccontextmanager
    async def open_sandbox(self, image: str, config: SandboxConfig, /) -> AsyncGenerator[FakeHost]:
        if self.boot_error is not None:
            raise self.boot_error
        self.log.append(f"sandbox opened: {image}, {config.memory_mib} MiB")
        try:
            yield self
        finally:
            self.log.append("sandbox closed")

    @asynccontextmanager
    async def stream(
        self, code: str, /, *, language: str | None
    ) -> AsyncGenerator[AsyncIterator[OutputChunk | Display | RunResult]]:
        self.log.append(f"run: {code}")
        events = self.play()
        try:
            yield events
        finally:
            await events.aclose()
            self.log.append("run ended")

    async def play(self) -> AsyncGenerator[OutputChunk | Display | RunResult]:
        for step in self.script:
            await trio.lowlevel.checkpoint()
            if isinstance(step, (OutputChunk, Display, RunResult)):
                yield step
            else:
                await step()


@attrs.define
class Output:
    """Where the output goes."""

    chunks: list[tuple[str, bytes]] = attrs.field(factory=list[tuple[str, bytes]])

    async def write(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.chunks.append((stream, data))


def request(
    *,
    host: HostConfig | None = None,
    sandbox: SandboxConfig | None = None,
    timeout: float = math.inf,
    quiet: bool = False,
    timings: bool = False,
) -> RunRequest:
    return RunRequest(
        code="pass",
        image="python",
        host=host or HostConfig(),
        sandbox=sandbox or SandboxConfig(),
        timeout=timeout,
        quiet=quiet,
        timings=timings,
    )


CLOSED = ["run ended", "sandbox closed", "host closed"]


async def test_output_comes_in_order_and_the_status_is_the_codes() -> None:
    host = FakeHost([OutputChunk("stdout", b"a"), OutputChunk("stderr", b"b"), OutputChunk("stdout", b"c"), result(7)])
    output = Output()
    assert await run_until_signal(request(), open_host=host.open, write=output.write) == 7
    assert output.chunks == [("stdout", b"a"), ("stderr", b"b"), ("stdout", b"c")]
    assert host.log == ["host opened", "sandbox opened: python, 256 MiB", "run: pass", *CLOSED]


async def test_what_is_displayed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([OutputChunk("stdout", b"a"), Display("image/png", b"123"), OutputChunk("stdout", b"b"), result()])
    output = Output()
    assert await run_until_signal(request(), open_host=host.open, write=output.write) == 0
    assert output.chunks == [("stdout", b"a"), ("stdout", b"b")]
    assert "not shown: image/png, 3 bytes" in capsys.readouterr().err


async def test_output_is_written_before_the_code_ends() -> None:
    output = Output()
    seen: list[list[tuple[str, bytes]]] = []

    async def look() -> None:
        seen.append(list(output.chunks))

    host = FakeHost([OutputChunk("stdout", b"early"), look, OutputChunk("stdout", b"late"), result()])
    await run_until_signal(request(), open_host=host.open, write=output.write)
    assert seen == [[("stdout", b"early")]]


async def test_the_configuration_reaches_the_host() -> None:
    host = FakeHost([result()])
    sent = request(host=HostConfig(accelerator="tcg", build_images=False), sandbox=SandboxConfig(memory_mib=512))
    await run_until_signal(sent, open_host=host.open, write=Output().write)
    assert host.config == HostConfig(accelerator="tcg", build_images=False)
    assert "sandbox opened: python, 512 MiB" in host.log


async def test_a_timeout_is_124(autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([OutputChunk("stdout", b"before"), trio.sleep_forever])
    output = Output()
    assert await run_until_signal(request(timeout=2.5), open_host=host.open, write=output.write) == 124
    assert output.chunks == [("stdout", b"before")]
    assert host.log[-3:] == CLOSED
    assert "stopped after 2.5 seconds" in capsys.readouterr().err


async def test_the_timeout_does_not_count_what_comes_before_the_code(autojump_clock: trio.testing.MockClock) -> None:
    class SlowHost(FakeHost):
        async def prepare(self, image: str, /) -> None:
            await trio.sleep(100)

    host = SlowHost([result(3)])
    assert await run_until_signal(request(timeout=2.5), open_host=host.open, write=Output().write) == 3


@pytest.mark.parametrize(
    "error", [VmBootError("it did not boot", console="Kernel panic"), OSError(28, "No space left")]
)
async def test_a_failure_of_the_sandbox_is_125(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], boot_error=error)
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 125
    assert host.log[-1] == "host closed"
    assert f"trio-sandbox: {error}" in capsys.readouterr().err


async def test_a_guests_console_can_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], boot_error=VmBootError("no", console="\x1b]0;owned\x07\r\nétage\t1\x9b2J"))
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=Output().write) == 125
    error = capsys.readouterr().err
    assert error.endswith("\n| \\x1b]0;owned\\x07\n| étage\t1\\x9b2J\n")


async def test_the_message_says_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    error = UnknownImageError("there is no image 'x'")
    error.__cause__ = OSError("the disk is gone")
    host = FakeHost([], prepare_error=error)
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 125
    assert capsys.readouterr().err.endswith("trio-sandbox: there is no image 'x'\n  because: the disk is gone\n")


async def test_each_of_two_failures_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], boot_error=ExceptionGroup("both", [SandboxError("one"), SandboxError("two")]))
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 125
    assert capsys.readouterr().err.endswith("trio-sandbox: one\ntrio-sandbox: two\n")


async def test_a_bug_is_not_hidden() -> None:
    host = FakeHost([], boot_error=KeyError("a bug"))
    with pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="a bug")):
        await run_until_signal(request(), open_host=host.open, write=Output().write)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_closes_the_sandbox_and_is_128_and_its_number(number: signal.Signals) -> None:
    async def deliver() -> None:
        os.kill(os.getpid(), number)
        await trio.sleep_forever()

    host = FakeHost([deliver])
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 128 + number
    assert host.log[-3:] == CLOSED


async def test_a_reader_who_went_away_ends_it_as_sigpipe_would(capsys: pytest.CaptureFixture[str]) -> None:
    async def write(stream: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise OutputClosedError

    host = FakeHost([OutputChunk("stdout", b"x"), result()])
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=write) == 128 + signal.SIGPIPE
    assert host.log[-3:] == CLOSED
    assert capsys.readouterr().err == ""


async def test_progress_is_shown_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    await run_until_signal(request(), open_host=FakeHost([result()]).open, write=Output().write)
    assert capsys.readouterr().err == "image python: unpacking\n"
    await run_until_signal(request(quiet=True), open_host=FakeHost([result()]).open, write=Output().write)
    assert capsys.readouterr().err == ""


async def test_timings(autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    async def take_two_seconds() -> None:
        await trio.sleep(2)

    host = FakeHost([take_two_seconds, result()])
    await run_until_signal(request(timings=True, quiet=True), open_host=host.open, write=Output().write)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["running", "the", "code", "2.000", "s"] in lines
    assert [line[0] for line in lines] == ["starting", "preparing", "booting", "running", "closing", "total"]
