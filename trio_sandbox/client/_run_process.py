"""Processes in the guest that are run to their end, with the vocabulary of `trio.run_process`."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from .._errors import OutcomeUnknownError, OutputLimitError
from .._nurseries import hide_nursery
from .._results import ProcessFailedError
from ..constants import OUTPUT_TAIL_BYTES
from ._failures import STREAM_GONE
from ._messages import input_bytes
from ._output import Tail
from ._process import GuestOutput, GuestProcess
from ._terminal import Terminal

#: Seconds from the end of a process that failed until the end of its standard error, which is on another stream.
_LAST_WORDS_PATIENCE: Final = 1.0


async def run_process(
    open_process: Callable[..., AbstractAsyncContextManager[GuestProcess]],
    command: Sequence[object] | str,
    *,
    stdin: bytes | bytearray | memoryview,
    capture_stdout: bool,
    capture_stderr: bool,
    stderr_to_stdout: bool,
    check: bool,
    shell: bool,
    env: Mapping[str, str] | None,
    cwd: object,
    user: str | int | None,
    pty: bool | Terminal,
    limit: int,
    task_status: trio.TaskStatus[GuestProcess],
) -> subprocess.CompletedProcess[bytes]:
    """What `Sandbox.run_process` does."""
    data = input_bytes(stdin)
    if shell:
        if not isinstance(command, str):
            raise TypeError("with shell=True `command` must be one string")
        command = ["/bin/sh", "-c", command]
    elif isinstance(command, str):
        raise TypeError("`command` must be a sequence of arguments; for a shell command line pass shell=True")
    if capture_stderr and stderr_to_stdout:
        raise ValueError("`capture_stderr` and `stderr_to_stdout` exclude each other")
    if pty and capture_stderr:
        raise ValueError("with a terminal there is one output; use capture_stdout in place of `capture_stderr`")
    output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    # What is not captured is discarded, but for the end of what explains a failure.
    explains = check and not (capture_stderr or stderr_to_stdout or pty)
    lost: list[Exception] = []

    async def gather(name: str, stream: trio.abc.ReceiveStream) -> None:  # noqa: ASYNC910 - reading is a checkpoint
        try:
            async for data in stream:
                buffer = output[name]
                buffer += data
                if len(buffer) > limit:
                    del buffer[limit:]
                    raise OutputLimitError(
                        f"{process.args[0]!r} printed more than {limit} bytes to {name} and was ended; raise "
                        "SandboxConfig.max_output_bytes, write to a file, or use Sandbox.open_process()",
                        stdout_bytes=bytes(output["stdout"]),
                        stderr_bytes=bytes(output["stderr"]),
                    )
        except STREAM_GONE as exc:
            lost.append(exc)  # one failure, one route: where the machine is gone, wait() says so
            await trio.lowlevel.checkpoint()

    async def feed(stream: trio.abc.SendStream) -> None:
        # Like trio.run_process: a process that does not want its input is nobody's error.
        try:
            await stream.send_all(data)
        except STREAM_GONE:
            await trio.lowlevel.checkpoint()
        else:
            if not pty:  # closing a terminal would end the process
                await stream.aclose()

    async def discard(stream: trio.abc.ReceiveStream) -> None:  # noqa: ASYNC910 - reading is a checkpoint
        with contextlib.suppress(*STREAM_GONE):
            async for _ in stream:
                pass

    async with open_process(
        command,
        stdin=len(data) > 0,
        stdout=capture_stdout,
        stderr="stdout" if stderr_to_stdout else "pipe" if capture_stderr or explains else "discard",
        env=env,
        cwd=cwd,
        user=user,
        pty=pty,
    ) as process:
        task_status.started(process)
        async with _listening(process.stderr if explains else None) as last_words:
            with hide_nursery("Sandbox.run_process()"):
                async with trio.open_nursery() as nursery:
                    if process.stdin is not None:
                        nursery.start_soon(feed, process.stdin)
                    if process.stdout is not None:
                        nursery.start_soon(gather, "stdout", process.stdout)
                    if process.stderr is not None and capture_stderr:
                        nursery.start_soon(gather, "stderr", process.stderr)
                    if process.stdio is not None:
                        nursery.start_soon(feed, process.stdio)
                        if capture_stdout:
                            nursery.start_soon(gather, "stdout", process.stdio)
                        else:  # a terminal that nobody reads would make the process wait
                            nursery.start_soon(discard, process.stdio)
            returncode = await process.wait()
            if lost:
                raise OutcomeUnknownError(f"the guest broke off the output of {process.args[0]!r}") from lost[0]
            said = await last_words() if check and returncode else b""
    stdout = bytes(output["stdout"]) if capture_stdout else None
    stderr = bytes(output["stderr"]) if capture_stderr else None
    if check and returncode:
        if not explains:  # with one output for both, it is in stdout
            said = bytes(output["stderr" if capture_stderr else "stdout"][-OUTPUT_TAIL_BYTES:])
        raise ProcessFailedError(returncode, process.args, stdout, stderr, said, process.oom)
    return subprocess.CompletedProcess(process.args, returncode, stdout, stderr)


@asynccontextmanager
async def _listening(stream: GuestOutput | None) -> AsyncGenerator[Callable[[], Awaitable[bytes]]]:
    """Read *stream* for a block, and yield a function that returns its end once the process is over.

    What the process has left in the background may hold the stream for ever, and is not waited for.
    """
    tail = Tail()
    ended = trio.Event()

    async def listen(stream: GuestOutput) -> None:  # noqa: ASYNC910 - the stream has them
        with contextlib.suppress(*STREAM_GONE):
            async for data in stream:
                tail.add(data)
        ended.set()

    async def last_words() -> bytes:
        with trio.move_on_after(_LAST_WORDS_PATIENCE):
            await ended.wait()
        return bytes(tail)

    if stream is None:
        ended.set()
        yield last_words
        return
    with hide_nursery("Sandbox.run_process()"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, stream)
            yield last_words
            nursery.cancel_scope.cancel(reason="the process is over")
