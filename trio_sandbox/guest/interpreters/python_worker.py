"""The program that a Python interpreter in an image runs to take code from the agent.

The agent sends this text to the interpreter (see `BOOT` in `languages`), so it stands alone: the
standard library of Python 3.9 or later. It runs in the process of code that nobody trusts, and
guards itself against accidents only. What that code can do on purpose is break its own interpreter:
the agent then ends that, and starts another.

- The agent's messages come over a private socket, the `_control` of our globals. Everything that
  we use is bound at the start, and our builtins are a copy: code may redefine what it sees.
- Each run has pipes of its own on descriptors 1 and 2 (and 0, if it has input). In between these
  are /dev/null, so that the pipes end with the run unless something in the background holds them.
- SIGINT reaches the code of a run and nothing else. It can come late, after the run it was meant
  for; the agent then sends "sync" before the next run, which forgets it.
- Code that awaits at its top level runs on an event loop of asyncio that is kept for the next such code. In between it
  does not turn, nor while other code runs, so that this can run loops of its own.
"""

from __future__ import annotations

import array
import io
import linecache
import os
import sys
import traceback
from _ast import Expr, Expression, PyCF_ALLOW_TOP_LEVEL_AWAIT, PyCF_ONLY_AST
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET, socket
from collections import deque
from fcntl import F_DUPFD_CLOEXEC, fcntl
from marshal import loads
from os import O_RDWR, _exit, chdir, close, dup2, environ, fstat, getpid, open as open_descriptor, urandom, write
from signal import (
    SIG_BLOCK,
    SIG_IGN,
    SIG_UNBLOCK,
    SIGALRM,
    SIGCHLD,
    SIGHUP,
    SIGINT,
    SIGPROF,
    SIGUSR1,
    SIGUSR2,
    SIGVTALRM,
    default_int_handler,
    raise_signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Sequence
    from signal import pthread_sigmask, signal as set_handler
    from types import CodeType, FrameType
    from typing import Any, NoReturn
else:
    # The wrappers of these two make enumeration members of every number, which takes longer than the calls.
    from _signal import pthread_sigmask, signal as set_handler

#: Out of the way of code that counts on low numbers, or closes them.
_LOWEST_DESCRIPTOR = 100
#: Longer than any message of the agent; longer texts come in memory files.
_MESSAGE_LIMIT = 1 << 17
#: Bytes of past runs' source that is kept to be shown in tracebacks.
_SOURCES_LIMIT = 8 << 20
#: Bytes of a value's text that the agent takes.
_VALUE_LIMIT = 1 << 16
#: Characters of code whose last expression's value is looked for. Taking code apart takes a hundred times its size.
_PARSED_LIMIT = 1 << 18
#: In the flags of code that awaits at its top level.
_CO_COROUTINE = 0x80
#: What an interpreter ends with that can't go on for a reason of its own.
_EX_SOFTWARE = 70

_READY = b"R"
_DONE = b"D"
_DONE_WITH_VALUE = b"V"
_FAILED = b"F"
_SYNCED = b"S"

#: Signals that are kept from the code's handlers while we run: those that code commonly has handlers
#: for, but for SIGTERM, which is to end an idle interpreter. Plain numbers, and few: they cost time in every run.
_held_back = [int(number) for number in (SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGPROF, SIGUSR1, SIGUSR2, SIGVTALRM)]

_modules = sys.modules  # as code may put something else there
_main = _modules["__main__"].__dict__
_print_exception = traceback.print_exception


class _Interrupts:
    """Who gets SIGINT: the code of a run, while it is on the main thread's stack, and nobody else.

    In between it is blocked, and so are those that the code may have handlers for, which may raise.
    The handler is ours as well, since a thread of the code's may take a signal that we block.
    """

    def __init__(self) -> None:
        self.pending = False
        # Trio and asyncio take SIGINT over only from Python's own handler.
        self._users_handler: Any = default_int_handler
        set_handler(SIGINT, self._note)
        pthread_sigmask(SIG_BLOCK, _held_back)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pending = True

    def forget(self) -> None:
        """Drop what has come so far; ignoring a signal discards a blocked one."""
        set_handler(SIGINT, int(SIG_IGN))
        set_handler(SIGINT, self._note)
        self.pending = False

    def call(self, function: Callable[[], object]) -> BaseException | None:
        """Call *function* with signals as the code wants them; return what it raised."""
        error = None
        # Between the two calls in the inner block any line here may raise KeyboardInterrupt. After
        # the second it can't, and one signal is all that the agent sends, so it is done twice at most.
        try:
            try:
                self._arm()
                function()
            except BaseException as exc:  # noqa: BLE001  whatever the code raises is its result
                error = exc
            self._disarm()
        except BaseException as exc:  # noqa: BLE001
            self._disarm()
            if error is None:
                error = exc
        return error

    def _arm(self) -> None:
        set_handler(SIGINT, self._users_handler)
        pthread_sigmask(SIG_UNBLOCK, _held_back)
        if self.pending:
            self.pending = False
            raise_signal(SIGINT)

    def _disarm(self) -> None:
        pthread_sigmask(SIG_BLOCK, _held_back)
        handler = set_handler(SIGINT, self._note)
        if handler != self._note:
            self._users_handler = handler


class _StandardStreams:
    """sys.stdin, sys.stdout and sys.stderr, on descriptors that never close."""

    def __init__(self) -> None:
        self._encoding: str = sys.stdout.encoding
        self._errors = [sys.stdin.errors, sys.stdout.errors, sys.stderr.errors]
        self._had_input = False
        self._streams: list[io.TextIOWrapper] = [self._make(descriptor) for descriptor in range(3)]
        for name, stream in zip(("stdin", "stdout", "stderr"), self._streams):  # noqa: B905  new in Python 3.10
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        self.disconnect()

    def _make(self, descriptor: int) -> io.TextIOWrapper:
        raw = io.FileIO(descriptor, "w" if descriptor else "r", closefd=False)
        buffered = io.BufferedWriter(raw) if descriptor else io.BufferedReader(raw)
        return io.TextIOWrapper(
            buffered, self._encoding, self._errors[descriptor] or "strict", line_buffering=descriptor > 0
        )

    def connect(self, stdin: int, stdout: int, stderr: int) -> None:
        """Give a run its descriptors, which are closed; *stdin* may be -1 for no input."""
        # What threads printed since the last run goes where that was to go: nowhere.
        self.flush()
        for descriptor, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            if descriptor >= 0:
                dup2(descriptor, target)
                close(descriptor)
        # A reader has buffered, and remembers, the last run's input.
        stale = [self._had_input or stdin >= 0, False, False]
        self._had_input = stdin >= 0
        for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
            ours = self._streams[descriptor]
            current = getattr(sys, name, None)
            if stale[descriptor] or not _is_usable(ours):
                self._streams[descriptor] = self._make(descriptor)
                setattr(sys, f"__{name}__", self._streams[descriptor])
            # A stream that the code put there is its own affair, as long as it can be used at all.
            if current is ours or not _is_usable(current):
                setattr(sys, name, self._streams[descriptor])

    def disconnect(self) -> None:
        """Send on what is still in buffers, and let go of the run's descriptors."""
        self.flush()
        # Opened each time: code may close, or reuse, what we would keep open.
        null = open_descriptor("/dev/null", O_RDWR)
        for target in range(3):
            dup2(null, target)
        if null > 2:
            close(null)

    def flush(self) -> None:
        """Empty the buffers of sys.stdout and sys.stderr, ours and the code's own."""
        for stream in (getattr(sys, "stdout", None), getattr(sys, "stderr", None), *self._streams[1:]):
            try:
                stream.flush()  # type: ignore[union-attr]
            except BaseException:  # noqa: BLE001  the code's own object, or one of ours that it closed
                pass


class _Worker:
    def __init__(self, control: socket) -> None:
        moved = fcntl(control.fileno(), F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
        control.close()
        self._control = socket(fileno=moved)
        self._identity = _identity(moved)
        self._pid = getpid()
        self._interrupts = _Interrupts()
        self._streams = _StandardStreams()
        self._sources: deque[tuple[str, int]] = deque()
        self._sources_size = 0
        self._number = 0
        self._loop: AbstractEventLoop | None = None
        self._library: dict[str, Any] = {
            "__name__": "trio_sandbox_displays",
            "__builtins__": globals()["__builtins__"],
        }
        exec(compile(self._control.recv(_MESSAGE_LIMIT), "<trio-sandbox displays>", "exec"), self._library)
        self._displays = self._library["Displays"](self._post, self._streams.flush, lambda: self._number)
        _modules["builtins"].display = self._displays.display  # type: ignore[attr-defined]
        sys.argv = [""]  # instead of how we were started, as where code is typed in
        os.register_at_fork(after_in_child=self._close_control)
        _take_name()

    def _is_control_ours(self) -> bool:
        try:
            return _identity(self._control.fileno()) == self._identity
        except OSError:
            return False

    def _close_control(self) -> None:
        # Its number may be another file's by now.
        if self._is_control_ours():
            self._control.close()

    def serve(self) -> int:
        """Take code until the agent is gone; return the exit status of a process that code forked off."""
        self._send(_READY)
        while True:
            message, descriptors = self._receive()
            if message[0] == "sync":
                self._interrupts.forget()
                self._send(_SYNCED)
                continue
            if message[0] == "renew":
                _renew(message[1])
                continue
            _, self._number, code, env, cwd = message
            failure = self._prepare(env, cwd)
            if failure is not None:
                for descriptor in descriptors:
                    close(descriptor)
                self._send(_FAILED + self._number.to_bytes(4, "big") + failure)
                continue
            stdin = -1 if len(descriptors) == 2 else descriptors.pop(0)
            self._streams.connect(stdin, *descriptors)
            status, value = self._run(f"<run {self._number}>", code)
            if getpid() != self._pid:
                return status
            if not self._is_control_ours():
                # The code closed it. The agent takes our exit status for the run's.
                self._streams.flush()
                _exit(status)
            self._streams.disconnect()
            end = self._number.to_bytes(4, "big") + bytes([status])
            self._send(_DONE + end if value is None else _DONE_WITH_VALUE + end + value)

    def _receive(self) -> tuple[Any, list[int]]:
        space = CMSG_SPACE(8 * array.array("i").itemsize)
        data, ancillary, _, _ = self._control.recvmsg(_MESSAGE_LIMIT, space, MSG_CMSG_CLOEXEC)
        if not data:
            _exit(0)
        descriptors = array.array("i")
        for _, _, payload in ancillary:
            descriptors.frombytes(payload)
        numbers = descriptors.tolist()
        if data[:1] == b"M":
            with io.FileIO(numbers.pop()) as file:
                return loads(file.readall()), numbers
        return loads(data[1:]), numbers

    def _send(self, data: bytes) -> None:
        self._control.send(data)

    def _post(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send the agent a message in the middle of a run."""
        if not self._is_control_ours():
            raise OSError("this process can't display anything: it is no interpreter, or has closed all descriptors")
        self._control.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", descriptors))])

    def _prepare(self, env: dict[str, str] | None, cwd: str | None) -> bytes | None:
        try:
            if cwd is not None:
                chdir(cwd)
            if env is not None:
                environ.update(env)
        except OSError as exc:
            return b"%d" % (exc.errno or 0)
        except ValueError:
            return b"22"  # EINVAL
        return None

    def _run(self, name: str, code: str) -> tuple[int, bytes | None]:
        """Run *code* and show what it raised, as a Python that runs a script would.

        Return the exit status, and the text of what its last expression came to, if it is one and that is not None.
        """
        self._remember(name, code)
        value: bytes | None = None

        def execute() -> None:
            nonlocal value
            try:
                result = self._evaluate(name, code)
                if result is not None:
                    text = _encode_value(repr(result))
                    self._displays.show_value(result)
                    value = text
            except (Exception, SystemExit):
                self._displays.show_figures()
                raise
            if "matplotlib.pyplot" in _modules:
                self._displays.show_figures()

        error = self._interrupts.call(execute)
        if error is None:
            return 0, value
        status = 1

        def conclude() -> None:
            nonlocal status
            status = self._exit_status(error)

        failure = self._interrupts.call(conclude)
        if failure is not None and not isinstance(failure, KeyboardInterrupt):
            # Formatting it takes more memory than is left, or the code has broken what it takes.
            self._interrupts.call(lambda: write(2, type(error).__name__.encode("utf-8", "replace") + b"\n"))
        return status, None

    def _evaluate(self, name: str, code: str) -> object:
        """Run *code*; return what its last expression came to, if it is one that no semicolon follows."""
        if "\n" in code.rstrip() or ";" in code:
            return self._evaluate_statements(name, code)
        # Most of what is a single line is an expression, or a call: this takes less time than taking it apart would.
        try:
            expression = compile(code, name, "eval", PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError:
            expression = None
        if expression is not None:
            return self._call(expression)
        return self._call(compile(code, name, "exec", PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True))

    def _evaluate_statements(self, name: str, code: str) -> object:
        flags = PyCF_ALLOW_TOP_LEVEL_AWAIT
        if len(code) > _PARSED_LIMIT:
            return self._call(compile(code, name, "exec", flags, dont_inherit=True))
        tree = compile(code, name, "exec", flags | PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body[-1] if tree.body else None
        if not isinstance(last, Expr) or _is_muted(last, code):
            return self._call(compile(tree, name, "exec", flags, dont_inherit=True))
        tree.body.pop()
        return self._call(
            compile(tree, name, "exec", flags, dont_inherit=True),
            compile(Expression(last.value), name, "eval", flags, dont_inherit=True),
        )

    def _call(self, *codes: CodeType) -> object:
        """Run some code, on the event loop if any of it awaits; return what the last comes to."""
        if any(code.co_flags & _CO_COROUTINE for code in codes):
            return self._wait(_call_awaiting(codes))
        result = None
        for code in codes:
            result = eval(code, _main)
        return result

    def _wait(self, coroutine: Any) -> object:
        """Run our event loop until *coroutine* is over."""
        from asyncio import CancelledError, new_event_loop

        if self._loop is None or self._loop.is_closed():
            self._loop = new_event_loop()
        loop = self._loop
        task = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(task)
        except BaseException:
            # KeyboardInterrupt while the loop waited: the code has yet to clean up.
            if not task.done():
                task.cancel()
                try:
                    loop.run_until_complete(task)
                except CancelledError:
                    pass
            raise

    def _exit_status(self, error: BaseException) -> int:
        """Show *error* as a Python that runs a script would, and return what that would exit with."""
        if isinstance(error, SystemExit):
            value = error.code
            if value is None:
                return 0
            if isinstance(value, int):
                return int.__and__(value, 0xFF)
            sys.stderr.write(f"{value}\n")
            return 1
        trace = error.__traceback__
        while trace is not None and self._is_ours(trace.tb_frame):
            trace = trace.tb_next
        error.__traceback__ = trace
        hook = getattr(sys, "excepthook", None)
        if hook is None or hook is sys.__excepthook__:
            _print_exception(type(error), error, trace)
        else:
            hook(type(error), error, trace)
        return 128 + SIGINT if isinstance(error, KeyboardInterrupt) else 1

    def _is_ours(self, frame: FrameType) -> bool:
        """Whether a frame that no frame of the code's has called is of what we do to run that."""
        names = frame.f_globals
        return names is globals() or names is self._library or str(names.get("__name__")).startswith("asyncio.")

    def _remember(self, name: str, code: str) -> None:
        """Let tracebacks show the lines of *code*."""
        self._sources.append((name, len(code)))
        self._sources_size += len(code)
        while self._sources_size > _SOURCES_LIMIT and len(self._sources) > 1:
            oldest, size = self._sources.popleft()
            self._sources_size -= size
            linecache.cache.pop(oldest, None)
        # No time of modification means that there is no file to check against.
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)


def _renew(entropy: bytes) -> None:
    """Forget what must not be the same in two machines that were made from one state.

    That is what the standard library has drawn at random for this process, and NumPy's old global
    generator. Generators of the code's own are its own affair; so is the seed of `hash`, which can't change.
    """
    renewals: tuple[tuple[str, Callable[[Any], object]], ...] = (
        ("random", lambda module: module.seed()),
        ("tempfile", lambda module: setattr(module, "_name_sequence", None)),
        ("uuid", _renew_uuid),
        # OpenSSL notices a fork, and not this.
        ("_ssl", lambda module: module.RAND_add(entropy, float(len(entropy)))),
        ("multiprocessing.process", _renew_authkey),
        ("numpy.random.mtrand", lambda module: module.seed()),
    )
    for name, renew in renewals:
        try:
            if name in sys.modules:
                renew(sys.modules[name])
        except BaseException:  # noqa: BLE001  the code has put something else in its place
            pass


def _renew_uuid(uuid: Any) -> None:
    # The node, where it is no network card's address, and what keeps the next one from being the last one. The C
    # library that makes version 1 has a node and a sequence of its own, which can't be reset: Python does it instead.
    for name in ("_node", "_generate_time_safe", "_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
        if hasattr(uuid, name):
            setattr(uuid, name, None)


def _renew_authkey(process: Any) -> None:
    process._current_process._config["authkey"] = process.AuthenticationString(urandom(32))


def _take_name() -> None:
    """Be called what we are in lists of processes: the kernel calls what it starts from a descriptor by that one's number."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(os.path.basename(sys.executable))
    except OSError:
        pass


def _is_usable(stream: Any) -> bool:
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except BaseException:  # noqa: BLE001  detached, if it is ours; the code's own may raise anything
        return False


def _identity(descriptor: int) -> tuple[int, int]:
    status = fstat(descriptor)
    return status.st_dev, status.st_ino


def _encode_value(text: str) -> bytes:
    data = str.encode(text[:_VALUE_LIMIT], "utf-8", "backslashreplace")
    if len(text) <= _VALUE_LIMIT and len(data) <= _VALUE_LIMIT:
        return data
    end = b" ... (cut: it has %d characters)" % len(text)
    return data[: _VALUE_LIMIT - len(end)].decode("utf-8", "ignore").encode() + end


async def _call_awaiting(codes: Sequence[CodeType]) -> object:
    result = None
    for code in codes:
        result = eval(code, _main)
        if code.co_flags & _CO_COROUTINE:
            result = await result
    return result


def _is_muted(last: Expr, code: str) -> bool:
    """Whether a semicolon follows the last expression."""
    line = code.replace("\r\n", "\n").replace("\r", "\n").split("\n")[(last.end_lineno or 1) - 1]
    return line.encode("utf-8")[last.end_col_offset :].lstrip().startswith(b";")


def _serve() -> NoReturn:
    try:
        status = _Worker(globals()["_control"]).serve()
    except BaseException:  # noqa: BLE001
        # Something of the code's own, a thread's signal or a trace function, reached into our loop.
        _exit(_EX_SOFTWARE)
    # Only in a process that the code forked off, which ends as it would have in a script.
    sys.exit(status)


_serve()
