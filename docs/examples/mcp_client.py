"""An MCP client: it starts ``trio-sandbox mcp``, and calls its tools as a model's program would."""

from __future__ import annotations

import sys

import trio
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult, TextContent

#: How a client starts the server; a configuration file says the same.
SERVER = StdioServerParameters(command=sys.executable, args=["-m", "trio_sandbox", "mcp", "--quiet"])


def text_of(result: CallToolResult) -> str:
    """Return what the model is told in words."""
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


async def main() -> None:
    """Run code, change the state, and go back."""
    async with Client(SERVER) as client:
        tools = await client.list_tools()
        print("run_code" in [tool.name for tool in tools.tools])
        print(text_of(await client.call_tool("run_code", {"code": "words = ['kept']; len(words)"})))
        print(text_of(await client.call_tool("checkpoint", {})))
        await client.call_tool("run_code", {"code": "words.clear()"})
        print(text_of(await client.call_tool("revert", {"checkpoint": "1"})))
        print(text_of(await client.call_tool("run_code", {"code": "words"})))


if __name__ == "__main__":
    trio.run(main)
