"""Has httpcore, and so httpx, connect to servers in a sandbox."""

from __future__ import annotations

import httpcore
import trio

from trio_sandbox import Sandbox


class SandboxBackend(httpcore.AsyncNetworkBackend):
    """Whatever the host's name is, the server is the sandbox's own."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def connect_tcp(self, host: str, port: int, *args: object, **kwargs: object) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._sandbox.open_tcp_stream(port))


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, *args: object, **kwargs: object) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, buffer: bytes, *args: object, **kwargs: object) -> None:
        await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> object:
        return None
