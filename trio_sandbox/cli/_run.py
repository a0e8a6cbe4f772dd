"""``trio-sandbox run``: one piece of code in a fresh virtual machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import signal
import sys
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import attrs
import trio

from .. import constants
from .._config import HostConfig, SandboxConfig
from .._display import Display
from .._errors import SandboxError
from .._results import RunResult
from ..client import OutputChunk
from ..host import open_host
from . import _status
from ._progress import ShowProgress, open_progress
from ._report import complain, complain_about

#: Signals that end the command; the sandbox is closed first, as if its block had been left.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Sandbox(Protocol):
    """What `run` needs of `trio_sandbox.Sandbox`."""

    @property
    def accelerator(self) -> str: ...

    def stream(
        self, code: str, /, *, language: str | None
    ) -> AbstractAsyncContextManager[AsyncIterable[OutputChunk | Display | RunResult]]: ...


class _Host(Protocol):
    """What `run` needs of `trio_sandbox.Host`."""

    async def prepare(self, image: str, /) -> None: ...

    def open_sandbox(self, image: str, config: SandboxConfig, /) -> AbstractAsyncContextManager[_Sandbox]: ...


OpenHost = Callable[[HostConfig], AbstractAsyncContextManager[_Host]]
Write = Callable[[Literal["stdout", "stderr"], bytes], Awaitable[object]]


class OutputClosedError(Exception):
    """Nobody reads our standard output or error any more."""


@attrs.frozen(kw_only=True)
class RunRequest:
    """What the command line asked for."""

    code: str
    image: str
    language: str | None = None
    """None: what the image is for."""
    host: HostConfig
    sandbox: SandboxConfig
    timeout: float = math.inf
    """Seconds that the code may run, starting and building not counted."""
    quiet: bool = False
    timings: bool = False


@attrs.define
class Timings:
    """How long each step took, in order."""

    last: float = attrs.field(factory=trio.current_time)
    steps: list[tuple[str, float]] = attrs.field(factory=list[tuple[str, float]])

    def lap(self, step: str) -> None:
        """End a step."""
        now = trio.current_time()
        self.steps.append((step, now - self.last))
        self.last = now

    def __str__(self) -> str:
        rows = [*self.steps, ("total", sum(duration for _, duration in self.steps))]
        return "\n".join(f"  {step:24}{duration:8.3f} s" for step, duration in rows)


async def write_output(stream: Literal["stdout", "stderr"], data: bytes) -> None:
    """Write to our own standard output or error, past Python's buffers.

    In a thread, since a terminal or pipe may block for ever; and cancellable, so that a reader who
    does not read can't keep us from ending. Cancelled, some of *data* may be written, even later.

    Raises:
      OutputClosedError: if nobody reads it.
    """
    descriptor = {"stdout": 1, "stderr": 2}[stream]
    try:
        await trio.to_thread.run_sync(_write_all, descriptor, data, abandon_on_cancel=True)
    except BrokenPipeError as exc:
        raise OutputClosedError from exc


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    try:
        request = RunRequest(
            code=read_source(options.code, options.file),
            image=options.image,
            language=options.language,
            host=host_config(options),
            sandbox=sandbox_config(options),
            timeout=options.timeout,
            quiet=options.quiet,
            timings=options.timings,
        )
    except (OSError, ValueError, SyntaxError) as exc:
        complain(str(exc))
        return _status.USAGE
    return trio.run(run_until_signal, request)


def host_config(options: argparse.Namespace) -> HostConfig:
    """Give the host's configuration as the command line says."""
    return HostConfig(
        cache_dir=options.cache_dir,
        accelerator=options.accelerator,
        require_hardware=options.require_hardware,
        build_images=not options.no_build,
        templates=not options.no_templates,
    )


def sandbox_config(options: argparse.Namespace) -> SandboxConfig:
    """Give the sandbox's configuration as the command line says; `ValueError` where it can't be."""
    return SandboxConfig(memory_mib=options.memory, vcpus=options.vcpus)


def read_source(code: str | None, file: str | None) -> str:
    """Give the source text: *code* itself, or what is in *file*, in the encoding that it declares (PEP 263).

    Raises:
      OSError: if the file can't be read.
      SyntaxError, UnicodeDecodeError: if it is no text in its encoding.
      ValueError: if it is too long.
    """
    if code is None:
        code = importlib.util.decode_source(_read(file))
    length = len(code.encode("utf-8", "surrogatepass"))
    if length > constants.MAXIMUM_REQUEST_BYTES:
        raise ValueError(f"the code has {length} bytes; at most {constants.MAXIMUM_REQUEST_BYTES} can be run at once")
    return code


def _read(file: str | None) -> bytes:
    if file is None or file == "-":
        if sys.stdin.isatty():
            complain("reading the code from the terminal; Ctrl-D ends it")
        return sys.stdin.buffer.read()
    return Path(file).read_bytes()


async def run_until_signal(
    request: RunRequest,
    *,
    open_host: OpenHost = open_host,
    write: Write = write_output,
) -> int:
    """Run the request until it is over or a signal comes."""
    return await end_on_signal(partial(run_request, request, open_host=open_host, write=write))


async def end_on_signal(main: Callable[[], Awaitable[int]]) -> int:
    """Run *main* and return its exit status; a signal cancels it, and closes the sandbox in the usual way."""
    status = _status.SANDBOX_FAILURE
    received: list[int] = []

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                nursery.cancel_scope.cancel(reason=f"signal {number}")

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch)
            status = await main()
            nursery.cancel_scope.cancel(reason="the command is over")
    except* OutputClosedError:
        # As a program that does not handle SIGPIPE.
        status = _status.SIGNAL_BASE + signal.SIGPIPE
    except* (SandboxError, OSError) as group:
        complain_about(group)
    return _status.SIGNAL_BASE + received[0] if received else status  # noqa: ASYNC910 (nurseries are checkpoints)


async def run_request(request: RunRequest, *, open_host: OpenHost, write: Write) -> int:
    """Run the code and pass on its output as it comes; return the exit status."""
    timings = Timings()
    status: int | None = None
    with contextlib.ExitStack() as display:
        show: ShowProgress = display.enter_context(open_progress(quiet=request.quiet))
        async with open_host(attrs.evolve(request.host, progress=show)) as host:
            timings.lap("starting the host")
            await host.prepare(request.image)
            timings.lap("preparing the image")
            async with host.open_sandbox(request.image, request.sandbox) as sandbox:
                timings.lap(f"booting ({sandbox.accelerator})")
                display.close()  # what the code prints has the terminal to itself
                with trio.move_on_after(request.timeout):
                    async with sandbox.stream(request.code, language=request.language) as events:
                        async for event in events:
                            if isinstance(event, RunResult):
                                status = event.exit_code
                            elif isinstance(event, Display):
                                complain(f"not shown: {event.mime}, {len(event.data)} bytes")
                            else:
                                await write(event.stream, event.data)
                timings.lap("running the code")
        timings.lap("closing")
    if status is None:
        complain(f"stopped after {request.timeout:g} seconds (--timeout)")
        status = _status.TIMEOUT
    if request.timings:
        print(timings, file=sys.stderr)
    return status
