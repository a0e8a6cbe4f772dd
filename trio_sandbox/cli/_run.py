"""``trio-sandbox run``: one program in a fresh virtual machine."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import posixpath
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from .. import Sandbox
from .._config import HostConfig, SandboxConfig
from .._observe import add_span, record, span
from .._quote import quote_guest
from .._results import RunTimings
from ..host import Host, open_host
from . import _status
from ._configs import host_config, sandbox_config
from ._copies import Download, Upload
from ._outcome import Collected, Outcome
from ._process import Ended, run_process
from ._program import Program, find_program
from ._progress import ShowProgress, open_progress
from ._report import complain
from ._signals import end_on_signal
from ._streams import Read, Stream, Write, read_input, write_output
from ._trace import show_trace

#: The working directory of a workspace, in the guest.
_WORKSPACE: Final = "/home/user/workspace"
#: A repository's hooks and settings are programs that git executes; byte code would be in the way.
_NOT_BROUGHT_BACK: Final = (".git", "__pycache__")

OpenHost = Callable[[HostConfig], AbstractAsyncContextManager[Host]]


@attrs.frozen(kw_only=True)
class RunRequest:
    """What the command line asked for."""

    program: Program
    host: HostConfig
    sandbox: SandboxConfig
    environment: Mapping[str, str] = attrs.field(factory=dict[str, str], repr=False)
    """What the program finds in its environment besides the guest's default one."""
    workdir: str | None = None
    """Absolute, in the guest; None: the user's home."""
    workspace: Path | None = None
    """A directory of ours that is the working directory, and comes back."""
    uploads: tuple[Upload, ...] = ()
    downloads: tuple[Download, ...] = ()
    timeout: float = math.inf
    """Seconds that the program may run, starting and building not counted."""
    quiet: bool = False
    timings: bool = False
    trace: bool = False
    json: bool = False

    def place(self, remote: str) -> str:
        """Return where in the guest a path leads that may be relative to the working directory."""
        return posixpath.join(self.workdir or "", remote)


@attrs.define
class Timings:
    """How long each step took, in order."""

    began: float = attrs.field(factory=trio.current_time)
    last: float = attrs.field(default=attrs.Factory(lambda self: self.began, takes_self=True))
    steps: list[tuple[str, float]] = attrs.field(factory=list[tuple[str, float]])

    def lap(self, step: str) -> None:
        """End a step."""
        now = trio.current_time()
        self.steps.append((step, now - self.last))
        self.last = now

    @contextlib.contextmanager
    def step(self, step: str) -> Generator[None]:
        """Do a step in the block, and have a trace show it."""
        with span(step):
            yield
        self.lap(step)

    def __str__(self) -> str:
        rows = [*self.steps, ("total", sum(duration for _, duration in self.steps))]
        return "\n".join(f"  {step:24}{duration:8.3f} s" for step, duration in rows)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    if options.code is None and options.words[:1] in ([], ["-"]) and os.isatty(0):
        complain("reading the code from the terminal; Ctrl-D ends it")
    workdir = options.workdir
    if options.workspace is not None and workdir is None:
        workdir = _WORKSPACE
    try:
        if options.workspace is not None and not options.workspace.is_dir():
            raise NotADirectoryError(f"--workspace: there is no directory {str(options.workspace)!r}")
        request = RunRequest(
            program=find_program(
                code=options.code,
                words=options.words,
                language=options.language,
                image=options.image,
                packages=options.packages,
                uploads=options.uploads,
                workspace=options.workspace,
            ),
            host=host_config(options),
            sandbox=sandbox_config(options),
            environment=dict(map(_find_variable, options.environment)),
            workdir=workdir,
            workspace=options.workspace,
            uploads=tuple(options.uploads),
            downloads=tuple(each.resolve() for each in options.downloads),
            timeout=options.timeout,
            quiet=options.quiet,
            timings=options.timings,
            trace=options.trace,
            json=options.json,
        )
        for upload in request.uploads:
            upload.local.lstat()
    except (OSError, ValueError) as exc:
        complain(str(exc))
        return _status.USAGE
    return trio.run(run_until_signal, request)


def _find_variable(item: tuple[str, str | None]) -> tuple[str, str]:
    name, value = item
    if value is None:
        value = os.environ.get(name)
    if value is None:
        raise ValueError(f"-e {name}: it is not set here; write {name}=VALUE to give it a value")
    return name, value


async def run_until_signal(
    request: RunRequest, *, open_host: OpenHost = open_host, write: Write = write_output, read: Read = read_input
) -> int:
    """Run the request until it is over or a signal comes."""
    return await end_on_signal(partial(run_request, request, open_host=open_host, write=write, read=read))


