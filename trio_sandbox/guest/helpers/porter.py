"""The parent of an interpreter that can't be handed descriptors, and that speaks with the agent for it.

A worker gets each run's code and pipes over a packet socket (see `interpreter`). An interpreter that can't read such
a socket can still open a file by its name. So the spawner's fork does not become the interpreter: it stays as its
parent, with nothing in it but what is here, and holds the descriptors open as /proc/PID/fd/N until the run is over.
It needs no Python in the image.

What it is told by the interpreter, one line each, by way of /proc/PID/fd/ANSWERS, which nobody inherits:

    R                       it takes runs
    B TOKEN                 the run begins: SIGINT is for its code from now on
    D TOKEN STATUS [HEX]    it is over; the text of its value, in UTF-8
    F TOKEN ERRNO           nothing was run
    S TOKEN                 it has no SIGINT to take any more

What it tells the interpreter is a `Dialect`'s affair, but for GATE, a file of two bytes: while the first is not 0 the interpreter
could not stand a SIGINT, and none is sent; the second is not 0 while we send one, which the interpreter waits for. The interpreter has a process group of its own: SIGINT comes to us, and
goes on to a run that has begun, or not at all. Code that writes here can end its own run early and break its own interpreter, as
any code can in its own process; for the next run there is another token, or another interpreter.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from _json import encode_basestring_ascii  # pyright: ignore[reportMissingModuleSource]
from typing import TYPE_CHECKING, cast

from ..messages import receive_message, write_memory_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

#: Descriptors of ours that the interpreter opens by name: where it answers, what it is to begin with, and when it can take SIGINT.
ANSWERS, SOURCE, GATE = 8, 9, 10
#: The agent's socket, which is an interpreter's own if it needs no porter.
CONTROL = 3

#: Longer than any worker's source.
_SOURCE_LIMIT = 1 << 17
#: Bytes of the text of a value, and of a line that has one in it.
_VALUE_LIMIT = 1 << 16
_LINE_LIMIT = 2 * _VALUE_LIMIT + 100
_PR_SET_DUMPABLE = 4
_EINVAL = 22
_EX_SOFTWARE = 70
#: Seconds after which a closed gate is looked at again.
_GATE_PATIENCE = 0.01


class RefusedError(Exception):
    """The interpreter can't be asked for that."""


class Dialect:
    """How an interpreter is spoken to: the text that is written for it to read. This one is lines of JSON."""

    #: The descriptor that it reads it from.
    descriptor: int = 3
    #: Seconds after which what a SIGINT may have destroyed, or its aim may have missed, is sent again, and again. Node.js that breaks
    #: a script off has no handler for some milliseconds, where it is emulated, and can't close the gate before.
    retries: tuple[float, ...] = (0.5, 0.5)

    def begin(self, files: str) -> str:
        """Make it run what is in SOURCE of the directory *files*; "" if its command line says so."""
        return ""

    def run(
        self,
        files: str,
        token: str,
        number: int,
        code: str,
        env: dict[str, str] | None,
        cwd: str | None,
        descriptors: Sequence[int],
    ) -> str:
        """Make it run *code* with the descriptors 0, 1 and 2 that *files* has as *descriptors*.

        Raises:
          RefusedError: if it can't.

        """
        names = ",".join(f'"{files}/{descriptor}"' if descriptor >= 0 else '"/dev/null"' for descriptor in descriptors)
        variables = ",".join(
            f"[{encode_basestring_ascii(n)},{encode_basestring_ascii(v)}]" for n, v in (env or {}).items()
        )
        directory = "null" if cwd is None else encode_basestring_ascii(cwd)
        return (
            f'{{"run":"{token}","number":{number},"code":{encode_basestring_ascii(code)},'
            f'"env":[{variables}],"cwd":{directory},"files":[{names}]}}\n'
        )

    def remind(self, files: str, token: str) -> str:
        """Make it tell the end of a run again, which SIGINT may have kept it from; "" if SIGINT does."""
        return ""

    def ask(self, files: str, token: str) -> str:
        """Make it answer S when there is no SIGINT on its way to it any more."""
        return f'{{"ask":"{token}"}}\n'

    def renew(self, entropy: bytes) -> str:
        """Make it forget what two machines must not share."""
        return '{"renew":true}\n'


