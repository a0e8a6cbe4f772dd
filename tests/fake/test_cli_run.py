"""`trio-sandbox run` on a host that plays a script."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import attrs
import pytest
import trio
import trio.testing
from trio.testing import memory_stream_one_way_pair

from trio_sandbox import (
    HostConfig,
    OutputChunk,
    Progress,
    SandboxConfig,
    SandboxError,
    UnknownImageError,
    Usage,
    VmBootError,
)
from trio_sandbox.cli import _process
from trio_sandbox.cli._copies import Download
from trio_sandbox.cli._program import Program
from trio_sandbox.cli._run import RunRequest, run_until_signal as run_real
from trio_sandbox.cli._streams import OutputClosedError, Write

#: What a process does; a number is its exit status, after which only what it left behind still prints.
Step = OutputChunk | int | Callable[[], Awaitable[object]]


#: The status of a process that was killed for want of memory; no signal has that number.
OOM = -99


class FakeProcess:
    """Plays a script."""

    def __init__(self) -> None:
        self.stdin, self.typed = memory_stream_one_way_pair()
        self.printed_out, self.stdout = memory_stream_one_way_pair()
        self.printed_err, self.stderr = memory_stream_one_way_pair()
        self.returncode: int | None = None
        self.oom = False
        self.ended = trio.Event()

    async def play(self, script: list[Step]) -> None:
        for step in script:
            await trio.lowlevel.checkpoint()
            if isinstance(step, OutputChunk):
                await (self.printed_out if step.stream == "stdout" else self.printed_err).send_all(step.data)
                # For the other stream's to come later: what each of two pipes has to say has no order.
                await trio.testing.wait_all_tasks_blocked()
            elif isinstance(step, int):
                self.returncode, self.oom = step, step == OOM
                self.ended.set()
            else:
                await step()
        self.printed_out.close()
        self.printed_err.close()

    async def wait(self) -> int:
        await self.ended.wait()
        assert self.returncode is not None
        return self.returncode


@attrs.define
class FakeHost:
    """Plays *script* for any code, and logs what is done to it."""

    script: list[Step]
    log: list[str] = attrs.field(factory=list[str])
    boot_error: Exception | None = None
    prepare_error: Exception | None = None
    start_error: Exception | None = None
    download_error: Exception | None = None
    config: HostConfig | None = None
    accelerator: str = "tcg"
    used: float = 10.0
    opening: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint

    @asynccontextmanager
    async def open(self, config: HostConfig) -> AsyncGenerator[FakeHost]:
        self.config = config
        await self.opening()
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
    async def open_process(self, argv: Sequence[str], *, cwd: str | None) -> AsyncGenerator[FakeProcess]:
        if self.start_error is not None:
            raise self.start_error
        self.log.append(f"run: {' '.join(argv)}")
        process = FakeProcess()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.play, self.script)
                yield process
                nursery.cancel_scope.cancel()
        finally:
            self.log.append("run ended")

    def path(self, path: str) -> str:
        return path

    def usage(self) -> Usage:
        """It has used a second more each time that it is asked."""
        self.used += 1
        return Usage(
            cpu_seconds=self.used, memory_bytes=0, disk_bytes=0, network_bytes_sent=0, network_bytes_received=0
        )

    async def download(self, remote: str, local: Path) -> None:
        await trio.lowlevel.checkpoint()
        self.log.append(f"downloaded: {remote} to {local}")
        if self.download_error is not None:
            raise self.download_error


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
    trace: bool = False,
    json: bool = False,
    downloads: tuple[Download, ...] = (),
) -> RunRequest:
    return RunRequest(
        program=Program(language="python", image="python", argv=("python3", "-c", "pass")),
        json=json,
        downloads=downloads,
        host=host or HostConfig(),
        sandbox=sandbox or SandboxConfig(),
        timeout=timeout,
        quiet=quiet,
        timings=timings,
        trace=trace,
    )


async def no_input() -> bytes:
    await trio.lowlevel.checkpoint()
    return b""


async def run_until_signal(request: RunRequest, *, open_host: object, write: Write) -> int:
    return await run_real(request, open_host=open_host, write=write, read=no_input)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


CLOSED = ["run ended", "sandbox closed", "host closed"]


async def test_output_comes_in_order_and_the_status_is_the_codes() -> None:
    host = FakeHost([OutputChunk("stdout", b"a"), OutputChunk("stderr", b"b"), OutputChunk("stdout", b"c"), 7])
    output = Output()
    assert await run_until_signal(request(), open_host=host.open, write=output.write) == 7
    assert output.chunks == [("stdout", b"a"), ("stderr", b"b"), ("stdout", b"c")]
    assert host.log == ["host opened", "sandbox opened: python, 256 MiB", "run: python3 -c pass", *CLOSED]


async def test_output_is_written_before_the_code_ends() -> None:
    output = Output()
    seen: list[list[tuple[str, bytes]]] = []

    async def look() -> None:
        seen.append(list(output.chunks))

    host = FakeHost([OutputChunk("stdout", b"early"), look, OutputChunk("stdout", b"late"), 0])
    await run_until_signal(request(), open_host=host.open, write=output.write)
    assert seen == [[("stdout", b"early")]]


async def test_the_configuration_reaches_the_host() -> None:
    host = FakeHost([0])
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

    host = SlowHost([3])
    assert await run_until_signal(request(timeout=2.5), open_host=host.open, write=Output().write) == 3


@pytest.mark.parametrize(
    "error", [VmBootError("it did not boot", console="Kernel panic"), OSError(28, "No space left")]
)
async def test_a_failure_of_the_sandbox_is_125(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], boot_error=error)
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 125
    assert host.log[-1] == "host closed"
    assert f"trio-sandbox: {error}".replace("\n", "\n      ") in capsys.readouterr().err


async def test_a_guests_console_can_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], boot_error=VmBootError("no", console="\x1b]0;owned\x07\r\nétage\t1\x9b2J"))
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=Output().write) == 125
    error = capsys.readouterr().err
    assert error.endswith("\n      | \\x1b]0;owned\\x07\n      | étage 1\\x9b2J\n")


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

    host = FakeHost([OutputChunk("stdout", b"x"), 0])
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=write) == 128 + signal.SIGPIPE
    assert host.log[-3:] == CLOSED
    assert capsys.readouterr().err == ""


async def test_progress_is_shown_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    await run_until_signal(request(), open_host=FakeHost([0]).open, write=Output().write)
    assert capsys.readouterr().err == "image python: unpacking\n"
    await run_until_signal(request(quiet=True), open_host=FakeHost([0]).open, write=Output().write)
    assert capsys.readouterr().err == ""


async def test_timings(autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    async def take_two_seconds() -> None:
        await trio.sleep(2)

    host = FakeHost([take_two_seconds, 0])
    await run_until_signal(request(timings=True, quiet=True), open_host=host.open, write=Output().write)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["running", "the", "code", "2.000", "s"] in lines
    steps = ["starting", "preparing", "booting", "copying", "running", "copying", "closing", "total"]
    assert [line[0] for line in lines] == steps


async def test_a_trace_draws_the_steps_as_they_are_nested(
    autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async def wait() -> None:
        await trio.sleep(2)

    host = FakeHost([wait, OutputChunk("stdout", b"x"), wait, 0])
    host.opening = wait
    await run_until_signal(request(trace=True, quiet=True), open_host=host.open, write=Output().write)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rstrip("#\N{FULL BLOCK} ") for line in lines] == [
        "  starting the host      2.000 s",
        "  preparing the image    0.000 s",
        "  copying files there    0.000 s",
        "  running the code       4.000 s",
        "    first output         2.000 s",
        "  copying files back     0.000 s",
        "  total                  6.000 s",
    ]
    assert all(len(line) <= 80 for line in lines)


async def test_a_start_that_fails_is_drawn_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([], prepare_error=VmBootError("no", console=""))
    assert await run_until_signal(request(trace=True, quiet=True), open_host=host.open, write=Output().write) == 125
    *lines, error = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["starting", "preparing", "total"]
    assert error == "trio-sandbox: no"


# --- What a process of the guest's may do ---


async def test_a_process_that_a_signal_ended_is_128_and_its_number() -> None:
    host = FakeHost([-9])
    assert await run_until_signal(request(), open_host=host.open, write=Output().write) == 128 + 9


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "python3"), 127),
        (PermissionError(errno.EACCES, "Permission denied", "python3"), 126),
    ],
)
async def test_an_interpreter_that_does_not_start(
    error: OSError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost([], start_error=error)
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=Output().write) == status
    assert capsys.readouterr().err == f"trio-sandbox: python3: {error.strerror}\n"


async def test_what_it_printed_before_its_end_is_waited_for_and_what_it_left_behind_is_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def a_moment() -> None:
        await trio.sleep(_process.DRAIN_SECONDS * 0.9)

    a, b, c = (OutputChunk("stdout", data) for data in (b"a", b"b", b"c"))
    host = FakeHost([a, 0, a_moment, b, a_moment, c, trio.sleep_forever])
    output = Output()
    assert await run_until_signal(request(), open_host=host.open, write=output.write) == 0
    assert output.chunks == [("stdout", b"a"), ("stdout", b"b"), ("stdout", b"c")]


async def test_a_slow_reader_misses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    written: list[bytes] = []

    async def write(stream: str, data: bytes) -> None:
        await trio.sleep(10 * _process.DRAIN_SECONDS)
        written.append(data)

    host = FakeHost([OutputChunk("stdout", b"a"), OutputChunk("stdout", b"b"), 0, OutputChunk("stdout", b"c")])
    assert await run_until_signal(request(), open_host=host.open, write=write) == 0
    assert b"".join(written) == b"abc"


async def test_json_is_one_line_with_what_is_known() -> None:
    host = FakeHost([OutputChunk("stdout", b"a\xff"), OutputChunk("stderr", b"b"), 7])
    output = Output()
    assert await run_until_signal(request(json=True), open_host=host.open, write=output.write) == 7
    ((stream, data),) = output.chunks
    fields = json.loads(data)
    assert stream == "stdout"
    assert data.endswith(b"}\n")
    assert isinstance(fields.pop("duration"), float)
    assert set(fields.pop("timings")) == {"sent", "first_output", "ended"}
    assert fields == {
        "exit_code": 7,
        "timed_out": False,
        "oom": False,
        "cpu_seconds": 1.0,
        "stdout": "a\N{REPLACEMENT CHARACTER}",
        "stderr": "b",
        "language": "python",
        "image": "python",
        "accelerator": "tcg",
    }


async def test_a_program_that_took_too_much_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    host = FakeHost([OOM])
    assert await run_until_signal(request(json=True, quiet=True), open_host=host.open, write=output.write) == 128 - OOM
    assert json.loads(output.chunks[0][1])["oom"] is True
    assert "killed for want of memory; --memory" in capsys.readouterr().err


async def test_json_of_a_program_that_was_stopped(autojump_clock: trio.testing.MockClock) -> None:
    host = FakeHost([OutputChunk("stdout", b"before"), trio.sleep_forever])
    output = Output()
    assert await run_until_signal(request(json=True, timeout=2), open_host=host.open, write=output.write) == 124
    fields = json.loads(output.chunks[0][1])
    assert (fields["exit_code"], fields["timed_out"], fields["stdout"]) == (None, True, "before")


async def test_json_tells_when_the_program_was_sent_printed_and_ended(autojump_clock: trio.testing.MockClock) -> None:
    async def wait() -> None:
        await trio.sleep(2)

    host = FakeHost([wait, OutputChunk("stderr", b"first"), wait, OutputChunk("stdout", b"second"), 0])
    host.opening = wait
    output = Output()
    await run_until_signal(request(json=True), open_host=host.open, write=output.write)
    fields = json.loads(output.chunks[0][1])
    assert fields["timings"] == {"sent": 2, "first_output": 4, "ended": 6}
    assert fields["duration"] == 4


async def test_json_of_a_program_that_prints_nothing_has_no_first_output() -> None:
    output = Output()
    await run_until_signal(request(json=True), open_host=FakeHost([0]).open, write=output.write)
    assert json.loads(output.chunks[0][1])["timings"]["first_output"] is None


async def test_json_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    host = FakeHost([OutputChunk("stdout", b"x" * 11), trio.sleep_forever])
    sent = request(json=True, sandbox=SandboxConfig(max_output_bytes=10))
    output = Output()
    assert await run_until_signal(sent, open_host=host.open, write=output.write) == 125
    assert output.chunks == []
    assert "more than the 10 bytes to stdout" in capsys.readouterr().err


async def test_files_are_fetched_of_a_program_that_failed(tmp_path: Path) -> None:
    host = FakeHost([3])
    sent = request(downloads=(Download("a", tmp_path), Download("/b", tmp_path)))
    assert await run_until_signal(sent, open_host=host.open, write=Output().write) == 3
    assert host.log[-4:-2] == [f"downloaded: a to {tmp_path}", f"downloaded: /b to {tmp_path}"]


@pytest.mark.parametrize(("status", "shown"), [(0, 125), (3, 3)])
async def test_a_file_that_is_not_there_is_told(
    status: int, shown: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = FakeHost([status], download_error=FileNotFoundError(errno.ENOENT, "No such file or directory", "/home/a"))
    sent = request(downloads=(Download("a", tmp_path),))
    assert await run_until_signal(sent, open_host=host.open, write=Output().write) == shown
    assert "trio-sandbox: a was not downloaded: No such file or directory: /home/a\n" in capsys.readouterr().err


async def test_a_first_signal_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    async def deliver() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()

    host = FakeHost([deliver])
    assert await run_until_signal(request(quiet=True), open_host=host.open, write=Output().write) == 130
    assert capsys.readouterr().err == "trio-sandbox: SIGINT: closing the sandbox; once more ends it at once\n"
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


async def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deliver() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await trio.lowlevel.checkpoint()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert await run_until_signal(request(), open_host=FakeHost([deliver, 5]).open, write=Output().write) == 5
    finally:
        signal.signal(signal.SIGHUP, before)
