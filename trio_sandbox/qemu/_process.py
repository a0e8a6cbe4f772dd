"""The host's own processes: started, drained, ended and reaped by the block that wants them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, final

import trio

from .._errors import MissingProgramError, SandboxError
from .._nurseries import hide_nursery
from .._observe import part_logger
from .._programs import FOR_CONTAINERS, REQUIREMENTS, find_program
from ._reaping import Gate, is_ended, reap

_log = part_logger("process")

#: Bytes of output kept unless asked otherwise: enough for the message that explains a failure.
_TAIL_BYTES: Final = 16 * 2**10
#: Bytes read at a time, and the most that is still read once the process has ended: a grandchild
#: that kept the pipe may go on writing for ever.
_READ_BYTES: Final = 64 * 2**10
_LAST_READS: Final = 64
#: Seconds for the kernel to take away a killed process. One that is stuck in the kernel takes no
#: signal; waiting longer would hang the owner without helping.
_REAP_SECONDS: Final = 30.0
#: Seconds for the rest of its process group to end, which was killed with it. What has left the group may keep the pipe for ever.
_CHILDREN_SECONDS: Final = 2.0


class BoundedTail:
    """The last bytes of a stream that may be endless."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._dropped = 0

    def append(self, data: bytes) -> None:
        """Add *data*, and drop what is too old to be kept."""
        self._data += data
        # Trimmed at twice the limit, so that the cost for each byte stays constant.
        if len(self._data) > 2 * self._limit:
            self._trim()

    def _trim(self) -> None:
        excess = len(self._data) - self._limit
        if excess > 0:
            del self._data[:excess]
            self._dropped += excess

    @property
    def dropped(self) -> int:
        """How many bytes have been dropped."""
        self._trim()
        return self._dropped

    def __bytes__(self) -> bytes:
        self._trim()
        return bytes(self._data)

    def __str__(self) -> str:
        return bytes(self).decode("utf-8", errors="replace")


@final
class InheritedFds:
    """File descriptors made for one child process, closed here whatever becomes of it.

    Use it as a context manager around the making of the descriptors and the spawning. `run_owned`
    closes it as soon as the child has its copies, so that the peer's end of a socket is nobody's
    but the child's.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __enter__(self) -> InheritedFds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The descriptors: the numbers are the same in the child."""
        return tuple(self._fds)

    def add(self, fd: int) -> int:
        """Take over *fd*, and return it."""
        self._fds.append(fd)
        return fd

    def open(self, path: str | os.PathLike[str], flags: int) -> int:
        """Open *path* for the child, close-on-exec everywhere else."""
        return self.add(os.open(path, flags | os.O_CLOEXEC))

    def socketpair(self) -> tuple[socket.socket, int]:
        """Make a pair of stream sockets: ours, and the number of the child's."""
        ours, theirs = socket.socketpair()
        return ours, self.add(theirs.detach())

    def close(self) -> None:
        """Close them all; again is no error."""
        while self._fds:
            os.close(self._fds.pop())


def require_program(name: str) -> str:
    """Return the absolute path of the program *name*, or *name* itself if it is a path.

    Raises:
      MissingProgramError: if it is not installed; the message names the package.
    """
    found = find_program(name)
    if found is None:
        packages = {requirement.name: requirement.package for requirement in (*REQUIREMENTS, *FOR_CONTAINERS)}
        base = os.path.basename(name)
        raise MissingProgramError(name, packages.get(base, base))
    return found


def minimal_environment() -> dict[str, str]:
    """Return an environment that carries nothing of the user's, secrets least of all.

    For programs that deal with what a guest sent. Add `Runtime.environment` to it.
    """
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


