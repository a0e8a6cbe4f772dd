"""A Model Context Protocol server whose tools work in sandboxes: ``trio-sandbox mcp``. Needs the extra ``mcp``."""

from __future__ import annotations

from ._server import (
    check_loopback as check_loopback,
    open_server as open_server,
    serve_http as serve_http,
    serve_stdio as serve_stdio,
)
