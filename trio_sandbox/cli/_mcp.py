"""``trio-sandbox mcp``: a Model Context Protocol server whose tools work in sandboxes."""

from __future__ import annotations

import argparse
from functools import partial

import attrs
import trio

from .._config import HostConfig, SandboxConfig
from ..host import open_host
from . import _status
from ._configs import host_config, sandbox_config
from ._progress import open_progress
from ._report import complain
from ._signals import end_on_signal


@attrs.frozen(kw_only=True)
class McpRequest:
    """What the command line asked for."""

    address: tuple[str, int] | None
    """Where to serve HTTP; None: standard input and output."""
    idle: float
    sandboxes: int
    image: str
    host: HostConfig
    sandbox: SandboxConfig
    quiet: bool


def mcp(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    try:
        from ..integrations import mcp as server
    except ModuleNotFoundError as exc:
        complain(f"the server needs the extra `mcp` ({exc}): pip install 'trio-sandbox[mcp]'")
        return _status.SANDBOX_FAILURE
    try:
        if options.http is not None:
            server.check_loopback(options.http[0])
        request = McpRequest(
            address=options.http,
            idle=options.idle,
            sandboxes=options.sandboxes,
            image=options.image,
            host=host_config(options),
            sandbox=sandbox_config(options),
            quiet=options.quiet,
        )
    except ValueError as exc:
        complain(str(exc))
        return _status.USAGE
    return trio.run(end_on_signal, partial(serve, request))


async def serve(request: McpRequest) -> int:
    """Serve until the client hangs up; HTTP until a signal comes. Return the exit status."""
    from ..integrations import mcp as server

    # Standard output is the client's; all that we say goes to standard error.
    with open_progress(quiet=request.quiet) as show:
        async with (
            open_host(attrs.evolve(request.host, progress=show)) as host,
            server.open_server(
                partial(host.open_sandbox, request.image, request.sandbox), idle=request.idle, limit=request.sandboxes
            ) as running,
        ):
            if request.address is None:
                await server.serve_stdio(running)
                return 0
            async with trio.open_nursery() as nursery:
                (url,) = await nursery.start(partial(server.serve_http, running, *request.address))
                if not request.quiet:
                    complain(f"serving {url}/mcp; Ctrl-C ends it")
    return 0