async def run_request(request: RunRequest, *, open_host: OpenHost, write: Write, read: Read) -> int:
    """Run the program and pass on its output as it comes; return the exit status."""
    program = request.program
    collected = Collected(request.sandbox.max_output_bytes) if request.json else None
    with contextlib.ExitStack() as recorded, contextlib.ExitStack() as display:
        if request.trace:
            recorded.callback(show_trace, recorded.enter_context(record()))  # also what comes of a start that fails
        show: ShowProgress = display.enter_context(open_progress(quiet=request.quiet))
        timings = Timings()
        async with contextlib.AsyncExitStack() as stack:
            with timings.step("starting the host"):
                host = await stack.enter_async_context(open_host(attrs.evolve(request.host, progress=show)))
            with timings.step("preparing the image"):
                await host.prepare(program.image)
            async with host.open_sandbox(program.image, request.sandbox) as sandbox:
                timings.lap(f"booting ({sandbox.accelerator})")
                display.close()  # what the program prints has the terminal to itself
                with timings.step("copying files there"):
                    await _upload(sandbox, request)
                with timings.step("running the code"):
                    outcome = await _run(
                        sandbox, request, write if collected is None else collected.write, read, timings.began
                    )
                with timings.step("copying files back"):
                    status = await _download(sandbox, request, outcome.status)
                    status = await _bring_back(sandbox, request, status)
        timings.lap("closing")
    if outcome.timed_out:
        complain(f"stopped after {request.timeout:g} seconds (--timeout)")
    if outcome.oom:
        complain("killed for want of memory; --memory gives it more")
    if collected is not None:
        await write("stdout", collected.as_json(outcome, program, sandbox.accelerator))
    if request.timings:
        print(timings, file=sys.stderr)
    return status


async def _upload(sandbox: Sandbox, request: RunRequest) -> None:  # noqa: ASYNC910 - often there is nothing to do
    """Put the program, and what is to be beside it, into the guest."""
    if request.workdir is not None:
        await sandbox.path(request.workdir).mkdir(parents=True, exist_ok=True)
    if request.workspace is not None and request.workdir is not None:
        await sandbox.push(request.workspace, sandbox.path(request.workdir))
    for upload in request.uploads:
        remote = sandbox.path(request.place(upload.remote))
        await remote.parent.mkdir(parents=True, exist_ok=True)
        await sandbox.upload(upload.local, remote)
    if request.program.name is not None:
        await sandbox.path(request.place(request.program.name)).write_bytes(request.program.content)


async def _run(sandbox: Sandbox, request: RunRequest, write: Write, read: Read, began: float) -> Outcome:
    argv = request.program.argv
    if request.environment:
        # In the guest: what `open_process` is given would take the place of the default environment.
        argv = ("env", "--", *(f"{name}={value}" for name, value in request.environment.items()), *argv)
    given = request.program.stdin
    started, used = trio.current_time(), sandbox.usage().cpu_seconds
    first_output: float | None = None
    ended: Ended | None = None

    async def pass_on(stream: Stream, data: bytes) -> None:
        nonlocal first_output
        if first_output is None:
            first_output = trio.current_time()
            add_span("first output", first_output - started)
        await write(stream, data)

    with trio.move_on_after(request.timeout):
        ended = await run_process(
            sandbox, argv, cwd=request.workdir, write=pass_on, read=read if given is None else _once(given)
        )
    now, used = trio.current_time(), sandbox.usage().cpu_seconds - used
    timings = RunTimings(
        sent=started - began, first_output=None if first_output is None else first_output - began, ended=now - began
    )
    if ended is None:
        return Outcome(status=_status.TIMEOUT, timings=timings, cpu_seconds=used, timed_out=True)
    return Outcome(status=ended.status, timings=timings, cpu_seconds=used, oom=ended.oom)


def _once(data: bytes) -> Read:
    """Return what reads *data* and then the end."""
    pieces = [data]

    async def read() -> bytes:
        await trio.lowlevel.checkpoint()
        return pieces.pop() if pieces else b""

    return read


async def _download(sandbox: Sandbox, request: RunRequest, status: int) -> int:
    """Fetch what is wanted, also of a program that failed; return the exit status."""
    for download in request.downloads:
        try:
            await sandbox.download(sandbox.path(request.place(download.remote)), download.local)
        except OSError as exc:
            complain(f"{download.remote} was not downloaded: {exc.strerror or exc}: {exc.filename}")
            status = status or _status.SANDBOX_FAILURE
    return status  # noqa: ASYNC910 - often there is nothing to do


async def _bring_back(sandbox: Sandbox, request: RunRequest, status: int) -> int:
    """Bring back what was changed in the workspace, also by a program that failed; return the exit status."""
    await trio.lowlevel.checkpoint()
    if request.workspace is None or request.workdir is None:
        return status
    there = sandbox.path(request.workdir)
    try:
        changes = await sandbox.pull(there, request.workspace, on_conflict="skip", exclude=_NOT_BROUGHT_BACK)
    except OSError as exc:
        complain(
            f"{request.workspace} was not brought up to date: {exc.strerror or exc}: {quote_guest(str(exc.filename))}"
        )
        return status or _status.SANDBOX_FAILURE
    for change in changes:
        if change.conflict:
            complain(f"{request.workspace}: not {change}")
            status = status or _status.SANDBOX_FAILURE
        elif not request.quiet:
            print(f"{request.workspace}: {change}", file=sys.stderr)
    return status
