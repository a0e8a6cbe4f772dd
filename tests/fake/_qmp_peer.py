"""A scripted QMP server at the other end of a socket pair."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio

from trio_sandbox import Timeouts
from trio_sandbox.qemu import QMPChannel, open_qmp

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}, "capabilities": ["oob"]}
}


class Peer:
    """The server's side. It does nothing by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._buffer = b""

    async def send(self, *messages: dict[str, Any]) -> None:
        await self.send_raw(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    async def send_raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def event(self, name: str, **data: object) -> None:
        await self.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    async def receive(self) -> dict[str, Any] | None:
        """Give the next command; None at the end."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    async def expect(self, command: str) -> dict[str, Any]:
        message = await self.receive()
        assert message is not None
        assert message["execute"] == command
        return message

    async def reply(self, message: dict[str, Any], value: object = None) -> None:
        await self.send({"return": {} if value is None else value, "id": message["id"]})

    async def refuse(self, message: dict[str, Any], error_class: str, desc: str) -> None:
        await self.send({"error": {"class": error_class, "desc": desc}, "id": message["id"]})

    async def negotiate(self) -> None:
        await self.send(GREETING)
        await self.reply(await self.expect("qmp_capabilities"))

    def close(self) -> None:
        self.stream.socket.close()


def socket_pair() -> tuple[socket.socket, Peer]:
    ours, theirs = socket.socketpair()
    return ours, Peer(theirs)


@asynccontextmanager
async def open_pair(timeouts: Timeouts | None = None) -> AsyncGenerator[tuple[QMPChannel, Peer]]:
    """Open a channel that has been negotiated, and its peer."""
    sock, peer = socket_pair()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.negotiate)
            async with open_qmp(sock, timeouts=timeouts) as channel:
                yield channel, peer
    finally:
        peer.close()
