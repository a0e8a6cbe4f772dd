"""The server, and its two ways of being talked to: standard input and output, and HTTP."""

from __future__ import annotations

import inspect
import ipaddress
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, cast, final

import anyio
import trio
from hypercorn.config import Config
from hypercorn.trio import serve  # pyright: ignore[reportUnknownVariableType] - its type has parts without one
from mcp.server import MCPServer
from mcp.server.stdio import stdio_server

from ... import Sandbox
from ..._metadata import version
from ...sessions import SessionsConfig, open_sessions_with
from ._tools import Tools

#: Seconds after which a sandbox that nobody uses is closed.
IDLE: Final = 900.0
#: Sandboxes at a time.
SESSIONS: Final = 16
_CHUNK: Final = 2**16

_INSTRUCTIONS: Final = (
    "Tools that work in a sandbox: a throw-away virtual machine of this session's own, in which code can't hurt anything. "
    "Variables, files and processes persist between calls. Save a checkpoint before something risky."
)


@asynccontextmanager
async def open_server(
    open_sandbox: Callable[[], AbstractAsyncContextManager[Sandbox]], *, idle: float = IDLE, limit: int = SESSIONS
) -> AsyncGenerator[MCPServer]:
    """Yield a server whose tools work in sandboxes, one for each session. When the block exits, they are closed.

        async with open_host() as host, open_server(partial(host.open_sandbox, "python")) as server:
            await server.run_stdio_async()

    Trio has to run it. A sandbox is opened by the first call that needs it.

    Args:
      open_sandbox: Opens a sandbox.
      idle: Seconds after which a sandbox that nobody uses is closed.
      limit: How many may be open at a time. For one more, that which was not used for longest is closed; if all are in use, the call fails.

    """
    limits = SessionsConfig(sleep_after=None, close_after=idle, max_sessions=limit, when_full="refuse")
    async with open_sessions_with(lambda _key: open_sandbox(), limits) as sessions:
        server: MCPServer = MCPServer(
            "trio-sandbox", version=version(), instructions=_INSTRUCTIONS, log_level="WARNING"
        )
        for tool in Tools(sessions).all():
            server.add_tool(tool, description=inspect.getdoc(tool), structured_output=False)
        yield server


async def serve_stdio(server: MCPServer) -> None:
    """Serve the client at the other end of our standard input and output, until it hangs up. Can be cancelled at any time."""
    lines = cast("anyio.AsyncFile[str]", _StandardInput())
    async with stdio_server(stdin=lines) as (read, write):
        inner = server._lowlevel_server  # pyright: ignore[reportPrivateUsage] - `run_stdio_async` could not be cancelled
        await inner.run(read, write, inner.create_initialization_options())


@final
class _StandardInput:
    """The lines of our standard input."""

    def __init__(self) -> None:
        self._unfinished = b""
        self._lines: deque[bytes] = deque()

    def __aiter__(self) -> _StandardInput:
        return self

    async def __anext__(self) -> str:
        while not self._lines:
            # In a thread, for a file can't be waited for; one that a cancelled server leaves behind does not hold up the end.
            data = await trio.to_thread.run_sync(os.read, 0, _CHUNK, abandon_on_cancel=True)
            if not data:
                raise StopAsyncIteration
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            self._lines += lines
        return self._lines.popleft().decode("utf-8", "replace")  # noqa: ASYNC910 - several lines may come at once


async def serve_http(
    server: MCPServer, host: str, port: int, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve clients by HTTP at ``/mcp``, until cancelled.

    There is no authentication, so the address must be one of this machine's own. Put a proxy that asks who is there in front
    of it for others.

    Args:
      server: From `open_server`.
      host: An address, such as 127.0.0.1.
      port: A port; 0 for one that is free.
      task_status: Gets the URLs that it listens at.

    Raises:
      ValueError: if *host* is no address of this machine's own.
      OSError: if it can't be listened at.

    """
    check_loopback(host)
    config = Config()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.accesslog = None
    config.loglevel = "WARNING"
    app = server.streamable_http_app(host=host)
    await serve(app, config, task_status=task_status)  # type: ignore[arg-type]


def check_loopback(host: str) -> None:
    """Refuse an address that others could reach."""
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    if not own:
        raise ValueError(
            f"{host!r} is no address of this machine's own, and this server asks nobody who they are: listen at 127.0.0.1, and "
            "let a proxy with authentication talk to it"
        )