@final
class OwnedProcess:
    """A running or ended child of ours; made by `run_owned` only."""

    def __init__(self, name: str, process: trio.Process, tail_bytes: int) -> None:
        self._name = name
        self._process = process
        self._tail = BoundedTail(tail_bytes)
        self._drained = trio.Event()
        self._ended = trio.Event()
        self._returncode: int | None = None

    def __repr__(self) -> str:
        state = f"running with PID {self.pid}" if self._returncode is None else describe_exit(self._returncode)
        return f"<{self._name}: {state}>"

    @property
    def name(self) -> str:
        """The program's name, for messages."""
        return self._name

    @property
    def pid(self) -> int:
        """The process id, which is also that of its process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it has not been reaped."""
        return self._returncode

    def output(self) -> str:
        """Return the last of what it printed on stdout and stderr, in order of arrival."""
        return str(self._tail)

    async def wait(self) -> int:
        """Block until it has ended and its last output is here; return the exit status."""
        await self._ended.wait()
        assert self._returncode is not None
        return self._returncode

    def kill(self) -> None:
        """End it, and all of its process group, at once. No error if it is gone."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal to its process group. No error if it is gone."""
        # While it is unreaped, the number can't be another group's; `_supervise` alone reaps.
        if self._returncode is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass
            except PermissionError:
                # Every member has become another user's, which none of our programs does.
                _log.error("may not send signal %d to %r", number, self)

    async def supervise(self, grace: float, on_output: Callable[[bytes], object] | None, gate: Gate) -> None:
        """Drain and reap; when cancelled, end it first. For `run_owned` only."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            self.kill()
            with trio.move_on_after(_REAP_SECONDS, shield=True):
                self._returncode = await self._process.wait()
            self._settle(None)
            raise
        gate.open()
        # Not cancelled with us: until it has ended, it must not find its pipe full.
        draining = trio.CancelScope(shield=True)
        try:
            with hide_nursery("run_owned()"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._drain, draining, on_output)
                    try:
                        await trio.lowlevel.wait_readable(pidfd)
                    finally:
                        with trio.move_on_after(grace + _REAP_SECONDS, shield=True):
                            await self._end(pidfd, grace)
                        draining.cancel(reason=f"{self._name} has ended")
        finally:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)
            self._settle(on_output)

    async def _end(self, pidfd: int, grace: float) -> None:
        """Leave nothing of the process group: ask, then kill, then reap, all of it bounded."""
        ended_by_itself = is_ended(pidfd)
        if not ended_by_itself and grace > 0:
            self.send_signal(signal.SIGTERM)
            with trio.move_on_after(grace):
                await trio.lowlevel.wait_readable(pidfd)
        # The leader is not reaped yet, so the group is still ours, and so are the members
        # that it left behind.
        self.kill()
        await trio.lowlevel.wait_readable(pidfd)
        status = reap(pidfd)
        self._returncode = -signal.SIGKILL if status is None else status
        await self._process.wait()  # it closes what Trio has open for it
        # What it started ends in its own time, and has the pipe until then: an ordinary user's QEMU, for one.
        with trio.move_on_after(_CHILDREN_SECONDS):
            await self._drained.wait()
        if status is None and ended_by_itself:
            raise SandboxError(
                f"how {self._name} ended can't be known: this program ignores SIGCHLD, or reaps children that are not its "
                "own. Call signal.signal(signal.SIGCHLD, signal.SIG_DFL) before you open a host"
            )

    def _settle(self, on_output: Callable[[bytes], object] | None) -> None:
        if self._returncode is None:
            _log.error("%s with PID %d did not go away after SIGKILL; it is left to the system", self._name, self.pid)
            self._returncode = -signal.SIGKILL
        assert self._process.stdout is not None
        stdout = self._process.stdout
        assert isinstance(stdout, trio.lowlevel.FdStream)
        try:
            for _ in range(_LAST_READS):
                data = os.read(stdout.fileno(), _READ_BYTES)
                if not data:
                    break
                self._take(data, on_output)
        except BlockingIOError:
            pass
        finally:
            stdout.close()
            self._ended.set()

    async def _drain(self, scope: trio.CancelScope, on_output: Callable[[bytes], object] | None) -> None:
        """Read what it prints for as long as it runs, so that it never blocks on a full pipe."""
        assert self._process.stdout is not None
        try:
            with scope:
                while data := await self._process.stdout.receive_some(_READ_BYTES):
                    self._take(bytes(data), on_output)
        finally:
            self._drained.set()

    def _take(self, data: bytes, on_output: Callable[[bytes], object] | None) -> None:
        self._tail.append(data)
        if on_output is not None:
            on_output(data)


def describe_exit(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}"


@trio.lowlevel.enable_ki_protection
async def run_owned(
    argv: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str],
    inherited: InheritedFds | None = None,
    grace: float = 0.0,
    cwd: str | os.PathLike[str] = "/",
    tail_bytes: int = _TAIL_BYTES,
    on_output: Callable[[bytes], object] | None = None,
    name: str | None = None,
    task_status: trio.TaskStatus[OwnedProcess] = trio.TASK_STATUS_IGNORED,
) -> OwnedProcess:
    """Run a program in a process group of its own until it ends.

    Stdin is empty. Stdout and stderr are one pipe, drained at once into a bounded tail. When this
    returns or raises, the process is reaped, and what it left of its process group has been killed.

    Cancelled, it ends the process: SIGTERM, after *grace* seconds SIGKILL.

    Args:
      argv: The program, as a path or a name to look for, and its arguments.
      environment: All of its environment; put `Runtime.environment` in, so that the reaper knows it.
      inherited: Descriptors for it to inherit under the same numbers. Closed here once it runs,
        or failed to, or the caller was cancelled.
      grace: Seconds between SIGTERM and SIGKILL; 0 kills at once.
      cwd: Its working directory.
      tail_bytes: How much of the output `OwnedProcess.output` keeps.
      on_output: Called with each piece of output as it comes; must not block. What it raises ends
        the process and comes out of here.
      name: What to call it in messages; by default the program's own name.
      task_status: Started with the running process.

    Returns:
      The ended process. Its `returncode` is for the caller to judge.

    Raises:
      MissingProgramError: if the program is not installed.
      OSError: if it can't be started for another reason.
      SandboxError: if it ended by itself and nobody can know how, since this process ignores SIGCHLD (Linux before 6.15).
    """
    inherited = InheritedFds() if inherited is None else inherited
    program = os.fspath(argv[0])
    name = os.path.basename(program) if name is None else name
    with Gate() as gate:
        with inherited:
            try:
                process = await trio.lowlevel.open_process(
                    gate.command([require_program(program), *(os.fspath(argument) for argument in argv[1:])]),
                    stdin=gate.stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=inherited.numbers,
                    env={**environment},
                    cwd=cwd,
                    process_group=0,
                )
            except OSError as exc:
                if exc.errno == errno.E2BIG:
                    raise ValueError(f"the arguments and environment for {name} are too long for the kernel") from exc
                raise
        # Nothing may come between the spawning and the supervision: no await, no `KeyboardInterrupt`.
        owned = OwnedProcess(name, process, tail_bytes)
        task_status.started(owned)
        await owned.supervise(grace, on_output, gate)
        return owned
