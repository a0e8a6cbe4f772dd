"""Service "code": source text for a language's persistent interpreter.

A record stream. The host sends JSON, the first of it in the stream's header as "request" if it is short enough:

    {"language": str, "code": str, "display_limit": bytes}
    and if wanted "functions": {"stream": id, "names": [..]},
    "stdin": id, "env": {..}, "cwd": str, "deadline": seconds, "grace": seconds, "warm_up": true
    {"interrupt": true}   SIGINT to the interpreter's process group
    {"kill": true}        SIGKILL to everything that the interpreter ever started
    {"deadline": seconds | null}  instead of the one before

and gets what the run prints as records STDOUT and STDERR in order of arrival, and among them what it shows: this in
JSON, and the bytes as records DISPLAY that nothing comes between. There are none if they were more than "display_limit".

    {"display": {"mime": type, "size": bytes, "item": n}}      the forms of one object have one number

Then JSON and the end:

    {"finished": {"exit_code": n, "value": str | null, "restarted": bool, "state_kept": bool, "expired": bool,
                  "oom": bool, "used": [microseconds, KiB, blocks]}}
    {"failed": {"errno": n, "strerror": str, "filename": str | null}}     nothing was run

*warm_up*: it is none of the user's runs, which count those: tracebacks call it `<warm-up 1>`, and the first of theirs `<run 1>`.
*value*: the text of what the code's last expression came to, where it is one and did not come to nothing.
*used*: the processor time of the interpreter and of all that it started, from the beginning of the run to its end; the most memory that the
interpreter had meanwhile, 0 if that is not counted; and how many blocks of 512 bytes it and what it waited for wrote to disks, or -1.
*restarted*: the run had a new interpreter because the one before ended, with its variables. *state_kept*: the
interpreter lives on. *oom*: the interpreter was killed because there was no memory left, which an exception of its code's, as `MemoryError`, is not.
*expired*: at its deadline we interrupted it, and killed it *grace* seconds later if it had not
ended, without being told to. A host that is there tells us, and tells us when the deadline moves. When an
interpreter ends so does all that it started, and "finished" waits for that.
A host that ends the stream before "finished" gives the run up, and with it the interpreter that has taken it. A run that
is interrupted, killed or given up before an interpreter has taken it is not begun, and ends as if a signal had ended it.
One whose interpreter ends before it has begun it has a new interpreter, once; its input and its functions wait for it to have begun.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import cast, final

import trio

from ...wire import ChannelStream, RecordStream
from .attendant import Attendant
from .children import Child, Children
from .functions import FunctionPipes, parse_functions
from .interpreter import REMINDERS, Interpreter
from .languages import LANGUAGES, PYTHON, Language, StartedInterpreter, start_interpreter
from .pipes import NoSuchPipeError, ParkedPipes, discard
from .processes import (
    REQUEST_LIMIT,
    BadRequestError,
    parse_environment,
    parse_pipe,
    parse_seconds,
    parse_size,
    parse_string,
    parse_text,
)
from .run import Run

#: Seconds for a run to heed its being interrupted, once nobody wants it any more, before its interpreter is killed.
_ABANDON_GRACE = 5.0
#: Pipes of past runs that something in the background still holds, and that are read for its sake.
_LEFTOVER_LIMIT = 64


@final
class CodeService:
    """Runs code for the host, one run at a time in each language.

    Args:
      children: Where interpreters come from.
      pipes: Where their input comes from.
      user: Number of the user that they run as; None: ours.

    """

    def __init__(self, children: Children, pipes: ParkedPipes, user: int | None) -> None:
        self._children = children
        self._user = user
        self._pipes = pipes
        self._keepers: dict[str, _Keeper] = {}
        self._nursery: trio.Nursery | None = None
        self._leftovers: list[trio.CancelScope] = []

    async def run(self, prestarted: StartedInterpreter | None, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep the interpreters until cancelled.

        Args:
          prestarted: An interpreter that was asked for before we were there; it is the first child that
            *children* adopted.
          task_status: Tells when runs can be served.

        """
        async with trio.open_nursery() as self._nursery:
            for language in LANGUAGES.values():
                keeper = _Keeper(language, self._children, self._user, self._keep_reading)
                self._keepers[language.name] = keeper
                is_first = prestarted is not None and prestarted.language is language
                self._nursery.start_soon(keeper.keep, prestarted if is_first else None)
            task_status.started()

    def begin(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[None] | None:
        """Begin to serve one run; return what is left to be awaited, None if it is over.

        A short run is over here: without a task, and the turns of the scheduler that go with it, it takes half the time.
        """
        records = RecordStream(stream, limit=REQUEST_LIMIT)
        request = header.get("request")
        return self._receive_and_serve(records) if request is None else self._begin(records, request)

    async def _receive_and_serve(self, records: RecordStream) -> None:
        request = await records.receive_json()
        if request is not None and (serving := self._begin(records, request)) is not None:
            await serving

    def _begin(self, records: RecordStream, request: object) -> Awaitable[None] | None:
        try:
            if not isinstance(request, dict):
                raise BadRequestError(f"a request must be an object, not {request!r:.80}")
            request = cast("dict[str, object]", request)
            number = parse_pipe(request.get("stdin"), "stdin")
            functions = parse_functions(request.get("functions"))
            run = Run(
                records,
                parse_string(request.get("code"), "code"),
                parse_environment(request.get("env")),
                parse_text(request.get("cwd"), "cwd"),
                parse_size(request.get("display_limit"), "display_limit"),
                trio.current_time() + parse_seconds(request.get("deadline"), "deadline"),
                parse_seconds(request.get("grace"), "grace"),
            )
            run.is_warm_up = request.get("warm_up") is True
            keeper = self._keepers.get(parse_string(request.get("language"), "language"))
        except BadRequestError as exc:
            records.stream.reset(str(exc))
            return None
        if keeper is None:
            return run.fail(_unknown_language(request))
        if number is None and functions is None:
            return keeper.begin(run)
        return self._run_with_streams(keeper, run, number, functions)

    async def _run_with_streams(
        self, keeper: _Keeper, run: Run, number: int | None, functions: tuple[int, list[str]] | None
    ) -> None:
        try:
            async with AsyncExitStack() as stack:
                run.begun = trio.Event()
                if number is not None:
                    run.stdin = await stack.enter_async_context(self._pipes.take(number))
                if functions is not None:
                    calls = await stack.enter_async_context(self._pipes.take(functions[0]))
                    run.functions = FunctionPipes(calls, functions[1])
                if (serving := keeper.begin(run)) is not None:
                    await serving
        except NoSuchPipeError as exc:
            run.records.stream.reset(str(exc))

    def renew(self, hello: Mapping[str, object]) -> None:
        """Tell the interpreters that they are another machine's now, by the hello of its host."""
        entropy = str(hello.get("entropy")).encode()
        for keeper in self._keepers.values():
            keeper.renew(entropy)

    def abandon_runs(self) -> None:
        """Interrupt the runs, whose host is gone, and end the interpreters that do not heed it.

        For a machine that goes on as another: variables survive the end of a run where they can. The next run waits for that.
        """
        assert self._nursery is not None
        for keeper in self._keepers.values():
            keeper.abandon_run(self._nursery)

    def count_idle(self) -> int:
        """Tell how many interpreters there are that no run has."""
        return sum(keeper.is_idle for keeper in self._keepers.values())

    def has_only_python(self) -> bool:
        """Whether there are no interpreters but Python's."""
        return not any(keeper.is_there for name, keeper in self._keepers.items() if name != PYTHON.name)

    def _keep_reading(self, descriptor: int) -> None:
        assert self._nursery is not None
        scope = trio.CancelScope()
        self._leftovers.append(scope)
        if len(self._leftovers) > _LEFTOVER_LIMIT:
            self._leftovers.pop(0).cancel(reason="too many pipes of past runs are held")
        self._nursery.start_soon(self._discard, descriptor, scope)

    async def _discard(self, descriptor: int, scope: trio.CancelScope) -> None:
        with scope:
            await discard(descriptor)
        if scope in self._leftovers:
            self._leftovers.remove(scope)


def _unknown_language(request: dict[str, object]) -> OSError:
    known = ", ".join(LANGUAGES)
    return OSError(errno.EINVAL, f"no language {request['language']!r:.80}; there are: {known}")


@final
class _Keeper:
    """Keeps an interpreter of one language, and starts another when it ends."""

    def __init__(
        self, language: Language, children: Children, user: int | None, keep_reading: Callable[[int], None]
    ) -> None:
        self._language = language
        self._children = children
        self._user = user
        self._keep_reading = keep_reading
        self._interpreter: Interpreter | None = None
        self._wanted = trio.Event()
        self._changed = trio.Event()
        self._state_lost = False
        self._run: Run | None = None

    async def keep(self, prestarted: StartedInterpreter | None) -> None:
        """Have an interpreter whenever one is wanted, until cancelled."""
        run: Run | None = None  # that the one before has not begun
        while True:
            if prestarted is not None:
                child, started = self._children.adopted[0], prestarted
                prestarted = None
            else:
                if run is None:
                    await self._wanted.wait()
                child, started = self._spawn()
            interpreter = Interpreter(self._language, child, started, self._user, self._keep_reading)
            self._set(interpreter)
            if run is not None and not self._start(run, interpreter):
                await run.fail(OSError(errno.EAGAIN, "two interpreters ended before they began the run"))
                interpreter.kill()
            run = await interpreter.serve()
            self._set(None)
            # One that did its work is followed at once, for the next run not to wait. One that
            # never did may fail again and again.
            if interpreter.used and interpreter.failure is None:
                self._state_lost = True
            else:
                self._wanted = trio.Event()

    @property
    def is_there(self) -> bool:
        """Whether there is an interpreter."""
        return self._interpreter is not None

    @property
    def is_idle(self) -> bool:
        """Whether there is an interpreter, and it waits for a run."""
        return self._interpreter is not None and (self._run is None or self._run.over.is_set())

    def renew(self, entropy: bytes) -> None:
        """See `Interpreter.renew`."""
        if self._interpreter is not None:
            self._interpreter.renew(entropy)

    def abandon_run(self, nursery: trio.Nursery) -> None:
        """Interrupt the run that the interpreter has, and have *nursery* see to its end."""
        run = self._run
        if run is not None and (interpreter := self._find(run)) is not None:
            run.given_up = run.abandoned = True
            run.stopped = -signal.SIGINT
            interpreter.interrupt()
            nursery.start_soon(_end_abandoned_run, run, interpreter)

    def _spawn(self) -> tuple[Child, StartedInterpreter]:
        child: list[Child] = []
        started = start_interpreter(
            self._language, lambda request, descriptors: child.append(self._children.start(request, descriptors))
        )
        return child[0], started

    def _set(self, interpreter: Interpreter | None) -> None:
        self._interpreter = interpreter
        self._changed.set()
        self._changed = trio.Event()

    def begin(self, run: Run) -> Awaitable[None] | None:
        """Begin to serve *run*; return what is left to be awaited, None if it is over."""
        interpreter = self._interpreter
        if not self.is_idle or interpreter is None or not self._start(run, interpreter):
            return self._serve_in_turn(run)
        if run.over.is_set() and not run.has_streams:
            return None
        return Attendant(run, self._find, waits=False).attend()

    def _find(self, run: Run) -> Interpreter | None:
        """Return the interpreter that has *run*."""
        interpreter = self._interpreter
        return interpreter if interpreter is not None and interpreter.has(run) else None

    def _start(self, run: Run, interpreter: Interpreter) -> bool:
        run.restarted = self._state_lost
        if not interpreter.is_free or not interpreter.start(run):
            return False
        self._state_lost = False
        self._run = run
        return True

    async def _serve_in_turn(self, run: Run) -> None:
        attendant = Attendant(run, self._find, waits=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_and_feed, run, attendant)
            await attendant.obey()
            nursery.cancel_scope.cancel(reason="the run is over")

    async def _wait_and_feed(self, run: Run, attendant: Attendant) -> None:
        assert attendant.waiting is not None
        failure = None
        try:
            with attendant.waiting as waiting:
                failure = await self._wait_turn(run, attendant)
            if failure is not None:
                await run.fail(failure)
            elif waiting.cancelled_caught:
                await run.finish([], run.stopped, state_kept=True)
        finally:
            if attendant.waits:
                run.over.set()
        if not attendant.waits and run.has_streams:
            await run.carry()

    async def _wait_turn(self, run: Run, attendant: Attendant) -> OSError | None:
        """Wait until an interpreter has taken *run*; return why none will."""
        if not await self._is_free():
            return OSError(errno.EBUSY, "the interpreter is busy with another run")
        self._run = run
        while True:
            while self._interpreter is None:
                self._wanted.set()
                await self._changed.wait()
            interpreter = self._interpreter
            await interpreter.settle()
            if run.records.stream.has_news:
                # What the host has said meanwhile comes first: it may not want the run any more.
                await trio.lowlevel.checkpoint()
                continue
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._start(run, interpreter):
                attendant.waiting = None
                return None
            interpreter.kill()
            await interpreter.wait_over()
            if interpreter.failure is not None:
                return interpreter.failure

    async def _is_free(self) -> bool:
        """Whether no run has the interpreter; one that its host gave up is waited for."""
        last = self._run
        if last is not None and not last.over.is_set():
            # The end of its stream may have come together with this request, and its task has a turn to see it first.
            await trio.lowlevel.checkpoint()
            if last.given_up:
                await last.over.wait()
        return self._run is None or self._run.over.is_set()


async def _end_abandoned_run(run: Run, interpreter: Interpreter) -> None:
    """Wait for the end of a run that was interrupted, and bring it about if need be."""
    with trio.move_on_after(_ABANDON_GRACE):
        for pause in REMINDERS:
            with trio.move_on_after(pause):
                await run.over.wait()
                return
            interpreter.remind()
        await run.over.wait()
    if interpreter.has(run):
        interpreter.kill()
