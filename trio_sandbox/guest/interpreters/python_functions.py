"""The functions of the host that the code of a run may call, as globals of that run.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

- Calls go to one pipe and answers come from another, a line each: "NUMBER NAME [[ARGUMENT, ...], {NAME: ARGUMENT}]", and
  "NUMBER r RESULT" or "NUMBER e MESSAGE", all but the first two in JSON.
- Any thread may call. Two threads of ours read and write while there is something to read or write, and are gone
  otherwise: so an interrupt, which is the main thread's, never breaks a line off.
- A process that the code forks off has none of it: an answer that it took would be missing elsewhere.
"""

from __future__ import annotations

import sys
from _thread import RLock, allocate_lock, start_new_thread
from collections import deque
from fcntl import F_DUPFD_CLOEXEC, fcntl
from json import dumps, loads
from os import close, fstat, getpid, read, write
from signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    #: Whether it is a result, and that or what is wrong, in JSON. None: there will be none.
    Answer = tuple[bool, bytes] | None

#: As in the worker.
_LOWEST_DESCRIPTOR = 100
#: As `constants.MAXIMUM_CALL_BYTES` on the host has it.
_LIMIT = 1 << 20
_CHUNK = 1 << 16
_NOTHING = object()
_signals = valid_signals()


class HostFunctionError(RuntimeError):
    """A function of the host's raised an exception, whose type and text are the message."""


HostFunctionError.__module__ = "builtins"


class HostFunction:
    """A function of the host's. Called, it waits for the result; `aio` is the same for code that awaits.

    Args:
      pipes: What it is called by.
      name: What it is called.

    """

    def __init__(self, pipes: Functions, name: str) -> None:
        self._pipes = pipes
        self.__name__ = self.__qualname__ = name

    def __repr__(self) -> str:
        return f"<function {self.__name__} of the host>"

    def __call__(self, *arguments: object, **options: object) -> Any:
        """Call it, and wait for its result."""
        answered = allocate_lock()
        answered.acquire()
        answers: list[Answer] = []

        def deliver(answer: Answer) -> None:
            answers.append(answer)
            answered.release()

        number = self._pipes.begin(self.__name__, arguments, options, deliver)
        try:
            answered.acquire()
        finally:
            self._pipes.forget(number)
        return self._result(answers[0])

    async def aio(self, *arguments: object, **options: object) -> Any:
        """Call it, and await its result: in asyncio. Cancelled: the host may call it to its end, for nobody."""
        from asyncio import get_running_loop

        loop = get_running_loop()
        future = loop.create_future()

        def take(answer: Answer) -> None:
            if not future.done():
                future.set_result(answer)

        def deliver(answer: Answer) -> None:
            try:
                loop.call_soon_threadsafe(take, answer)
            except RuntimeError:
                pass  # the loop was closed: nobody waits

        number = self._pipes.begin(self.__name__, arguments, options, deliver)
        try:
            answer = await future
        finally:
            self._pipes.forget(number)
        return self._result(answer)

    def _result(self, answer: Answer) -> Any:
        if answer is None:
            raise _over(self.__name__)
        is_result, text = answer
        if is_result:
            return loads(text)
        raise HostFunctionError(loads(text))


