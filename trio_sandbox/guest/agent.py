"""The agent: serves a host over a guest channel. Under process 1 of a virtual machine, or in tests in any process."""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from ..wire import ChannelStream, Role, open_channel
from . import tunnels
from .children import Children
from .code import CodeService
from .files import FileService
from .languages import LANGUAGES, StartedInterpreter
from .pipes import ParkedPipes
from .processes import ProcessService

#: The library's version. The host sends its agent along, so that both are always of one version.
AGENT_VERSION: Final = "0.1.0"


def _hello() -> dict[str, object]:
    return {
        "agent": AGENT_VERSION,
        "features": ["process", "pipe", "file", "tcp", *(f"code.{name}" for name in LANGUAGES)],
        "python": platform.python_version(),
        "kernel": os.uname().release,
    }


async def serve(
    stream: trio.abc.Stream,
    children: Children,
    *,
    prestarted: StartedInterpreter | None = None,
    on_hello: Callable[[Mapping[str, object]], None] | None = None,
) -> None:
    """Serve the host at the other end of *stream* until it is gone; then everything that it started is killed.

    Args:
      stream: The connection, closed in any case.
      children: The spawner's side of things, owned from now on.
      prestarted: An interpreter that *children* adopted.
      on_hello: Called with what the host introduces itself with, before any request is served.

    Raises:
      SpawnerGoneError: if the spawner ended first.
      wire.ChannelError: if no host says hello as one should.

    """
    pipes = ParkedPipes()
    code = CodeService(children, pipes)
    services: dict[object, Callable[[ChannelStream, dict[str, object]], Awaitable[None]]] = {
        "pipe": pipes.serve,
        "process": ProcessService(children, pipes).serve,
        "code": code.serve,
        "file": FileService(children).serve,
        "tcp": tunnels.serve,
    }
    greeted = trio.Event()

    async def handle(stream: ChannelStream, header: dict[str, object]) -> None:
        if not greeted.is_set():  # even a wait for what has happened is a turn of the scheduler
            await greeted.wait()
        service = services.get(str(header.get("service")))
        if service is None:
            stream.reset(f"no such service: {header.get('service')!r:.80}")
        else:
            await service(stream, header)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(children.serve)
        await nursery.start(code.run, prestarted)
        async with open_channel(stream, role=Role.GUEST, hello=_hello(), handler=handle) as channel:
            if on_hello is not None:
                on_hello(channel.peer_hello)
            greeted.set()
            await channel.wait_closed()
        nursery.cancel_scope.cancel(reason="the host is gone")
