"""The fork server: process 1 of the PID namespace that users' processes live in.

It is small, has one thread and is started before Trio is imported, because what `fork` costs grows
with the parent's memory, and under software emulation it costs much. It does what has to happen at
one place to be free of races: fork, reap, signal (a PID can't be reused before its parent has reaped
it), and the life of a control group. Everything else is the agent's.

Requests and events are tuples, by `messages`. The agent numbers the processes.

    ("spawn", number, request), descriptors   request: see `Request`; what is to be executed is in one of them, for
                                              our child: what we have in memory, users may see (see `porter`)
    ("signal", number, signal, group)         to the process, or to its process group
    ("kill", number)                          SIGKILL to everything it ever started (its control group)
    ("mount", targets), descriptors           file systems on block devices, read-only; directories are made for them
    ("certificates",), descriptors            what users' programs are to trust besides, in a memory file; without one: nothing

    ("started", number, pid)                  exec succeeded; with our end of its terminal, or the files of a `Meter`, if asked
    ("failed", number, errno, strerror, subject)   a user, a file, or a number that `becoming` has for what we don't know
    ("ready",), descriptors                   the first event: files of the users that say who this machine is,
                                              `mounts.IDENTITY_FILES`, to be written to; none where their root is ours
    ("signalled", number)                     a "signal" has been delivered, or there was nobody to take it
    ("mounted", errno, strerror, filename)    the answer to "mount" and "certificates"; 0 if nothing failed
    ("exited", number, returncode, oom, used) as `subprocess.Popen.returncode`; oom: the kernel killed for want of memory;
                                              used: see `_used`
    ("empty", number)                         nothing is left in its control group; the last event of a number
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource  # or os.wait4 would, after the fork of the first process
import select
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, cast

from ..messages import receive_message, send_message
from ..process_status import find_processes
from .becoming import Becoming
from .cgroups import Group, Groups
from .confinement import Confinement as Confinement
from .terminals import open_terminal
from .users import PATH, find_user, read_environment

if TYPE_CHECKING:  # `typing` itself is wanted by nothing else that is imported before the fork
    from collections.abc import Generator, Sequence

    from .becoming import Request
    from .certificates import Certificates
    from .oom import OomKills
    from .pressure import Pressure
    from .twin import Twin
    from .users import User


#: Seconds after which we look for who keeps what was killed from ending; again after twice as many, and so on up to the limit.
_TRACED_PATIENCE = 0.2
_TRACED_PATIENCE_LIMIT = 2.0
#: Threads of a control group that are looked at each time.
_TRACED_LIMIT = 64
#: Descriptors below this are never ours, so that a child can put its own there in any order.
_RESERVED_DESCRIPTORS = 14


class _Process:
    __slots__ = ("failure", "group", "kill_sent", "number", "oom_killed", "pid", "reaped", "wanted")

    def __init__(self, number: int, pid: int, failure: int, group: Group | None, wanted: list[int]) -> None:
        self.number = number
        self.pid = pid
        self.failure = failure
        """The pipe on which the child reports what kept it from exec, or -1."""
        self.group = group
        self.wanted = wanted
        """What the agent gets of it when it has started: our end of its terminal, or the files of a `Meter`."""
        self.kill_sent = False
        self.oom_killed = False
        """It was killed for want of memory, by us or by the kernel."""
        self.reaped = False


class Spawner:
    """Serves one agent until the agent is gone; then everything it started is killed."""

    def __init__(self, sock: socket.socket, confinement: Confinement) -> None:
        self.twin: Twin | None = None
        """The users' Python, if it is the same program as ours."""
        self.certificates: Certificates | None = None
        """Those that users' programs trust, where they have a root of their own."""
        self.oom_kills: OomKills | None = None
        """Where the kernel's log can be read. Without it, what the kernel kills for want of memory is like any other that is killed."""
        self._sock = sock
        self._default_user, self._default_group = confinement.user, confinement.group
        self._directory = confinement.directory
        self.environment: dict[str, str] = {}  # what the image adds to everybody's
        self._groups = None if confinement.cgroup is None else Groups(confinement.cgroup)
        self._poll = select.poll()
        self._processes: dict[int, _Process] = {}
        self._by_pid: dict[int, _Process] = {}
        self._by_descriptor: dict[int, _Process] = {}
        self._dying: set[_Process] = set()
        self._proc = -1
        self._patience = _TRACED_PATIENCE
        self._look_at = 0.0
        """When to look for the tracers of those."""
        # We never block on the agent, so the agent may block on us.
        self._unsent: deque[tuple[tuple[object, ...], Sequence[int]]] = deque()

    def run(self) -> None:
        """Serve until the agent closes its end."""
        # A child may get one before it has become what it is to be. It then waits until that says who takes it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Children inherit what is ignored: by Python itself, in the background of a shell, and under nohup(1).
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        wakeup, trigger = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(trigger, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        self._poll.register(wakeup, select.POLLIN)
        self._poll.register(self._sock, select.POLLIN)
        agent = self._sock.fileno()
        # Opened before any user is there to put something in its place.
        with contextlib.suppress(FileNotFoundError):
            self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        pressure = self._watch_pressure()
        # Objects made so far live for ever: the collector need not touch, and so copy, their pages in every child.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while True:
                polled = self._poll.poll(self._patience * 1000 if self._dying else None)
                if self._dying and time.monotonic() >= self._look_at:
                    self._kill_again()
                # Failures first: "failed" is to come before the "exited" that follows from it.
                ready = sorted(polled, key=lambda event: event[0] not in self._by_descriptor)
                pressed = False
                for descriptor, events in ready:
                    if descriptor == wakeup:
                        os.read(wakeup, 512)
                        self._reap()
                    elif descriptor in self._by_descriptor:
                        self._child_reported(descriptor)
                    elif pressure is not None and descriptor == pressure.descriptor:
                        pressed = True
                    elif descriptor == agent:
                        if events & select.POLLOUT:
                            self._flush()
                        if events & ~select.POLLOUT and not self._serve_request():
                            return
                # Last, as it may be about what a request ends; then its end is what gives memory back.
                if pressed and pressure is not None and not self._dying:
                    self._relieve(pressure)
        finally:
            for process in list(self._processes.values()):
                self._kill(process)

    def _watch_pressure(self) -> Pressure | None:
        if self._groups is None or self._proc < 0:
            return None
        try:
            pressure = self._groups.watch_pressure(self._proc)
        except OSError:
            return None  # a kernel that can't tell; its own killer is left
        self._poll.register(pressure.descriptor, select.POLLPRI)
        return pressure

    def _relieve(self, pressure: Pressure) -> None:
        process = self._by_pid.get(pressure.relieve())
        if process is not None:
            process.oom_killed = True

    def _note_oom_kills(self) -> None:
        """Find out which of our processes the kernel has killed: it may have been a child of theirs."""
        if self.oom_kills is not None:
            for pid in self.oom_kills.find(self._by_pid):
                self._by_pid[pid].oom_killed = True

    # --- Requests ---

    def _serve_request(self) -> bool:
        try:
            received = receive_message(self._sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if received is None:
            return False
        message, descriptors = cast("tuple[tuple[object, ...], list[int]]", received)
        try:
            match message:
                case ("spawn", int(number), request):
                    self._spawn(number, cast("Request", request), descriptors)
                case ("signal", int(number), int(signum), bool(group)):
                    self._signal(number, signum, group)
                case ("kill", int(number)):
                    if number in self._processes:
                        self._kill(self._processes[number])
                case ("mount", targets):
                    self._mount(cast("list[str]", targets), descriptors)
                case ("certificates",):
                    self._set_certificates(descriptors)
                case _:
                    raise AssertionError(f"not a request: {message!r}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _spawn(self, number: int, request: Request, descriptors: list[int]) -> None:
        group = None
        ours: list[int] = []
        theirs: list[int] = []
        try:
            user = self._find_user(request["user"])
            if "terminal" in request:
                rows, columns, _ = request["terminal"]
                ours, theirs = ([end] for end in open_terminal(rows, columns, None if user is None else user.uid))
            if self._groups is not None:
                group = self._groups.take(new="metered" in request)
                ours += [group.open_usage()] if "metered" in request else []
            becoming = Becoming(request, descriptors, user, group, theirs, self.twin)
            failure, report = os.pipe2(os.O_CLOEXEC)
            try:
                pid = os.fork()
                if pid == 0:
                    becoming.become(report)
            except BaseException:
                os.close(failure)
                raise
            finally:
                os.close(report)
        except OSError as exc:
            if group is not None and self._groups is not None:
                self._groups.give_back(group)
            for descriptor in ours:
                os.close(descriptor)
            self._send("failed", number, exc.errno, exc.strerror, exc.filename or "")
            return
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        if group is not None and "metered" in request:
            # Its program's, too, when it has become that: the file is the process's.
            with contextlib.suppress(OSError):  # it is over, or this kernel has no such file
                ours.append(os.open(f"{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._proc))
        process = _Process(number, pid, failure, group, ours)
        self._processes[number] = self._by_pid[pid] = self._by_descriptor[failure] = process
        self._poll.register(failure, select.POLLIN)

    def _signal(self, number: int, signum: int, group: bool) -> None:
        process = self._processes.get(number)
        # A zombie's PID is still its own, but once it is reaped the number may be anybody's.
        if process is not None and not process.reaped:
            try:
                (os.killpg if group else os.kill)(process.pid, signum)
            except ProcessLookupError:
                os.kill(process.pid, signum)  # it has yet to make a group of its own
        self._send("signalled", number)

    def _kill(self, process: _Process) -> None:
        process.kill_sent = True
        if not self._dying:
            self._patience = _TRACED_PATIENCE
            self._look_at = time.monotonic() + self._patience
        self._dying.add(process)
        if process.group is not None:
            process.group.kill()
        if not process.reaped:
            # It may not have joined its group yet, or there are no groups.
            os.kill(process.pid, signal.SIGKILL)
        if process.group is None:
            for pid in _other_members(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if process.reaped:
                self._forget(process)

    def _mount(self, targets: list[str], devices: list[int]) -> None:
        from . import mounts  # `main` has imported it, where there is a root of the users' own

        with self._answering_mounted():
            for target, device in zip(targets, devices, strict=True):
                os.makedirs(target, exist_ok=True)
                flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOATIME
                mounts.mount(f"/proc/self/fd/{device}", target, "ext4", flags)

    def _set_certificates(self, descriptors: list[int]) -> None:
        with self._answering_mounted():
            if self.certificates is None:
                raise PermissionError(errno.EPERM, "programs share our certificates here")
            self.certificates.set(descriptors)

    @contextlib.contextmanager
    def _answering_mounted(self) -> Generator[None]:
        """Answer with what came of the block, if anything can be mounted here."""
        try:
            if self._default_user is None:
                raise PermissionError(errno.EPERM, "nothing can be mounted here")
            yield
        except OSError as exc:
            self._send("mounted", exc.errno or errno.EIO, exc.strerror or "", exc.filename or "")
        else:
            self._send("mounted", 0, "", "")

    def _kill_again(self) -> None:
        """Kill again, and end those who trace what was killed: until they let go, it can stay stopped at its end, or be a zombie of theirs."""
        # Looking takes a while as well, of what those need to end who are many.
        self._patience = min(2 * self._patience, _TRACED_PATIENCE_LIMIT)
        self._look_at = time.monotonic() + self._patience
        for process in self._dying:
            if process.group is not None:
                # Again, for who has come in since: what was being forked, where the kernel misses that.
                process.group.kill()
            threads = [] if process.group is None else process.group.threads()[:_TRACED_LIMIT]
            if not process.reaped:
                threads.append(process.pid)
            for thread in threads:
                # None of them, or the tracer, need be there any more.
                with contextlib.suppress(OSError):
                    status = os.open(f"{thread}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
                    with open(status, "rb", buffering=0) as file:
                        tracer = int(file.readall().partition(b"\nTracerPid:")[2].split(None, 1)[0])
                    if tracer:
                        os.kill(tracer, signal.SIGKILL)

    def _find_user(self, named: str | int | None) -> User | None:
        wanted = self._default_user if named is None else named
        if wanted is None:
            return None
        if self._default_user is None:
            raise PermissionError(errno.EPERM, "processes can't change their user here", str(wanted))
        user = find_user(wanted)
        if user is None:
            raise FileNotFoundError(errno.ENOENT, "no such user", str(wanted))
        if named is None and self._default_group is not None and self._default_group != user.gid:
            user.gid, user.groups = self._default_group, [self._default_group]
        user.directory = self._directory or user.home
        user.more = self.environment
        return user

    # --- Events ---

    def _child_reported(self, descriptor: int) -> None:
        process = self._by_descriptor.pop(descriptor)
        self._poll.unregister(descriptor)
        if descriptor == process.failure:
            process.failure = -1
            with open(descriptor, "rb") as report:
                error = report.read()
            wanted, process.wanted = process.wanted, []
            if error:
                for end in wanted:
                    os.close(end)
                number, subject = map(int, error.split())
                self._send("failed", process.number, number, os.strerror(number), subject)
            else:
                self._send("started", process.number, process.pid, descriptors=wanted)
        if process.reaped:
            self._finish_if_empty(process)

    def _reap(self) -> None:
        while True:
            try:
                # Left there for now: only as long as it is, its id says who it was.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            process = self._by_pid.get(ended.si_pid)
            was_killed = (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGKILL)
            if was_killed and process is not None and not process.kill_sent:
                self._note_oom_kills()
            _, status, usage = os.wait4(ended.si_pid, 0)
            # Others are orphans: as process 1 of our namespace we inherit them all.
            if process is None:
                continue
            del self._by_pid[ended.si_pid]
            if process.failure >= 0:
                # It may have died before exec without a word, or its word may not have been read yet.
                self._child_reported(process.failure)
            process.reaped = True
            oom = was_killed and process.oom_killed and not process.kill_sent
            self._send("exited", process.number, os.waitstatus_to_exitcode(status), oom, _used(usage))
            self._finish_if_empty(process)

    def _finish_if_empty(self, process: _Process) -> None:
        group = process.group
        if group is None or self._groups is None:
            if process.kill_sent or not _other_members(process.pid):
                self._forget(process)
        elif group.is_populated():
            self._by_descriptor[group.events] = process
            self._poll.register(group.events, select.POLLPRI)
        else:
            self._groups.give_back(group)
            self._forget(process)

    def _forget(self, process: _Process) -> None:
        self._dying.discard(process)
        del self._processes[process.number]
        self._send("empty", process.number)

    def _send(self, *event: object, descriptors: Sequence[int] = ()) -> None:
        """Send an event, as soon as the agent takes it, with *descriptors*, which are closed here then."""
        self._unsent.append((event, descriptors))
        if len(self._unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            event, descriptors = self._unsent[0]
            try:
                send_message(self._sock, event, descriptors, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._poll.modify(self._sock, select.POLLIN | select.POLLOUT)
                return
            except (BrokenPipeError, ConnectionResetError):
                pass  # the end of the stream is noticed where requests are read
            self._unsent.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        self._poll.modify(self._sock, select.POLLIN)


def _other_members(leader: int) -> list[int]:
    """Who else is in the session of *leader*: what there is to kill where there are no control groups."""
    return [
        pid
        for pid, (state, _, _, session, *_) in find_processes()
        if int(session) == leader and pid != leader and state not in b"ZX"
    ]


def _used(usage: resource.struct_rusage) -> tuple[int, int, int]:
    """Return what a process and those that it has waited for used: microseconds, KiB of one at the most, blocks of 512 bytes written."""
    return round((usage.ru_utime + usage.ru_stime) * 1e6), usage.ru_maxrss, usage.ru_oublock


def _ignore(signum: int, frame: object) -> None:
    """Let the signal interrupt poll(2); the work is done there."""


def main(sock: socket.socket, confinement: Confinement) -> None:
    """Be a spawner for the agent at the other end of *sock*, until that is closed.

    Takes the whole process: its namespaces, descriptors, signal handlers and children.
    """
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    reserved = [os.dup(null)]
    while reserved[-1] < _RESERVED_DESCRIPTORS:
        reserved.append(os.dup(null))
    sock = _move_up(sock)
    for target in (0, 1):
        os.dup2(null, target)
    spawner = Spawner(sock, confinement)
    identity: list[int] = []
    if confinement.root is not None:
        from . import certificates, mounts, oom, twin

        with contextlib.suppress(OSError):  # a container's, in tests
            spawner.oom_kills = oom.OomKills()
        program = twin.open_own_program()
        mounts.enter_namespaces()
        mounts.enter_root(confinement.root)
        identity = mounts.open_identity_files()
        spawner.environment = read_environment()
        spawner.certificates = certificates.Certificates()
        spawner.twin = twin.find_twin(program, (f"{directory}/python3" for directory in PATH.split(":")))
    send_message(sock, ("ready",), identity)
    for descriptor in identity:
        os.close(descriptor)
    spawner.run()


def _move_up(sock: socket.socket) -> socket.socket:
    sock.set_inheritable(False)
    if sock.fileno() >= _RESERVED_DESCRIPTORS:
        return sock
    moved = sock.dup()
    # Its old number stays taken, for the reserved ones to be complete.
    os.dup2(moved.fileno(), sock.detach(), inheritable=False)
    return moved
