"""Service "process": one process with its descendants, for as long as the host keeps the stream open.

A record stream of JSON. The host asks first, and may ask for more while the process runs:

    {"argv": [...], "env": {..} | null, "cwd": str | null, "user": str | int | null,
     "stdin": id | null, "stdout": id | null, "stderr": id | "stdout" | null,     ids of "pipe" streams; null is /dev/null
     "deadline": seconds | null,     after which it is killed, with all of its descendants, without the host
     "more_env": {..},               maybe: variables besides those that it would get with "env" null
     "leaves": true}                 maybe: its output ends when it does, whoever else holds it, and "leave" may come
    {"signal": n}                   to the process
    {"kill": true}                  to it and all of its descendants
    {"deadline": seconds | null}    when to kill by ourselves, from now on
    {"resize": [rows, columns]}     its terminal
    {"leave": true}                 it is over; what it has left behind goes on, and the host ends the stream

With "terminal": {"stdio": id, "rows": n, "columns": n, "term": TERM} in the first request it gets a terminal in place of
the three. The end of the stream "stdio" hangs the terminal up, and where no process has it open any more the stream ends.

    {"started": pid}    or {"failed": {"errno": n, "strerror": str, "filename": str}} and the end
    {"exited": {"status": n, "expired": bool, "oom": bool, "used": [microseconds, KiB, blocks]}}    and the end

*status*: as `subprocess.Popen.returncode`. *expired*: it was killed at its deadline. *oom*: it was killed for want of memory. *used*: processor
time, memory at the most, and what was written to disks, of the process and of all that it has waited for.

"exited" is sent when the process has ended, or after "kill" when none of its descendants is left either. What it
printed may still be on its way: each pipe has an end of its own. When the host ends the stream, whatever is left is killed,
unless it said "leave".
"""

from __future__ import annotations

import contextlib
import math
import os
from contextlib import AsyncExitStack
from typing import cast, final

import trio

from ...wire import ChannelStream, RecordStream
from .children import Child, Children
from .pipes import NoSuchPipeError, ParkedPipes, Stragglers, Terminal, drain, drain_and_discard, feed, open_pipe

#: Bytes of one request. JSON writes a character that is not ASCII with up to three times the bytes of UTF-8.
REQUEST_LIMIT = 32 * 2**20

_HIGHEST_SIGNAL = 64
#: Characters of a name, and of a reason, in an answer.
_LONGEST_NAME, _LONGEST_REASON = 4096, 1000
#: Rows or columns; what the kernel keeps of them.
_LARGEST_SIZE = 65535
#: Stands among the numbers of descriptors for all three of a terminal.
_TERMINAL = -1


class BadRequestError(Exception):
    """The host asked for what no host of ours asks."""


