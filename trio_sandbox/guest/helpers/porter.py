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
    U TOKEN TEXT            what undoes the variables and the directory of this run, in its own language
    S TOKEN                 it has no SIGINT to take any more

What it tells the interpreter is a `Dialect`'s affair, but for GATE, a file of two bytes: while the first is not 0 the interpreter
could not stand a SIGINT, and none is sent; the second is not 0 while we send one, which the interpreter waits for. The interpreter has a process group of its own: SIGINT comes to us, and
goes on to a run that has begun, or not at all. Code that writes here can end its own run early and break its own interpreter, as
any code can in its own process; for the next run there is another token, or another interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time
from typing import TYPE_CHECKING, cast

from ..messages import receive_message, write_memory_file
from ..process_status import find_processes, read_status
from .dialects import ANSWERS, GATE, Dialect, Order

if TYPE_CHECKING:
    from typing import Any, NoReturn

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
#: What the agent is told of a run's end besides its number: the status, and what `_Usage.read` returns.
_END = struct.Struct(">BIQ")
#: In place of what was written, where nobody counts that.
UNCOUNTED = (1 << 64) - 1
#: Seconds after which a closed gate is looked at again.
_GATE_PATIENCE = 0.01
#: Seconds after which we look whether an interpreter has come back without an answer; the last holds for all later times.
_PROBING = (0.1, 0.2, 0.4, 1.0)


def divide(dialect: Dialect, report: int) -> None:
    """Fork: return in the child, which is to become the interpreter; the parent never does.

    Called when all else is as the interpreter is to have it, CONTROL included, and SIGINT blocked.
    *report* is left open in the child only. The spawner's descriptors have numbers above ours.
    """
    os.closerange(CONTROL + 1, report)
    os.closerange(report + 1, 1 << 20)
    control = socket.socket(fileno=CONTROL)
    # One after the other: there are not many numbers below these.
    for target in dialect.texts:
        _place(write_memory_file(control.recv(_SOURCE_LIMIT)), target)
    _place(write_memory_file(b"\0\0"), GATE)
    answers, answering = os.pipe()
    _place(answering, ANSWERS)
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


def _place(descriptor: int, target: int) -> None:
    os.dup2(descriptor, target, inheritable=False)
    os.close(descriptor)


class _Usage:
    """What the kernel counts of an interpreter."""

    def __init__(self, pid: int, tells_memory: bool) -> None:
        # A kernel may lack one, and a /proc show none.
        self._io = _open(pid, "io", os.O_RDONLY)
        self._status = _open(pid, "status", os.O_RDONLY) if tells_memory else -1
        self._forget = _open(pid, "clear_refs", os.O_WRONLY) if self._status >= 0 else -1

    def begin(self) -> None:
        """Have the most memory that it had be what it has now."""
        if self._forget >= 0:
            with contextlib.suppress(OSError):  # it is over
                os.write(self._forget, b"5")

    def read(self) -> tuple[int, int]:
        """Return the most memory that it had since, in KiB, or 0; and the blocks of 512 bytes that it has written, or `UNCOUNTED`."""
        peak, written = 0, UNCOUNTED
        with contextlib.suppress(OSError, ValueError, IndexError):
            if self._io >= 0:
                written = int(os.pread(self._io, 4096, 0).partition(b"\nwrite_bytes: ")[2].split(None, 1)[0]) // 512
            if self._forget >= 0:
                peak = int(os.pread(self._status, 4096, 0).partition(b"\nVmHWM:")[2].split(None, 1)[0])
        return peak, written


