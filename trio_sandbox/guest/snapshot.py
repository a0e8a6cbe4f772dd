"""Service "snapshot": the guest gets ready for having its state saved, and for waking up as another machine.

    {"service": "snapshot", "marker": hex}      answered by "frozen" and the end

The marker is some bytes that nobody else knows. With the answer the conversation is over. The agent goes on
when it reads the marker on its port: that is the host of a machine that was made from the saved state. It
sends the marker back, and a new conversation starts with a hello, in which it learns who it is now. Until
then no process of the users' runs. What was left of the old conversation both sides drop, up to the marker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import final

import trio

from ..wire import ChannelStream, PortStream

_SHORTEST_MARKER = 16
#: Seconds for the kernel to stop the users' processes, and between two looks whether it has.
_FREEZE_PATIENCE, _LOOK = 5.0, 0.002

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
        self._frozen = False

    def open_port(self) -> PortStream:
        """Return a stream over the port, whose closing leaves the port open."""
        return PortStream(os.dup(self._port))

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

    async def freeze(self, idle: int) -> None:
        """Hold the users' processes up, and bring all that was written to the disk.

        Where there are no more than the *idle* threads that wait for us, nobody needs to be held up, and
        nobody costs a machine that goes on from here the time for waking him.

        Raises:
          TimeoutError: if they do not stop.

        """
        if self._count_threads() > idle:
            self._set_frozen(True)
            self._frozen = True
            deadline = time.monotonic() + _FREEZE_PATIENCE
            while not self._is_frozen():
                if time.monotonic() > deadline:
                    self.thaw()
                    raise TimeoutError("the users' processes did not stop")
                await trio.sleep(_LOOK)
        os.sync()

    def thaw(self) -> None:
        """Let the users' processes go on."""
        if self._frozen:
            self._set_frozen(False)
            self._frozen = False

    def _count_threads(self) -> int:
        if self._cgroup is None:
            return 0
        count = 0
        for directory, _, _ in os.walk(self._cgroup):
            with open(f"{directory}/cgroup.threads", "rb") as file:
                count += len(file.readlines())
        return count

    def _set_frozen(self, frozen: bool) -> None:
        with open(f"{self._cgroup}/cgroup.freeze", "wb", buffering=0) as file:
            file.write(b"1" if frozen else b"0")

    def _is_frozen(self) -> bool:
        with open(f"{self._cgroup}/cgroup.events", "rb", buffering=0) as file:
            return b"frozen 1" in file.read()


@final
class SnapshotService:
    """Ends the conversation of a `Machine` when the host wants its state.

    Args:
      machine: Which one; None: none that could be saved.
      count_idle: Tells how many of the users' threads wait for us.

    """

    def __init__(self, machine: Machine | None, count_idle: Callable[[], int]) -> None:
        self._machine = machine
        self._count_idle = count_idle
        self.frozen: trio.Event = trio.Event()
        """The host was told that it may save the state now."""
        self.marker: bytes = b""
        """What to wait for, from then on."""

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        try:
            marker = bytes.fromhex(str(header.get("marker")))
        except ValueError:
            marker = b""
        if len(marker) < _SHORTEST_MARKER:
            stream.reset(f"a marker is at least {_SHORTEST_MARKER} bytes in hexadecimal digits")
        elif self._machine is None:
            stream.reset("there is no machine here whose state could be saved")
        elif self.marker:
            stream.reset("a snapshot is under way")
        else:
            self.marker = marker
            try:
                await self._machine.freeze(self._count_idle())
            except TimeoutError as exc:
                self.marker = b""
                stream.reset(str(exc))
                return
            await stream.send_all(FROZEN, end=True)
            self.frozen.set()
