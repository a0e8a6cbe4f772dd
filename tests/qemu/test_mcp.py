"""The command ``trio-sandbox mcp`` as a client starts it, with a real machine behind it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult, ImageContent, TextContent

pytestmark = pytest.mark.qemu

COMMAND = [sys.executable, "-m", "trio_sandbox", "mcp", "--quiet"]

#: A picture without any library.
PICTURE = """
class Picture:
    def _repr_png_(self):
        return b"\\x89PNG\\r\\n\\x1a\\n" + b"rest"
Picture()
"""


def said(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


async def test_a_client_starts_the_server_and_works_in_a_machine() -> None:
    async with Client(StdioServerParameters(command=COMMAND[0], args=COMMAND[1:])) as client:
        assert said(await client.call_tool("run_code", {"code": "x = 41"})) == "done; nothing was printed"
        assert said(await client.call_tool("checkpoint", {})) == "checkpoint 1"
        await client.call_tool("write_file", {"path": "a.txt", "content": "new"})
        assert said(await client.call_tool("run_code", {"code": "x += 1; x"})) == "42"
        assert said(await client.call_tool("revert", {"checkpoint": "1"})) == "reverted to checkpoint 1"
        assert said(await client.call_tool("run_code", {"code": "x"})) == "41"
        assert (await client.call_tool("read_file", {"path": "a.txt"})).is_error
        unknown = await client.call_tool("revert", {"checkpoint": "2"})
        assert unknown.is_error
        assert said(unknown) == "there is no checkpoint '2'; there are: 1"
        (picture,) = [
            block
            for block in (await client.call_tool("run_code", {"code": PICTURE})).content
            if isinstance(block, ImageContent)
        ]
        assert picture.mime_type == "image/png"
        assert said(await client.call_tool("run_command", {"command": "uname -s"})) == "Linux\n"


def test_a_signal_ends_the_server_while_it_waits_for_input() -> None:
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        initialize = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "clientInfo": {"name": "test", "version": "1"},
            },
        }
        server.stdin.write(json.dumps(initialize) + "\n")
        server.stdin.flush()
        assert json.loads(server.stdout.readline())["result"]["serverInfo"]["name"] == "trio-sandbox"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 128 + signal.SIGTERM
