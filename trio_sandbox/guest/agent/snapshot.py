"""Service "snapshot": the guest holds still while its state is saved, and finds out in which machine it goes on.

    {"service": "snapshot", "marker": hex}                  answered by "frozen" and the end
    {"service": "snapshot", "marker": hex, "token": hex}    answered by "frozen", and by the end in the machine itself

Marker and token are some bytes that nobody else knows. With the answer the users' processes stand still. Whoever
goes on from the saved state sends the marker, as it is. The agent sends it back, and a new conversation starts with
a hello, in which it learns who it is now; until then no process of the users' runs. What was left of the old
conversation both sides drop, up to the marker.

Without a token the conversation is over with the answer: the machine was only there to be saved. With one, it goes
on, and its host has to send the token on the stream, as data, whatever became of the saving. Until one of the two
has come the agent does nothing but read its port, so that it is in the same place in both machines. What it read
belongs to the conversation if that goes on: nothing of it is lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import final

import trio

from ...wire import ChannelStream, PortStream

_SHORTEST_MARKER = 16
#: Seconds for the kernel to stop the users' processes, and between two looks whether it has.
_FREEZE_PATIENCE, _LOOK = 5.0, 0.002
#: Seconds that what the host is through with may take to end before it counts as something that goes on.
_END_PATIENCE = 1.0

FROZEN = b"frozen"


@final
class Machine:
    """What there is of a guest that outlives a conversation: its port and its users' processes.

    Args:
      port: The agent's port to the host; stays open.
      cgroup: The control group of users' processes; None: there is none, and they are not held up.

    """

    def __init__(self, port: int, cgroup: str | None) -> None:
        self._port = port
        self._cgroup = cgroup
        self._freezer = -1
        """While the users' processes are held up, what lets them go on: a machine that goes on from here need not open it."""
        self._stream: PortStream | None = None
        self._unheard = b""

    def open_port(self) -> PortStream:
        """Return a stream over the port, for the next conversation, whose closing leaves the port open."""
        self._stream = PortStream(os.dup(self._port))
        self._stream.unread(self._unheard)
        self._unheard = b""
        return self._stream

    async def wait_for_host(self, marker: bytes) -> PortStream:
        """Wait until a host sends *marker*, answer it, and return the stream for the conversation with it."""
        stream = self.open_port()
        try:
            await stream.skip_past(marker)
            await stream.send_all(marker)
        except BaseException:
            stream.close()
            raise
        return stream

    def hold_still(self, marker: bytes, token: bytes) -> bytes | None:
        """Do nothing until *marker* or *token* comes; return what came with the token, or None with the marker."""
        assert self._stream is not None
        data = self._stream.block_until(marker, token)
        if marker not in data:
            return data
        self._unheard = data
        return None

    async def freeze(self) -> None:
        """Hold the users' processes up.

        Raises:
          TimeoutError: if they do not stop.

        """
        if self._cgroup is None:
            return
        if self._freezer < 0:
            self._freezer = os.open(f"{self._cgroup}/cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
        os.write(self._freezer, b"1")
        deadline = time.monotonic() + _FREEZE_PATIENCE
        while not self._is_frozen():
            if time.monotonic() > deadline:
                self.thaw()
                raise TimeoutError("the users' processes did not stop")
            await trio.sleep(_LOOK)

    def thaw(self) -> None:
        """Let the users' processes go on."""
        if self._freezer >= 0:
            os.write(self._freezer, b"0")
            os.close(self._freezer)
            self._freezer = -1

    def count_threads(self) -> int:
        """Tell how many threads the users have."""
        return self._count("cgroup.threads")

    def count_processes(self) -> int:
        """Tell how many processes the users have."""
        return self._count("cgroup.procs")

    def _count(self, name: str) -> int:
        if self._cgroup is None:
            return 0
        count = 0
        for directory, _, _ in os.walk(self._cgroup):
            with open(f"{directory}/{name}", "rb") as file:
                count += len(file.readlines())
        return count

    def _is_frozen(self) -> bool:
        with open(f"{self._cgroup}/cgroup.events", "rb", buffering=0) as file:
            return b"frozen 1" in file.read()


@final
class IdleService:
    """Service "idle": whether nothing that the users have started goes on, answered by "idle" or "busy" and the end.

    What waits for a request of the host is idle: an interpreter, a file helper. A thread in Python's interpreter is not;
    those of other interpreters come and go by themselves, and don't count. What the host is through with may still be
    ending, and is waited for: a process that was killed, a file helper that has yet to see that its session is over.

    Args:
      machine: Where; None: nobody can tell, and it counts as idle.
      count_children: Tells how many processes there are that the host had started, those that are ending included.
      count_idle: Tells how many processes wait for requests of the host: interpreters, and file helpers.
      has_only_python: Whether there is none but Python's.

    """

    def __init__(
        self,
        machine: Machine | None,
        count_children: Callable[[], int],
        count_idle: Callable[[], int],
        has_only_python: Callable[[], bool],
    ) -> None:
        self._machine = machine
        self._count_children = count_children
        self._count_idle = count_idle
        self._has_only_python = has_only_python

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        deadline = trio.current_time() + _END_PATIENCE
        while self._count_children() > self._count_idle():
            if trio.current_time() > deadline:
                break
            await trio.sleep(_LOOK)
        await stream.send_all(b"busy" if self._is_busy() else b"idle", end=True)

    def _is_busy(self) -> bool:
        if self._machine is None:
            return False
        idle = self._count_idle()
        if self._machine.count_processes() > idle:
            return True
        return self._has_only_python() and self._machine.count_threads() > idle


@final
class SnapshotService:
    """Gets a `Machine` ready for having its state saved, once.

    Args:
      machine: Which one; None: none that could be saved.
      count_idle: Tells how many of the users' threads wait for us.
      abandon: Called when the conversation is over, before anybody else notices.
      prepare: Called in a machine that is there to be saved, for what all that go on from it are to have.

    """

    def __init__(
        self,
        machine: Machine | None,
        count_idle: Callable[[], int],
        abandon: Callable[[], object],
        prepare: Callable[[], object],
    ) -> None:
        self._machine = machine
        self._count_idle = count_idle
        self._abandon = abandon
        self._prepare = prepare
        self._turn = trio.Lock()
        self.over: trio.Event = trio.Event()
        """The conversation is: whoever comes now is the host of a machine that goes on from the saved state."""
        self.marker: bytes = b""
        """What to wait for, from then on."""

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        try:
            marker = bytes.fromhex(str(header.get("marker")))
            token = None if header.get("token") is None else bytes.fromhex(str(header["token"]))
        except ValueError:
            marker, token = b"", None
        if min(len(marker), len(marker if token is None else token)) < _SHORTEST_MARKER:
            stream.reset(f"markers and tokens are at least {_SHORTEST_MARKER} bytes in hexadecimal digits")
        elif self._machine is None:
            stream.reset("there is no machine here whose state could be saved")
        else:
            # One that the host has given up may still be writing to the disk.
            async with self._turn:
                await self._serve_in_turn(self._machine, stream, marker, token)

    async def _serve_in_turn(self, machine: Machine, stream: ChannelStream, marker: bytes, token: bytes | None) -> None:
        if self.over.is_set():
            stream.reset("the machine was saved, and goes on elsewhere")
            return
        try:
            if token is None:
                await self._end(machine, stream, marker)
            else:
                await self._hold_still(machine, stream, marker, token)
        except TimeoutError as exc:
            stream.reset(str(exc))

    def _conclude(self, marker: bytes) -> None:
        # At once: what comes next, be it the marker once more, is the end of the channel, and of all runs with it.
        self._abandon()
        self.marker = marker
        self.over.set()

    async def _end(self, machine: Machine, stream: ChannelStream, marker: bytes) -> None:
        # Where there are only threads that wait for us nobody needs to be held up, and nobody
        # costs each machine that goes on from here the time for waking him.
        if machine.count_threads() > self._count_idle():
            await machine.freeze()
        self._prepare()
        os.sync()
        try:
            await stream.send_all(FROZEN, end=True)
            self._conclude(marker)
        finally:
            if not self.over.is_set():  # the host has thought better of it
                machine.thaw()

    async def _hold_still(self, machine: Machine, stream: ChannelStream, marker: bytes, token: bytes) -> None:
        # What the disk does not have the memory has. This is for not every machine to write it once more.
        await trio.to_thread.run_sync(os.sync, abandon_on_cancel=True)
        await machine.freeze()
        try:
            await stream.channel.wait_written()
            data: bytes | None = b""
            if not stream.has_news:  # otherwise the host has thought better of it
                # Once the host has read this, no other task runs: what it says next may be for another conversation.
                stream.send_blocking(FROZEN)
                data = machine.hold_still(marker, token)
            if data is None:
                self._conclude(marker)
                await trio.sleep_forever()
            else:
                stream.channel.feed(data)
        finally:
            if not self.over.is_set():
                machine.thaw()
