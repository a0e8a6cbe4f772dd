"""What a sandbox's user asks of its guest: to run code and processes, to connect, and to work on files."""

from __future__ import annotations

import subprocess
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeVar

import trio

from .._config import SandboxConfig, Timeouts
from .._entries import current_asker
from .._errors import RunRefusedError
from .._observe import span
from .._refused import refuse
from .._results import RunOutput, RunResult
from ..client import (
    NO_INTERPRETER,
    Functions,
    GuestProcess,
    HostFunctions,
    RunEvents,
    RunTrace,
    Stderr,
    Terminal,
    check_functions,
    check_user,
    code_request,
    collect,
    open_process,
    open_run,
    process_request,
    run_process,
    takes_input,
)
from ._arguments import command_texts, path_text
from ._observed import run_span
from ._path import AnyGuestPath
from ._slot import Slot
from ._tunnels import check_port, forward_port, open_tcp_stream, wait_port
from ._turn import Turn
from ._workspace_requests import WorkspaceRequests

T = TypeVar("T")

#: Runs whose last output is kept.
_RECENT_RUNS: Final = 8


class GuestRequests(WorkspaceRequests):
    """The requests of a `Sandbox`. Each goes to the machine that is in the slot when its turn comes.

    What becomes of the machine itself, copies, checkpoints and sleep, is no request to the guest: `Sandbox` has that.
    """

    def __init__(
        self, slot: Slot, config: SandboxConfig, timeouts: Timeouts, language: str, command: Sequence[str]
    ) -> None:
        super().__init__(slot)
        self._config = config
        self._timeouts = timeouts
        self._language = language
        self._command = tuple(command)
        self._interpreter = Turn()
        self._functions: HostFunctions | None = None  # of the last run that had the interpreter, which alone sets this
        self._asked = 0  # runs, those that were not started included
        self._runs = 0
        self._processes = 0
        # Whose run is "the last" is a question of who asks: tasks may run code side by side.
        self._last_of_asker: weakref.WeakKeyDictionary[object, RunTrace] = weakref.WeakKeyDictionary()
        self._recent: deque[RunTrace] = deque(maxlen=_RECENT_RUNS)

    @property
    def language(self) -> str:
        """The language of runs that do not name one: what the image is for; "" for a container image without interpreters."""
        return self._language

    @property
    def last_output(self) -> RunOutput:
        """The end of the output of this task's last run, and how it ended, even if `run` gave no result.

            with trio.move_on_after(10):
                await sandbox.run(code)
            print(sandbox.last_output.stdout)

        In a task that has run nothing in this sandbox it is that of the last run of any task. If there was none, its
        `RunOutput.outcome` is "unsent".
        """
        trace = self._last_of_asker.get(current_asker())
        if trace is None:
            trace = self._recent[-1] if self._recent else RunTrace(self._language)
        return trace.output()

    def recent_runs(self) -> tuple[RunOutput, ...]:
        """Return the ends of the outputs of the last runs of all tasks, at most eight, the oldest first, for error reports."""
        return tuple(trace.output() for trace in self._recent)

    @refuse("timeout", "input")
    @asynccontextmanager
    async def stream(
        self,
        code: str,
        *,
        language: str | None = None,
        stdin: bytes | bytearray | memoryview | bool = b"",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        functions: Functions | None = None,
    ) -> AsyncGenerator[RunEvents]:
        """Run *code* like `run`, and give its output and displays as they come.

            async with sandbox.stream("print('hello')") as events:
                async for event in events:
                    ...  # OutputChunk, OutputChunk, Display, ..., and one RunResult as the last

        The output may be of any size: a slow reader makes the run wait. If the block exits before the end, the run is
        stopped, as by cancelling `run`. Arguments and errors are
        those of `run`, with these exceptions:

        - With ``stdin=True`` the code reads what is sent to the stream `RunEvents.stdin` meanwhile.
        - An exit code other than 0 raises nothing; call `RunResult.check` on the last event for that.
        - There is no limit on the output, and the result has only its end: see `RunResult.streamed`. One `Display` has at most `SandboxConfig.max_output_bytes`, or
          `OutputLimitError` is raised in its place.
        - `RuntimeError` is raised, and nothing sent, in a task that is in the block of another run of this sandbox, or in a
          function that such a run calls, because it would wait for itself.
        - *functions* are called even if nobody reads the events. When the block exits, they are cancelled.
        """
        if language is None:
            language = self._language
            if not language:
                raise RunRefusedError(NO_INTERPRETER)
        directory = None if cwd is None else await path_text(self._slot, cwd)
        request = code_request(code, language=language, env=env, cwd=directory)
        takes_input(stdin)
        callable_functions = check_functions(functions, language)
        self._slot.home.check("a run")
        asker = current_asker()
        if self._interpreter.is_of(asker):
            raise RuntimeError(
                "this task is in the block of another run of this sandbox, which it would wait for, and nothing was sent; "
                "leave that block first, or use Sandbox.run_process() meanwhile"
            )
        if self._functions is not None and self._functions.is_calling():
            raise RuntimeError(
                "a run of this sandbox calls this function, and what is to run would wait for its end; nothing was sent. "
                "Use Sandbox.run_process(), or another sandbox"
            )
        trace = self._last_of_asker[asker] = RunTrace(language, trio.current_time())
        self._asked += 1
        run_id = f"{self._slot.id}.{self._asked}"
        with run_span(trace, self._slot.id, run_id, code):
            async with self._interpreter:
                vm = await self._slot.resolve("the run")
                if more := self._slot.environment():
                    request["env"] = {**more, **(env or {})}
                self._recent.append(trace)
                limit = self._config.max_output_bytes
                grace, patience = self._timeouts.interrupt_grace, self._timeouts.kill
                self._functions = calls = (
                    HostFunctions(callable_functions, self._slot.id, run_id) if callable_functions else None
                )
                async with open_run(
                    vm,
                    request,
                    trace,
                    stdin=stdin,
                    functions=calls,
                    display_limit=limit,
                    memory_mib=self._config.memory_mib,
                    grace=grace,
                    patience=patience,
                ) as events:
                    self._runs += 1
                    yield events

    @refuse("timeout", "input")
    async def run(
        self,
        code: str,
        *,
        language: str | None = None,
        stdin: bytes | bytearray | memoryview = b"",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        functions: Functions | None = None,
        check: bool = False,
    ) -> RunResult:
        """Run *code* in the sandbox's interpreter and wait for its end.

        There is one interpreter for each language: variables, imports and functions persist from run to run, and runs of
        several tasks take turns. An exception in the code is a result, and raises nothing here unless you say *check*.

        Cancelling stops the code in the guest: with SIGINT at first, which keeps the interpreter's
        state, and with SIGKILL after `Timeouts.interrupt_grace`, which ends the interpreter. The
        sandbox lives on. A task cancelled while another run holds the interpreter has sent nothing.

        The caller's effective deadline travels with the request. If the event loop is blocked when it passes, the guest
        stops the code in the same way half a second later, and the caller is cancelled as soon as the loop turns again.

        Args:
          code: Source text, at most 4 MiB as UTF-8.
          language: "python", "javascript" or "shell"; None: the one that the image is for, `Sandbox.language`.
          stdin: The code's standard input, for `input` for instance; then comes the end of the file.
          env: Environment variables for this run, added to the interpreter's own. Afterwards they have their old values, or are gone.
          cwd: The directory for this run, in the guest: absolute, or a `GuestPath`. Afterwards the interpreter is where it was before.
          functions: Functions of yours that the code may call by these names, at most 64: ``search("x")`` in Python, or
            ``await search.aio("x")``; ``await search("x")`` in JavaScript. Arguments and results are JSON, at most 1 MiB
            and 20,000 values each.
            A function may be async; one that is not must not block. It is called in a task of this run, at most 16 at a time and
            some 1000 a second, and cancelled when the run ends. What it raises is an exception of the code's, and is logged.
          check: Whether an exit code other than 0 is an error.

        Returns:
          How it ended, what the last expression came to, and what was printed and shown: at most
          `SandboxConfig.max_output_bytes` of stdout, of stderr, and of all displays together.

        Raises:
          TypeError, ValueError: for arguments that can't be run; nothing was sent.
          RunRefusedError: if the guest could not start it; nothing ran. For a *cwd* that is not there or can't be changed
            to it is an `OSError` as well: `FileNotFoundError` and so on, as of `open_process`.
          RunFailedError: if *check* and the exit code is not 0; the traceback is in the message, and all else in `result`.
          OutputLimitError: if it printed or showed more than it may; it was stopped, and what came is attached.
          DeadlinePassedError: if the guest stopped it at a deadline that was moved meanwhile, without the event loop
            having had a turn to say so.
          SandboxClosedError: if the sandbox is closed or its VM gone; nothing was sent.
          OutcomeUnknownError: if the VM ended in the middle of the run.
          GuestProtocolError: if the guest broke the protocol; its VM was ended.

        """
        if isinstance(stdin, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("`stdin` must be bytes; Sandbox.stream() has one to write to while the code runs")
        try:
            async with self.stream(
                code, language=language, stdin=stdin, env=env, cwd=cwd, functions=functions
            ) as events:
                result = await collect(events, self._config.max_output_bytes)
        except KeyboardInterrupt as exc:
            # Who typed Ctrl-C wants to see where their own program was, not what we were doing.
            raise exc.with_traceback(None)  # noqa: B904 - it is the same
        return result.check() if check else result

    @refuse("timeout")
    @asynccontextmanager
    async def open_process(
        self,
        command: Sequence[AnyGuestPath] | None = None,
        *,
        stdin: bool = True,
        stdout: bool = True,
        stderr: Stderr = "pipe",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        user: str | int | None = None,
        pty: bool | Terminal = False,
    ) -> AsyncGenerator[GuestProcess]:
        """Start a process in the guest, for a block. When the block exits, the process is killed with all its descendants.

        A guest that does not acknowledge the kill within `Timeouts.kill` loses its VM. The effective deadline
        with which the block is entered goes along: see `run`. Here the guest kills at once.

        Cancelled while it starts: it is ended in the same way, and does nothing after that.

        Args:
          command: The program, looked up in the guest's PATH, and its arguments: text, or paths in the guest. None: that of the
            container image, its entry point and what comes after it.
          stdin: Whether `GuestProcess.stdin` is a stream; otherwise the process reads end of file.
          stdout: Whether `GuestProcess.stdout` is a stream; otherwise output is discarded.
          stderr: "pipe" for a stream of its own, "stdout" to go where stdout goes, or "discard".
          env: The whole environment; None for the guest's default one, which `environment` returns.
          cwd: A directory in the guest, absolute or a `GuestPath`; None for the user's home, or a container image's directory.
          user: A user's name or id in the guest; None for the unprivileged user 1000, or a container image's user.
          pty: Whether the process gets a terminal, which is `GuestProcess.stdio`, in place of *stdin*, *stdout*
            and *stderr*, whatever these say; a `Terminal` also gives its size and kind.

        Raises:
          TypeError, ValueError: for wrong arguments; nothing was sent.
          OSError: if the guest could not start it, with the guest's errno: `FileNotFoundError`,
            `PermissionError` and so on.
          SandboxClosedError: if the sandbox is closed or its VM gone; nothing was sent.
          OutcomeUnknownError: if the VM ended before the process was known to run.
          GuestProtocolError: if the guest broke the protocol; its VM was ended.

        """
        if stderr not in ("pipe", "stdout", "discard"):
            raise ValueError(f"`stderr` must be 'pipe', 'stdout' or 'discard', not {stderr!r}")
        async with self._open_process(
            self._command_or(command), stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, user=user, pty=pty
        ) as process:
            yield process

    def _command_or(self, command: T | None) -> T | tuple[str, ...]:
        """Return *command*, or the image's own."""
        if command is not None:
            return command
        if not self._command:
            raise ValueError("`command` must be given: the image has none of its own")
        return self._command

    @asynccontextmanager
    async def _open_process(
        self,
        command: Sequence[AnyGuestPath],
        *,
        stdin: bool,
        stdout: bool,
        stderr: Stderr,
        env: Mapping[str, str] | None,
        cwd: AnyGuestPath | None,
        user: str | int | None,
        pty: bool | Terminal,
        leaves: bool = False,
    ) -> AsyncGenerator[GuestProcess]:
        check_user(user)
        argv = await command_texts(self._slot, command)
        directory = None if cwd is None else await path_text(self._slot, cwd)
        request = process_request(argv, env=env, cwd=directory, user=user)
        vm = await self._slot.resolve(f"the process {argv[0]!r}")
        if env is None and (more := self._slot.environment()):
            request["more_env"] = dict(more)
        opened = open_process(
            vm,
            request,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=(pty if isinstance(pty, Terminal) else Terminal()) if pty else None,
            patience=self._timeouts.kill,
            leaves=leaves,
        )
        with span("process", sandbox_id=self._slot.id) as observed:
            async with opened as process:
                self._processes += 1
                try:
                    yield process
                finally:
                    if process.returncode is not None:
                        observed.set(exit_status=process.returncode)

    @refuse("timeout", "input", "capture_output", "text", "encoding")
    async def run_process(
        self,
        command: Sequence[AnyGuestPath] | str | None = None,
        *,
        stdin: bytes | bytearray | memoryview = b"",
        capture_stdout: bool = False,
        capture_stderr: bool = False,
        stderr_to_stdout: bool = False,
        check: bool = True,
        shell: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        user: str | int | None = None,
        pty: bool | Terminal = False,
        task_status: trio.TaskStatus[GuestProcess] = trio.TASK_STATUS_IGNORED,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a process in the guest to its end, like `trio.run_process` on the host.

        Output that is not captured is discarded: the guest never writes to the host's own streams.

        It returns when the process ends. A daemon or a background job that the process started continues, as after
        `trio.run_process`. Nobody waits for it, even if it holds captured output: half a second after the process's end the
        output so far is returned, and later output is discarded. A terminal is hung up. Cancelling, a deadline, and every
        error except that of *check* kill the process and everything it started.

        Args:
          command: The program and its arguments; one string with *shell*. None: as for `open_process`.
          stdin: The process's standard input.
          capture_stdout: Whether to return its standard output.
          capture_stderr: Whether to return its standard error.
          stderr_to_stdout: Whether its standard error goes where its standard output goes.
          check: Whether an exit status other than 0 raises. The message has the end of standard error, even if it is not
            captured.
          shell: Whether *command* is a line for the guest's /bin/sh.
          env: The whole environment; None for the guest's default one, which `environment` returns.
          cwd: A directory in the guest, absolute or a `GuestPath`; None: as for `open_process`.
          user: A user's name or id in the guest; None: as for `open_process`.
          pty: Whether the process gets a terminal, as with `open_process`: *stdin* is typed, and *capture_stdout* captures
            all that the terminal shows, including standard error and the echo of the input. Typed input has no end; Ctrl-D,
            which is ``"\N{END OF TRANSMISSION}"``, at the start of a line stands for one.
          task_status: For ``nursery.start(sandbox.run_process, ...)``, which returns the `GuestProcess`.

        Returns:
          The arguments, the exit status and the captured output; None for what was not captured.

        Raises:
          ProcessFailedError: if *check* and the status is not 0: a `subprocess.CalledProcessError` whose message has
            the end of standard error.
          OutputLimitError: if it printed more than `SandboxConfig.max_output_bytes` to a captured stream; it was killed, and
            the error has the output so far.
          Exception: all that `open_process` raises.

        """
        return await run_process(
            partial(self._open_process, leaves=True),
            self._command_or(command),
            stdin=stdin,
            capture_stdout=capture_stdout,
            capture_stderr=capture_stderr,
            stderr_to_stdout=stderr_to_stdout,
            check=check,
            shell=shell,
            env=env,
            cwd=cwd,
            user=user,
            pty=pty,
            limit=self._config.max_output_bytes,
            task_status=task_status,
        )

    @refuse("timeout")
    async def open_tcp_stream(self, port: int) -> trio.abc.HalfCloseableStream:
        """Connect to a TCP server in the guest, at its 127.0.0.1 or else its ::1.

        The connection goes over the guest's channel: the guest has no network device. It is a stream like
        Trio's own, for h11, trio-websocket and the like, and yours to close. Slow readers make writers wait, all the way to
        the server. Ends of data and resets pass from one end to the other; a reset raises `trio.BrokenResourceError`.

        Cancelled: the server may see a connection that is closed at once.

        Args:
          port: From 1 to 65535.

        Raises:
          TypeError, ValueError: if *port* is not a port; nothing was sent.
          OSError: as the guest's connect(2) fails: `ConnectionRefusedError` where nobody listens, which `wait_port`
            waits for; and EMFILE if 1024 streams of all kinds are open already.
          SandboxClosedError: if the sandbox is closed or its VM gone; nothing was sent.
          OutcomeUnknownError: if the VM ended meanwhile.
          GuestProtocolError: if the guest broke the protocol; its VM was ended.

        """
        check_port(port, "port")
        return await open_tcp_stream(self._slot, port)

    @refuse("timeout")
    async def wait_port(self, port: int) -> None:
        """Wait until a server in the guest listens at *port*, where `open_tcp_stream` would reach it.

        It may take for ever: put a cancel scope around it. The server notices neither this nor a cancellation.

        Raises:
          Exception: what `open_tcp_stream` raises, except `OSError`.

        """
        check_port(port, "port")
        await wait_port(self._slot, port)

    async def forward_port(
        self, guest_port: int, host_port: int = 0, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at the host's 127.0.0.1 and carry each connection to *guest_port* of the guest, until cancelled.

            port = await nursery.start(sandbox.forward_port, 8000)

        Every program on the host, of any user, can connect. A connection that the guest refuses is reset. At most 256 are
        open at a time; further ones wait.

        Cancelling closes the listener and resets the connections. If the VM ends, or the sandbox's block exits, this raises.

        Args:
          guest_port: From 1 to 65535. Nobody has to listen there yet.
          host_port: From 1 to 65535, or 0 for a free one.
          task_status: Gets the host's port as soon as connections are accepted.

        Raises:
          TypeError, ValueError: if a port is not one; nothing was opened.
          OSError: if nobody can listen at the host's port.
          SandboxClosedError: if the sandbox is closed or its VM gone, now or later.

        """
        check_port(guest_port, "guest_port")
        check_port(host_port, "host_port", lowest=0)
        await forward_port(self._slot, guest_port, host_port, task_status=task_status)