class ShellDialect(Dialect):
    """Lines for an interactive bash: SIGINT then brings it back to its next line, whatever it is in the middle of."""

    descriptor = 0
    retries: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)

    def begin(self, files: str) -> str:
        """Say it."""
        return f"\\builtin source {files}/{SOURCE}; \\builtin printf 'R\\n' >{files}/{ANSWERS}\n"

    def run(
        self,
        files: str,
        token: str,
        number: int,
        code: str,
        env: dict[str, str] | None,
        cwd: str | None,
        descriptors: Sequence[int],
    ) -> str:
        """Say it. The code is in a file of ours as well, since a shell reads a pipe byte by byte."""
        stdin, stdout, stderr = (
            f"{files}/{descriptor}" if descriptor >= 0 else "/dev/null" for descriptor in descriptors[:3]
        )
        if any(not name.isidentifier() or not name.isascii() for name in env or ()):
            raise RefusedError
        setting = "".join(f" {name}={_quote(value)}" for name, value in (env or {}).items())
        return (
            f"\\builtin printf 'B {token}\\n' >{files}/{ANSWERS}; "
            + (f"\\builtin cd -- {_quote(cwd)}; " if cwd is not None else "")
            + (f"\\builtin export --{setting}; " if setting else "")
            + f"\\builtin source {files}/{descriptors[3]} <{stdin} >{stdout} 2>{stderr}; {self.remind(files, token)}"
        )

    def remind(self, files: str, token: str) -> str:
        """Say it."""
        return f"\\builtin printf 'D {token} %s\\n' \"$?\" >{files}/{ANSWERS}\n"

    def ask(self, files: str, token: str) -> str:
        """Say it."""
        return f"\\builtin printf 'S {token}\\n' >{files}/{ANSWERS}\n"

    def renew(self, entropy: bytes) -> str:
        """Say it. SRANDOM asks the kernel each time."""
        return f"RANDOM={int.from_bytes(entropy[-4:], 'big')}\n"


DIALECTS: dict[str, Dialect] = {"json": Dialect(), "shell": ShellDialect()}


def _quote(text: str) -> str:
    # One line, whatever is in it; and no character that a shell with history would expand.
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("!", "\\x21")):
        text = text.replace(character, escape)
    return f"$'{text}'"


def divide(dialect: Dialect, report: int) -> None:
    """Fork: return in the child, which is to become the interpreter; the parent never does.

    Called when all else is as the interpreter is to have it, CONTROL included, and SIGINT blocked.
    *report* is left open in the child only. The spawner's descriptors have numbers above ours.
    """
    os.closerange(CONTROL + 1, report)
    os.closerange(report + 1, 1 << 20)
    control = socket.socket(fileno=CONTROL)
    source = control.recv(_SOURCE_LIMIT)
    text = write_memory_file(source)
    answers, answering = os.pipe()
    for descriptor, target in ((answering, ANSWERS), (text, SOURCE), (write_memory_file(b"\0\0"), GATE)):
        os.dup2(descriptor, target, inheritable=False)
        os.close(descriptor)
    # A pipe could be read by anything of that user's, by its name.
    script, ours = socket.socketpair()
    # A process that changed its user hides its descriptors from that user.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(control.detach())
        os.dup2(script.fileno(), dialect.descriptor)
        # It takes SIGINT as it likes: none comes before it has begun a run.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        return
    os.close(report)
    theirs = os.fstat(script.fileno())
    script.close()
    try:
        _Porter(dialect, control, pid, ours, theirs, answers).serve()
    except BaseException:  # noqa: BLE001  the agent is gone, or the code got hold of us
        os.killpg(pid, signal.SIGKILL)
        os._exit(_EX_SOFTWARE)