def _open(pid: int, name: str, flags: int) -> int:
    try:
        return os.open(f"/proc/{pid}/{name}", flags | os.O_CLOEXEC)
    except OSError:
        return -1


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
        self._usage = _Usage(pid, dialect.tells_memory)
        self._ready = False
        self._unfinished = b""
        # The run, and what the interpreter may have open of it.
        self._token = ""
        self._number = 0
        self._begun = False
        # Whether the agent is to be told that it has.
        self._has_streams = False
        self._descriptors: list[int] = []
        # The functions of the host that it may call: their names, and what it calls them by.
        self._functions: tuple[list[str], list[int]] | None = None
        # SIGINT: one that has come, whether the interpreter was ever sent one that it has yet to answer for, and what to repeat.
        self._signalled = False
        self._disturbed = False
        self._question = ""
        self._retries: list[float] = []
        # When to look whether it came back without an answer, and what to write, one after the other, before we believe it.
        self._probes: list[float] = []
        self._reminders: list[str] = []
        # Whether what it had read of a line was taken away, in this run.
        self._reset = False
        # What it is to read after the run.
        self._undoing = b""
        self._last_status = 0

    def serve(self) -> NoReturn:
        wakeup, trigger = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(trigger, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        over = os.pidfd_open(self._pid)
        poll = select.poll()
        for descriptor in (self._answers, wakeup, over):
            poll.register(descriptor, select.POLLIN)
        self._write(self._dialect.begin(self._files))
        while True:
            held = self._signalled and self._begun
            waits = [_GATE_PATIENCE] if held else self._retries or self._probes
            patience = waits[0] if waits else None
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
            if ready or held:
                continue
            if self._retries:
                self._repeat()
            elif self._probes:
                self._look_for_end()

    def _note(self, signum: int, frame: object) -> None:
        self._signalled = True

    def _pass_signal_on(self) -> None:
        # One that comes while there is no run is kept: it may have overtaken its run, which we have yet to read of. If it is one for
        # the run before, the agent has us forget it before it sends another run.
        if self._signalled and self._begun and self._interrupt():
            self._signalled = False
            self._disturbed = True
            self._retries = list(self._dialect.retries)

    def _repeat(self) -> None:
        if self._question:
            # A SIGINT that comes while it reads a line takes part of that away, and can leave a quote or a brace that nothing closes.
            # Another one, which comes alone, takes the rest away.
            if self._dialect.resets and len(self._retries) % 2 == 0:
                self._interrupt()
            else:
                self._write(self._dialect.ask(self._files, self._question))
        # It may wait for a child that was not there yet.
        elif self._interrupt():
            self._write(self._dialect.remind(self._files, self._token))
            self._remind_later()
        self._retries.pop(0)

    def _look_for_end(self) -> None:
        """Find out whether the interpreter waits for its next line although it has told no end of the run."""
        if len(self._probes) > 1:
            self._probes.pop(0)
        # What is not read yet of all that we wrote.
        (unread,) = struct.unpack("i", fcntl.ioctl(self._script, termios.TIOCOUTQ, bytes(4)))
        if unread or self._has_answered():
            return
        # It reads in blocks: what was read need not have been executed, but will be before the next block is read.
        if self._reminders:
            if not self._write(self._reminders.pop(0)):
                self._probes = []  # it tells the end of this run or is over: there is no next line for it
            return
        if self._disturbed and not self._reset:
            # It may be in the middle of a line, as above.
            self._reset = True
            self._interrupt()
            self._remind_later()
            return
        if self._begun:
            os.write(
                self._descriptors[-2],
                b"trio-sandbox: the shell can't say how the code ended; the next run has a new one\n",
            )
        self._give_up(_EX_SOFTWARE)

    def _remind_later(self) -> None:
        """Have it asked for the end of the run, and believe that it has none to tell when it has executed that."""
        probe = self._dialect.probe
        self._reminders = [self._dialect.remind(self._files, self._token) + probe, probe]

    def _interrupt(self) -> bool:
        """Send SIGINT, unless the gate is closed; it can't be closed meanwhile."""
        os.pwrite(GATE, b"\1", 1)
        try:
            if os.pread(GATE, 1, 0) != b"\0":
                return False
            if self._dialect.lead:
                os.kill(self._pid, signal.SIGINT)
                for pid in self._wait_for_quiet():
                    with contextlib.suppress(OSError):  # it has ended, or is another user's
                        os.kill(pid, signal.SIGINT)
            else:
                os.killpg(self._pid, signal.SIGINT)
            return True
        finally:
            os.pwrite(GATE, b"\0", 1)

    def _wait_for_quiet(self) -> list[int]:
        """Wait until the interpreter has done what SIGINT makes it do; return the other processes of its group.

        The kernel has woken the thread that takes the signal before we get here, and that one wakes the next: once all sleep it is done.
        Processes that sleep, too, start no others that would miss the SIGINT. Those that compute may never sleep all at once.
        """
        answers = select.poll()
        answers.register(self._answers, select.POLLIN)
        latest = time.monotonic() + self._dialect.lead
        members = _members(self._pid)
        while not answers.poll(1) and time.monotonic() < latest:
            are_asleep = all(map(_is_asleep, members))
            before, members = members, _members(self._pid)
            if are_asleep and members == before:
                break
        return [pid for pid in members if pid != self._pid]

    def _end(self) -> NoReturn:
        """End as the interpreter ended: the agent sees only us."""
        if self._has_answered():
            self._take_answers()  # all at once: a pipe holds no more
        self._disown_run()
        _, status = os.waitpid(self._pid, 0)
        returncode = os.waitstatus_to_exitcode(status)
        if returncode < 0:
            for caught in (signal.SIGINT, signal.SIGPIPE):
                signal.signal(caught, signal.SIG_DFL)
            os.kill(os.getpid(), -returncode)
        os._exit(returncode & 0xFF)

    def _write(self, text: str | bytes) -> bool:
        """Write *text* for the interpreter to read; False if nobody does any more: it is over, or its code has closed that."""
        try:
            self._script.sendall(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        except BrokenPipeError:
            return False
        return True

    def _give_up(self, status: int) -> NoReturn:
        os.killpg(self._pid, signal.SIGKILL)
        self._disown_run()
        os._exit(status)

    def _disown_run(self) -> None:
        """Say of a run that nothing of it was done, if that is so: another interpreter can have it."""
        if self._token and not self._begun:
            self._tell(b"N")

    # --- The agent ---

    def _tell(self, kind: bytes, rest: bytes = b"") -> None:
        """Tell the agent of the run."""
        self._control.send(kind + self._number.to_bytes(4, "big") + rest)

    def _take_message(self) -> None:
        received = receive_message(self._control)
        if received is None:
            raise EOFError
        message, descriptors = cast("tuple[tuple[Any, ...], list[int]]", received)
        if message[0] == "sync":
            self._signalled = False
            if self._disturbed:
                self._question = os.urandom(8).hex()
                self._retries = list(self._dialect.resets or self._dialect.retries)
                self._write(self._dialect.ask(self._files, self._question))
            else:
                self._control.send(b"S")
        elif message[0] == "renew":
            self._write(self._dialect.renew(message[1]))
        elif message[0] == "functions":
            self._functions = message[1], descriptors
        else:
            _, number, code, env, cwd = message
            # As of a file's, a byte order mark at the beginning is no part of the code.
            self._run(Order(number, code.removeprefix("\ufeff"), env or {}, cwd, self._last_status), descriptors)

    def _run(self, order: Order, descriptors: list[int]) -> None:
        self._number = order.number
        self._descriptors = descriptors
        order.functions = self._functions
        try:
            if not all(self._dialect.can_set(name, value) for name, value in order.env.items()):
                raise OSError(_EINVAL, os.strerror(_EINVAL))
            if order.cwd is not None:
                os.chdir(order.cwd)
            descriptors.append(write_memory_file(order.code.encode("utf-8", "surrogatepass")))
        except OSError as exc:
            self._finish(b"F", b"%d" % (exc.errno or _EINVAL))
            return
        order.descriptors = descriptors if len(descriptors) == 4 else [-1, *descriptors]
        self._token = os.urandom(8).hex()
        self._begun = False
        self._has_streams = order.descriptors[0] >= 0 or order.functions is not None
        self._undoing = b""
        self._reminders = [self._dialect.probe]
        self._reset = False
        self._probes = list(_PROBING) if self._dialect.probe else []
        self._usage.begin()
        if not self._write(self._dialect.run(self._files, self._token, order) + self._dialect.probe):
            self._give_up(_EX_SOFTWARE)

    def _finish(self, kind: bytes, rest: bytes) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._functions is not None:
            for descriptor in self._functions[1]:
                os.close(descriptor)
            self._functions = None
        self._token = ""
        self._begun = False
        self._retries = []
        self._probes = []
        self._write(self._undoing)
        self._undoing = b""
        self._tell(kind, rest)

    # --- The interpreter ---

    def _has_answered(self) -> bool:
        """Whether there are answers to be taken."""
        return bool(select.select([self._answers], [], [], 0)[0])

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
                    self._remind_later()
                    if self._has_streams:
                        self._tell(b"B")
                case [b"D", token, status, *value] if token == self._token.encode() and status.isdigit():
                    self._finish_run(int(status) & 0xFF, b"".join(value))
                case [b"F", token, errno] if token == self._token.encode() and errno.isdigit():
                    self._finish(b"F", errno[:3])
                case [b"U", token, *undoing] if token == self._token.encode():
                    self._undoing = b" ".join(undoing) + b"\n"
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
            self._give_up(status)
        try:
            text = bytes.fromhex(value.decode("ascii"))[:_VALUE_LIMIT].decode("utf-8", "ignore")
        except ValueError:
            text = ""
        self._last_status = status
        end = _END.pack(status, *self._usage.read())
        if text:
            self._finish(b"V", end + text.encode())
        else:
            self._finish(b"D", end)

    def _can_be_told(self) -> bool:
        """Whether the interpreter still has what it was started with to read from."""
        try:
            read = os.stat(f"/proc/{self._pid}/fd/{self._dialect.descriptor}")
        except OSError:
            return False
        return os.path.samestat(read, self._theirs)


def _is_asleep(pid: int) -> bool:
    """Whether all threads of a process wait for something, or it is over."""
    try:
        return all(read_status(f"{pid}/task/{thread}")[0] == b"S" for thread in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return True


def _members(group: int) -> list[int]:
    """Return the processes of a process group."""
    return [pid for pid, status in find_processes() if int(status[2]) == group]
