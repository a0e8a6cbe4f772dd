"""Service "network": whether the guest's programs reach anything outside.

    {"service": "network", "on": bool, "certificates": bool}    with true, certificates as PEM follow, and the end
                                                                answered by an errno in two bytes, big-endian, and the end

A host's hello says it as well, before the users' processes go on, there with the certificates as text. "on" again makes the agent
forget what it knows of names: the host has other rules. Certificates are those that programs are to trust besides their image's.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import trio

from ....wire import Channel, ChannelStream
from ..children import Children
from .egress import Egress
from .names import RESOLVER, Names

if TYPE_CHECKING:
    from .steering import Steering


@final
class NetworkService:
    """Switches the network on and off, and serves it during each conversation.

    Args:
      children: Whose programs find our resolver.

    """

    def __init__(self, children: Children) -> None:
        self._children = children
        self._names = Names()
        self._kernel: Steering | None = None
        self._on = False
        self._certificates = b""
        self._changed = trio.Event()

    def prepare(self) -> None:
        """Do now what switching it on for the first time takes most of its time for, if it can be done here at all.

        For a machine that is about to be saved: those that go on from there have it. Without a network it costs them nothing.
        """
        with contextlib.suppress(OSError):
            self._steering()

    async def adopt(self, hello: Mapping[str, object]) -> None:
        """Have the network on, or off, as a host's *hello* says; a host that wants one finds out by the service whether there is."""
        certificates = hello.get("certificates")
        try:
            await self._trust(certificates.encode() if isinstance(certificates, str) else b"")
            await self._switch(on=hello.get("network") is True)
        except OSError as exc:
            print(f"the network can't be switched on: {exc}")

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        number = 0
        certificates = await _receive_all(stream) if header.get("certificates") is True else b""
        try:
            await self._trust(certificates)
            await self._switch(on=header.get("on") is True)
        except OSError as exc:
            number = exc.errno or errno.EIO
        await stream.send_all(struct.pack(">H", number), end=True)

    async def _trust(self, certificates: bytes) -> None:
        if certificates != self._certificates:
            await self._children.set_certificates(certificates)
            self._certificates = certificates

    async def _switch(self, *, on: bool) -> None:
        if on != self._on:
            self._steering().switch(on=on)
            self._on = on
            await self._children.set_resolver(str(RESOLVER) if on else None)
        self._changed.set()
        self._changed = trio.Event()

    def _steering(self) -> Steering:
        if self._kernel is None:
            # Only those that want one pay for it.
            from .steering import Steering

            self._kernel = Steering()
        return self._kernel

    async def run(self, channel: Channel) -> None:
        """Serve the programs over *channel* until cancelled; then all connections are broken off."""
        while True:
            if self._on:
                assert self._kernel is not None
                egress = Egress(self._kernel, channel, self._names)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(egress.run)
                    while self._on:
                        await self._changed.wait()
                        egress.forget()
                    nursery.cancel_scope.cancel(reason="the network was switched off")
            else:
                await self._changed.wait()


async def _receive_all(stream: ChannelStream) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some():
        data += piece
    return bytes(data)
