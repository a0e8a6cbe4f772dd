"""The agent's side of the spawner: children as Trio sees them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast, final

import trio

from ..messages import receive_message, send_message, write_memory_file, write_message_file

if TYPE_CHECKING:
    from ..spawner.becoming import Program, Request


#: Nobody's list of hosts is longer; a longer one is cut.
_HOSTS_LIMIT = 1 << 16


class SpawnerGoneError(Exception):
    """The spawner ended. Its processes are dead, and no new ones can be had: the agent can't go on."""


@final
class Child:
    """A process that the spawner forked, with all that it starts in turn. Made by `Children`."""

    def __init__(self, children: Children, number: int) -> None:
        self._children = children
        self.number = number
        self.pid: int = 0
        """As processes in the guest see it; 0 until it is known."""
        self.returncode: int | None = None
        """As `subprocess.Popen.returncode`."""
        self.oom_killed: bool = False
        """The kernel ended it because there was no memory left."""
        self.names: tuple[str, ...] = ("", "", "")
        """What the spawner is not told: nothing, its program and its directory, by the numbers that "failed" names them by."""
        self.failure: OSError | None = None
        """Why it was never executed."""
        self.used: tuple[int, int, int] = (0, 0, 0)
        """What it has used, once its end is known: see the spawner's `_used`."""
        self.descriptors: list[int] = []
        """Once it has started our end of its terminal, or the files of a `Meter`, if asked for; to be closed by who asked."""
        self.abandoned = False
        """Nobody waits for its start any more."""
        self.on_exit: Callable[[], None] | None = None
        """Called once when `returncode` or `failure` is known, in place of a task that waits."""
        self._started = trio.Event()
        self._exited = trio.Event()
        self._empty = trio.Event()

    async def wait_started(self) -> None:
        """Wait until exec succeeded. Raises the `OSError` that kept it from that."""
        await self._started.wait()
        if self.failure is not None:
            raise self.failure

    async def wait(self) -> int:
        """Wait for its end and return its `returncode`; it must have started."""
        await self._exited.wait()
        assert self.returncode is not None
        return self.returncode

    async def wait_empty(self) -> None:
        """Wait until neither it nor anything that it started is left."""
        await self._empty.wait()

    def signal(self, signum: int, *, group: bool = False) -> trio.Event:
        """Send a signal, to its whole process group if *group*; the event tells when that was done."""
        return self._children.signal(self, signum, group)

    def kill(self) -> None:
        """End it and everything that it started, at once and without waiting."""
        if not self._empty.is_set():
            self._children.post(("kill", self.number))

    def _on_event(self, event: tuple[object, ...]) -> None:
        match event:
            case ("started", _, int(pid)):
                self.pid = pid
                self._started.set()
                return
            case ("failed", _, int(number), str(strerror), int(subject) | str(subject)):
                self.failure = OSError(number, strerror, self.names[subject] if isinstance(subject, int) else subject)
                self._started.set()
                self._empty.set()
            case ("exited", _, int(returncode), bool(oom), (int(cpu), int(peak), int(written))):
                self.returncode = returncode
                self.oom_killed = oom
                self.used = cpu, peak, written
                self._exited.set()
            case _:
                self._empty.set()
                return
        if self.on_exit is not None:
            self.on_exit()