class _Porter:
    def __init__(
        self,
        dialect: Dialect,
        control: socket.socket,
        pid: int,
        script: socket.socket,
        theirs: os.stat_result,
        answers: int,
    ) -> None:
        self._dialect = dialect
        self._control = control
        self._pid = pid
        self._script = script
        self._theirs = theirs
        self._answers = answers
        self._files = f"/proc/{os.getpid()}/fd"
        self._ready = False
        self._unfinished = b""
        # The run, and what the interpreter may have open of it.
        self._token = ""
        self._number = 0
        self._begun = False
        self._descriptors: list[int] = []
        # SIGINT: one that has come, whether the interpreter was ever sent one that it has yet to answer for, and what to repeat.
        self._signalled = False
        self._disturbed = False
        self._question = ""
        self._retries: list[float] = []

    def serve(self) -> NoReturn:
        wakeup, trigger = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(trigger, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._note)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        over = os.pidfd_open(self._pid)
        poll = select.poll()
        for descriptor in (self._answers, wakeup, over):
            poll.register(descriptor, select.POLLIN)
        self._write(self._dialect.begin(self._files))
        while True:
            held = self._signalled and self._begun
            patience = _GATE_PATIENCE if held else self._retries[0] if self._retries else None
            ready = {descriptor for descriptor, _ in poll.poll(None if patience is None else patience * 1000)}
            if wakeup in ready:
                os.read(wakeup, 512)
            if self._answers in ready:
                self._take_answers()
                if self._ready:
                    poll.register(self._control, select.POLLIN)
            if over in ready:
                self._end()
            if self._control.fileno() in ready:
                self._take_message()
            self._pass_signal_on()
            if not ready and not held and self._retries:
                self._repeat()

    def _note(self, signum: int, frame: object) -> None:
        self._signalled = True

    def _pass_signal_on(self) -> None:
        if not self._token:
            self._signalled = False
        elif self._signalled and self._begun and self._interrupt():
            self._signalled = False
            self._disturbed = True
            self._retries = list(self._dialect.retries)

    def _repeat(self) -> None:
        if self._question:
            self._write(self._dialect.ask(self._files, self._question))
        # It may wait for a child that was not there yet.
        elif self._interrupt():
            self._write(self._dialect.remind(self._files, self._token))
        self._retries.pop(0)

    def _interrupt(self) -> bool:
        """Send SIGINT, unless the gate is closed; it can't be closed meanwhile."""
        os.pwrite(GATE, b"\1", 1)
        try:
            if os.pread(GATE, 1, 0) != b"\0":
                return False
            os.killpg(self._pid, signal.SIGINT)
            return True
        finally:
            os.pwrite(GATE, b"\0", 1)

    def _end(self) -> NoReturn:
        """End as the interpreter ended: the agent sees only us."""
        _, status = os.waitpid(self._pid, 0)
        returncode = os.waitstatus_to_exitcode(status)
        if returncode < 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), -returncode)
        os._exit(returncode & 0xFF)

    def _write(self, text: str) -> None:
        self._script.sendall(text.encode("utf-8", "surrogatepass"))

    # --- The agent ---

    def _take_message(self) -> None:
        received = receive_message(self._control)
        if received is None:
            raise EOFError
        message, descriptors = cast("tuple[tuple[Any, ...], list[int]]", received)
        if message[0] == "sync":
            self._signalled = False
            if self._disturbed:
                self._question = os.urandom(8).hex()
                self._retries = list(self._dialect.retries)
                self._write(self._dialect.ask(self._files, self._question))
            else:
                self._control.send(b"S")
        elif message[0] == "renew":
            self._write(self._dialect.renew(message[1]))
        else:
            _, number, code, env, cwd = message
            self._run(number, code, env, cwd, descriptors)

    def _run(self, number: int, code: str, env: dict[str, str] | None, cwd: str | None, descriptors: list[int]) -> None:
        self._number = number
        self._descriptors = descriptors
        files = descriptors if len(descriptors) == 3 else [-1, *descriptors]
        try:
            if cwd is not None:
                os.chdir(cwd)
            descriptors.append(write_memory_file(code.encode("utf-8", "surrogatepass")))
            if any(not name or "=" in name or "\0" in name + value for name, value in (env or {}).items()):
                raise RefusedError
            self._token = os.urandom(8).hex()
            text = self._dialect.run(self._files, self._token, number, code, env, cwd, [*files[:3], descriptors[-1]])
        except (OSError, RefusedError) as exc:
            self._finish(b"F", b"%d" % ((exc.errno if isinstance(exc, OSError) else None) or _EINVAL))
            return
        self._begun = False
        self._write(text)

    def _finish(self, kind: bytes, rest: bytes) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        self._token = ""
        self._retries = []
        self._control.send(kind + self._number.to_bytes(4, "big") + rest)

    # --- The interpreter ---

    def _take_answers(self) -> None:
        *lines, self._unfinished = (self._unfinished + os.read(self._answers, 1 << 16)).split(b"\n")
        self._unfinished = self._unfinished[:_LINE_LIMIT]
        for line in lines:
            # Anybody can write here: what is not from our worker, or late, means nothing.
            match line.split(b" "):
                case [b"R"] if not self._ready:
                    self._ready = True
                    self._control.send(b"R")
                case [b"B", token] if token == self._token.encode():
                    self._begun = True
                case [b"D", token, status, *value] if token == self._token.encode() and status.isdigit():
                    self._finish_run(int(status) & 0xFF, b"".join(value))
                case [b"F", token, errno] if token == self._token.encode() and errno.isdigit():
                    self._finish(b"F", errno[:3])
                case [b"S", token] if token == self._question.encode():
                    self._question = ""
                    self._disturbed = False
                    self._retries = []
                    self._control.send(b"S")
                case _:
                    pass

    def _finish_run(self, status: int, value: bytes) -> None:
        if not self._can_be_told():
            # The code has closed what we write to. It would not hear of the next run, or take what is left for its end.
            os.killpg(self._pid, signal.SIGKILL)
            os._exit(status)
        try:
            text = bytes.fromhex(value.decode("ascii"))[:_VALUE_LIMIT].decode("utf-8", "ignore")
        except ValueError:
            text = ""
        if text:
            self._finish(b"V", bytes([status]) + text.encode())
        else:
            self._finish(b"D", bytes([status]))

    def _can_be_told(self) -> bool:
        """Whether the interpreter still has what it was started with to read from."""
        try:
            read = os.stat(f"/proc/{self._pid}/fd/{self._dialect.descriptor}")
        except OSError:
            return False
        return os.path.samestat(read, self._theirs)