class Functions:
    """The functions of one run, until its end.

    Args:
      names: What they are called.
      answers: What answers are read from. Owned from now on, as is *calls*.
      calls: What calls are written to.
      namespace: Where the names go. Those that were there come back at the end.

    """

    def __init__(self, names: list[str], answers: int, calls: int, namespace: dict[str, object]) -> None:
        self._pid = getpid()
        self._answers = _Descriptor(answers)
        self._calls = _Descriptor(calls)
        self._mutex = RLock()  # what the code does at any point, as in a handler of a signal, may call
        self._waiting: dict[int, Callable[[Answer], None]] = {}
        self._unsent: deque[bytes] = deque()
        self._number = 0
        self._reading = self._writing = self._over = False
        self._namespace = namespace
        self._functions = {name: HostFunction(self, name) for name in names}
        self._before = {name: namespace.get(name, _NOTHING) for name in names}
        namespace.update(self._functions)
        sys.modules["builtins"].HostFunctionError = HostFunctionError  # type: ignore[attr-defined]

    def end(self) -> None:
        """End them, with the run: who still waits is told so, and the names are what they were."""
        self._close()
        for name, function in self._functions.items():
            if self._namespace.get(name) is function:
                if self._before[name] is _NOTHING:
                    del self._namespace[name]
                else:
                    self._namespace[name] = self._before[name]

    def begin(
        self, name: str, arguments: tuple[object, ...], options: dict[str, object], deliver: Callable[[Answer], None]
    ) -> int:
        """Make a call whose answer goes to *deliver*, in any thread; return its number."""
        if getpid() != self._pid:
            raise RuntimeError(f"{name}() of the host can't be called in a process that the run's own has forked off")
        try:
            text = dumps([arguments, options], allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as exc:
            raise TypeError(f"the arguments of {name}() must be JSON: {exc}") from None
        if len(text) > _LIMIT:
            raise ValueError(f"the arguments of {name}() may have {_LIMIT} bytes as JSON, not {len(text)}")
        with self._mutex:
            if self._over:
                raise _over(name)
            if not (self._answers.is_ours and self._calls.is_ours):
                raise RuntimeError(f"{name}() of the host can't be called: this process has closed all descriptors")
            self._number += 1
            number = self._number
            self._waiting[number] = deliver
            self._unsent.append(f"{number} {name} {text}\n".encode())
            threads = [work for work, busy in ((self._write, self._writing), (self._read, self._reading)) if not busy]
        try:
            for work in threads:
                _start(work)
        except BaseException:
            self.forget(number)
            raise
        return number

    def forget(self, number: int) -> None:
        """Know that nobody waits for the answer of a call any more."""
        with self._mutex:
            self._waiting.pop(number, None)

    def _close(self) -> None:
        """Take no more calls. A thread that reads or writes closes what it uses: the number could be another file's already."""
        with self._mutex:
            self._over = True
            if not self._reading:
                self._answers.close()
            if not self._writing:
                self._calls.close()
            waiting = [*self._waiting.values()]
            self._waiting.clear()
        for deliver in waiting:
            deliver(None)

    def _write(self) -> None:
        with self._mutex:
            if self._writing or self._over:
                return
            self._writing = True
        while True:
            with self._mutex:
                if self._over or not self._unsent:
                    self._writing = False
                    if self._over:
                        self._calls.close()
                    return
                line = memoryview(self._unsent.popleft())
            try:
                while line:
                    line = line[write(self._calls.number, line) :]
            except OSError:
                self._close()  # the host wants no more of it

    def _read(self) -> None:
        with self._mutex:
            if self._reading or self._over:
                return
            self._reading = True
        unfinished = b""
        while True:
            with self._mutex:
                # Nothing is left of a line that nobody waits for: the next thread would take it for the beginning of another.
                if self._over or not (self._waiting or unfinished):
                    self._reading = False
                    if self._over:
                        self._answers.close()
                    return
            try:
                data = read(self._answers.number, _CHUNK)
            except OSError:
                data = b""
            if not data:
                self._close()  # the host wants no more of it
            *lines, unfinished = (unfinished + data).split(b"\n")
            for line in lines:
                number, kind, text = line.split(b" ", 2)
                with self._mutex:
                    deliver = self._waiting.pop(int(number), None)
                if deliver is not None:
                    deliver((kind == b"r", text))


class _Descriptor:
    """One out of the way of code that counts on low numbers, or closes them."""

    def __init__(self, descriptor: int) -> None:
        self.number = fcntl(descriptor, F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
        close(descriptor)
        self._identity = _identity(self.number)

    @property
    def is_ours(self) -> bool:
        """Whether it is what it was: the code may have closed it, and the number be another file's."""
        try:
            return _identity(self.number) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Close it; again is no error."""
        if self.number >= 0 and self.is_ours:
            close(self.number)
        self.number = -1


def _identity(descriptor: int) -> tuple[int, int]:
    status = fstat(descriptor)
    return status.st_dev, status.st_ino


def _over(name: str) -> RuntimeError:
    return RuntimeError(f"{name}() of the host can't be called any more: the run that it was for is over")


def _start(work: Callable[[], None]) -> None:
    """Have a thread that gets no signals: they are for the code's own."""
    before = pthread_sigmask(SIG_BLOCK, ())
    try:
        # This raises the interrupt that came before it.
        pthread_sigmask(SIG_BLOCK, _signals)
        start_new_thread(work, ())
    finally:
        pthread_sigmask(SIG_SETMASK, before)