class _Answer:
    """What became of a request, when that is known."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.error: OSError | None = None


@final
class Children:
    """All the processes of one spawner.

    Args:
      sock: The socket to the spawner, now ours. The spawner never waits for us, so that we may block on it.
      adopted: How many processes it was asked for already, numbered from 0.

    """

    def __init__(self, sock: socket.socket, adopted: int = 0) -> None:
        self._sock = sock
        self._children: dict[int, Child] = {}
        self._acknowledgements: deque[trio.Event] = deque()
        self._mounting: deque[_Answer] = deque()
        self._ready = trio.Event()
        self._identity_files: list[int] = []
        self._resolv = b""
        self._hosts_line = b""  # that we wrote last
        self._next_number = 0
        self.adopted: list[Child] = [self._new() for _ in range(adopted)]

    def _new(self) -> Child:
        child = Child(self, self._next_number)
        self._children[child.number] = child
        self._next_number += 1
        return child

    def count(self) -> int:
        """Tell how many there are, those of which only something that they started is left included."""
        return len(self._children)

    def start(self, request: Request, descriptors: list[int]) -> Child:
        """Ask for a process, without waiting for it. The descriptors are copied."""
        child = self._new()
        self.post(("spawn", child.number, request), descriptors)
        return child

    async def spawn(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None,
        cwd: str | None,
        user: str | int | None,
        descriptors: Mapping[int, int],
        terminal: tuple[int, int, str] | None = None,
        more_env: dict[str, str] | None = None,
    ) -> Child:
        """Start a process and wait until it executes its program. Cancelled: it is killed.

        Args:
          argv: The program, which is looked up in PATH, and its arguments.
          env: Its whole environment; None for that of its user's login.
          cwd: Its working directory; None for its user's home.
          user: Name or number; None for the default user.
          descriptors: Which of ours it gets as what; 0 to 2 are /dev/null where they are not named.
          terminal: Rows, columns and TERM of a terminal to have for its descriptors 0 to 2; see `Child.descriptors`.
          more_env: Variables besides those of its user's login.

        Raises:
          OSError: as execve(2) and chdir(2) there, for a user that does not exist, and if we have no descriptor left.

        """
        request: Request = {
            "user": user,
            "targets": list(descriptors),
            "blocked": [],
        }
        if terminal is not None:
            request["terminal"] = terminal
        program: Program = (argv, env, cwd, more_env)
        file = write_message_file(program)
        try:
            child = self.start(request, [*descriptors.values(), file])
        finally:
            os.close(file)
        child.names = ("", argv[0], cwd or "")
        try:
            await child.wait_started()
        except trio.Cancelled:
            child.kill()
            child.abandoned = True
            raise
        return child

    def signal(self, child: Child, signum: int, group: bool) -> trio.Event:
        """See `Child.signal`."""
        event = trio.Event()
        self._acknowledgements.append(event)
        self.post(("signal", child.number, signum, group))
        return event

    async def mount(self, targets: list[str], devices: list[int]) -> None:
        """Mount file systems read-only where the users see them. The descriptors are copied.

        Cancelled: it is done all the same.

        Raises:
          OSError: as mount(2) or mkdir(2) failed; what came before in the list stays mounted.

        """
        await self._mounted(("mount", targets), devices)

    async def set_certificates(self, more: bytes) -> None:
        """Have users' programs trust *more*, as PEM, besides what their image says; b"": nothing more.

        Cancelled: it is done all the same.

        Raises:
          OSError: if there is no room for them.

        """
        descriptors = [write_memory_file(more)] if more else []
        try:
            await self._mounted(("certificates",), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _mounted(self, request: tuple[object, ...], descriptors: Sequence[int]) -> None:
        answer = _Answer()
        self._mounting.append(answer)
        self.post(request, descriptors)
        await answer.arrived.wait()
        if answer.error is not None:
            raise answer.error

    async def identify(self, hello: Mapping[str, object]) -> None:
        """Have the users' files say who this machine is."""
        await self._ready.wait()
        hostname, machine_id = hello.get("hostname"), hello.get("machine_id")
        if not self._identity_files or not isinstance(hostname, str) or not isinstance(machine_id, str):
            return
        hosts = self._hosts_text(f"127.0.0.1 {hostname}\n".encode())
        texts = (f"{machine_id}\n".encode(), f"{hostname}\n".encode(), hosts)
        # In users' memory that is full it may fail, and there is nobody to tell.
        with contextlib.suppress(OSError):
            for descriptor, text in zip(self._identity_files[1:], texts, strict=True):
                _rewrite(descriptor, text)

    def forget_identity(self) -> None:
        """Have the users' files say nothing of this machine any more, and write to them no more."""
        if self._identity_files:
            resolv, machine_id, _, hosts = self._identity_files
            with contextlib.suppress(OSError):  # as above
                _rewrite(resolv, self._resolv)
                _rewrite(machine_id, b"")
                _rewrite(hosts, self._hosts_text(b""))
        self._close_identity_files()

    def _close_identity_files(self) -> None:
        for descriptor in self._identity_files:
            os.close(descriptor)
        self._identity_files = []

    async def set_resolver(self, address: str | None) -> None:
        """Have the users' programs ask the resolver at *address*; None: whom their image says."""
        await self._ready.wait()
        if self._identity_files:
            with contextlib.suppress(OSError):  # as above
                _rewrite(
                    self._identity_files[0], self._resolv if address is None else f"nameserver {address}\n".encode()
                )

    def _hosts_text(self, line: bytes) -> bytes:
        """Return what is in the list of hosts now, as its user may have changed it, with *line* in place of our last one."""
        text = os.pread(self._identity_files[-1], _HOSTS_LIMIT, 0)
        if self._hosts_line and self._hosts_line in text:
            text = text.replace(self._hosts_line, line, 1)
        elif not self._hosts_line:
            text += line if text.endswith(b"\n") or not text else b"\n" + line
        self._hosts_line = line
        return text

    def post(self, request: tuple[object, ...], descriptors: Sequence[int] = ()) -> None:
        """Send the spawner a request."""
        # Without a spawner there is nothing left to request anything of, and `serve` says so.
        with contextlib.suppress(OSError):
            send_message(self._sock, request, descriptors, socket.MSG_NOSIGNAL)

    async def serve(self) -> None:
        """Take the spawner's events until cancelled; then close the socket, on which the spawner kills everything.

        Raises:
          SpawnerGoneError: if the spawner ended first.

        """
        try:
            with self._sock:
                await self._take_events()
        finally:
            self._close_identity_files()

    async def _take_events(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            while True:
                try:
                    received = receive_message(self._sock, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    received = None
                if received is None:
                    raise SpawnerGoneError("the spawner ended")
                event, descriptors = received
                self._dispatch(cast("tuple[object, ...]", event), descriptors)

    def _take_identity_files(self, descriptors: list[int]) -> None:
        self._identity_files = descriptors
        if descriptors:
            self._resolv = os.pread(descriptors[0], 1 << 16, 0)
        self._ready.set()

    def _dispatch(self, event: tuple[object, ...], descriptors: list[int]) -> None:
        if event[0] == "ready":
            self._take_identity_files(descriptors)
            return
        if event[0] == "mounted":
            answer = self._mounting.popleft()
            _, number, strerror, filename = cast("tuple[str, int, str, str]", event)
            answer.error = OSError(number, strerror, filename) if number else None
            answer.arrived.set()
            return
        if event[0] == "signalled":
            self._acknowledgements.popleft().set()
            return
        number = cast("int", event[1])
        # What comes after "failed" is about a process that never became one.
        child = self._children.get(number)
        if child is not None:
            for descriptor in descriptors:
                if child.abandoned:
                    os.close(descriptor)
                else:
                    child.descriptors.append(descriptor)
            child._on_event(event)  # pyright: ignore[reportPrivateUsage]
            if event[0] in ("failed", "empty"):
                del self._children[number]


def shell_status(returncode: int) -> int:
    """Return 128 + n for a process that signal n ended, else its exit status."""
    return 128 - returncode if returncode < 0 else returncode


def _rewrite(descriptor: int, text: bytes) -> None:
    os.pwrite(descriptor, text, 0)
    # Names are of one length, and cutting off nothing takes longer than writing.
    if os.lseek(descriptor, 0, os.SEEK_END) > len(text):
        os.ftruncate(descriptor, len(text))