@final
class ProcessService:
    """Starts processes for the host."""

    def __init__(self, children: Children, pipes: ParkedPipes) -> None:
        self._children = children
        self._pipes = pipes

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one process."""
        records = RecordStream(stream, limit=REQUEST_LIMIT)
        message = await records.receive_json()
        if message is None:
            return
        try:
            request = _Request(message)
            # The pipes are let go of last, when no task uses them any more.
            async with AsyncExitStack() as stack:
                pipes = {
                    target: await stack.enter_async_context(self._pipes.take(number))
                    for target, number in request.pipes.items()
                }
                await self._serve_process(records, request, pipes)
        except (BadRequestError, NoSuchPipeError) as exc:
            stream.reset(str(exc))

    async def _serve_process(self, records: RecordStream, request: _Request, pipes: dict[int, ChannelStream]) -> None:
        async with trio.open_nursery() as nursery:
            theirs: dict[int, int] = {}
            stragglers = Stragglers()
            try:
                for target, stream in pipes.items():
                    if target == _TERMINAL:
                        continue
                    ours, theirs[target] = open_pipe(for_writing=target == 0)
                    if target == 0:
                        nursery.start_soon(feed, stream, ours)
                    elif request.leaves:
                        nursery.start_soon(drain_and_discard, ours, stream, stragglers)
                    else:
                        nursery.start_soon(drain, ours, stream)
                if request.merge_stderr and 1 in theirs:
                    theirs[2] = os.dup(theirs[1])
                child = await self._children.spawn(
                    request.argv,
                    env=request.env,
                    cwd=request.cwd,
                    user=request.user,
                    descriptors=theirs,
                    terminal=request.terminal,
                    more_env=request.more_env,
                )
            except OSError as exc:
                # The tasks end with the pipes, which nobody else has.
                await records.send_json({"failed": failure_fields(exc)}, end=True)
                return  # noqa: ASYNC121  nothing is cancelled: it waits for those tasks
            finally:
                for descriptor in theirs.values():
                    os.close(descriptor)
            terminal = None
            if _TERMINAL in pipes:
                terminal = Terminal(child.descriptors[0], pipes[_TERMINAL], child.wait, stragglers)
                nursery.start_soon(terminal.carry)
            process = _Process(child, records, terminal, request.deadline, stragglers if request.leaves else None)
            try:
                # A host that gave the stream up has ended it as well; where the channel failed, that is told elsewhere.
                with contextlib.suppress(trio.BrokenResourceError):
                    await records.send_json({"started": child.pid})
                    nursery.start_soon(process.report)
                    await process.obey()
            finally:
                if not process.left:
                    child.kill()
            if not process.left:
                nursery.cancel_scope.cancel(reason="the host ended the process's stream")


@final
class _Request:
    """A request that was checked, as far as it is for us to check."""

    def __init__(self, message: dict[str, object]) -> None:
        self.argv = _parse_argv(message.get("argv"))
        self.env = parse_environment(message.get("env"))
        self.more_env = parse_environment(message.get("more_env"))
        self.cwd = parse_text(message.get("cwd"), "cwd")
        user = message.get("user")
        self.user = user if type(user) is int else parse_text(user, "user")
        self.deadline = trio.current_time() + parse_seconds(message.get("deadline"), "deadline")
        self.merge_stderr = message.get("stderr") == "stdout"
        self.leaves = message.get("leaves") is True
        self.pipes: dict[int, int] = {}
        self.terminal: tuple[int, int, str] | None = None
        match message.get("terminal"):
            case None:
                pass
            case {"stdio": int(stdio), "rows": int(rows), "columns": int(columns), "term": str(term)}:
                self.pipes[_TERMINAL] = stdio
                self.terminal = _parse_edge(rows), _parse_edge(columns), term
                return
            case terminal:
                raise BadRequestError(f"not a terminal: {terminal!r:.80}")
        for target, name in enumerate(("stdin", "stdout", "stderr")):
            number = parse_pipe(message.get(name), name) if target < 2 or not self.merge_stderr else None
            if number is not None:
                self.pipes[target] = number


@final
class _Process:
    def __init__(
        self,
        child: Child,
        records: RecordStream,
        terminal: Terminal | None,
        deadline: float,
        stragglers: Stragglers | None,
    ) -> None:
        self.left = False
        """What it started goes on without it and the host."""
        self._child = child
        self._stragglers = stragglers
        self._terminal = terminal
        self._records = records
        self._deadline = deadline
        self._expired = False
        self._killed = False

    async def report(self) -> None:
        """Tell the host when it is over."""
        status = await self._child.wait()
        if self._stragglers is not None:
            self._stragglers.begin()
        if self._killed:
            await self._child.wait_empty()
        with contextlib.suppress(trio.BrokenResourceError):
            child = self._child
            end = {"status": status, "expired": self._expired, "oom": child.oom_killed, "used": child.used}
            await self._records.send_json({"exited": end}, end=True)

    async def obey(self) -> None:
        """Take requests until the host ends the stream."""
        while True:
            try:
                request = await receive_before(self._deadline, self._records)
            except trio.TooSlowError:
                self._deadline = math.inf
                self._expired = self._child.returncode is None
                self._kill()
                continue
            if request is None:
                return
            try:
                self._grant(request)
            except BadRequestError as exc:
                # Told here: from the nursery that we run in, it would come as a group.
                self._records.stream.reset(str(exc))
                return

    def _grant(self, request: dict[str, object]) -> None:
        match request:
            case {"signal": int(signum)} if 0 < signum <= _HIGHEST_SIGNAL:
                self._child.signal(signum)
            case {"kill": True}:
                self._kill()
            case {"leave": True} if self._stragglers is not None and self._child.returncode is not None:
                self.left = True
            case {"deadline": seconds}:
                self._deadline = trio.current_time() + parse_seconds(seconds, "deadline")
            case {"resize": [int(rows), int(columns)]} if self._terminal is not None:
                self._terminal.resize(_parse_edge(rows), _parse_edge(columns))
            case _:
                raise BadRequestError(f"not a request to a running process: {request!r:.80}")

    def _kill(self) -> None:
        self._killed = True
        self._child.kill()


async def receive_before(deadline: float, records: RecordStream) -> dict[str, object] | None:
    """Return the next request, or None after the last; `trio.TooSlowError` if *deadline* passes before it is there."""
    if deadline == math.inf:  # most have none, and a scope takes time to enter
        return await records.receive_json()
    with trio.fail_at(deadline):
        return await records.receive_json()


def failure_fields(error: OSError) -> dict[str, object]:
    """Return what the host needs to raise *error* again. What the host itself had sent may be as long as any request."""
    filename = None if error.filename is None else str(cast("object", error.filename))[:_LONGEST_NAME]
    reason = (error.strerror or str(error))[:_LONGEST_REASON]
    return {"errno": error.errno or 0, "strerror": reason, "filename": filename}


def _parse_argv(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadRequestError(f"argv must be a list that is not empty, not {value!r:.80}")
    return [parse_string(argument, "an argument") for argument in cast("list[object]", value)]


def _parse_edge(value: int) -> int:
    if not 0 < value <= _LARGEST_SIZE:
        raise BadRequestError(f"a terminal has from 1 to {_LARGEST_SIZE} rows and columns, not {value}")
    return value


def parse_environment(value: object) -> dict[str, str] | None:
    """Check and return a request's environment."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequestError(f"env must be an object or null, not {value!r:.80}")
    items = cast("dict[str, object]", value).items()
    return {name: parse_string(text, f"the variable {name!r:.80}") for name, text in items}


def parse_text(value: object, what: str) -> str | None:
    """Check and return a string of a request, or null."""
    return None if value is None else parse_string(value, what)


def parse_string(value: object, what: str) -> str:
    """Check and return a string of a request."""
    if type(value) is not str:
        raise BadRequestError(f"{what} must be a string, not {value!r:.80}")
    return value


def parse_seconds(value: object, what: str) -> float:
    """Check and return a duration of a request; infinity for null."""
    match value:
        case None:
            return math.inf
        case int(seconds) | float(seconds):
            try:
                return float(seconds)
            except OverflowError as exc:
                raise BadRequestError(f"{what} is out of range") from exc
        case _:
            raise BadRequestError(f"{what} must be some seconds or null, not {value!r:.80}")


def parse_pipe(value: object, what: str) -> int | None:
    """Check and return the id of a stream in a request, or null."""
    if value is None or type(value) is int:
        return value
    raise BadRequestError(f"{what} must be a stream's id or null, not {value!r:.80}")


def parse_size(value: object, what: str) -> int:
    """Check and return a number of bytes in a request."""
    if type(value) is int and value >= 0:
        return value
    raise BadRequestError(f"{what} must be a number of bytes, not {value!r:.80}")
