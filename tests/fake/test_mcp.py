"""The Model Context Protocol server, asked by the SDK's own client; a real agent in this process runs the code."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from mcp import Client
from mcp.types import CallToolResult, ImageContent, TextContent

from tests.fake._sandbox import open_local_sandbox
from trio_sandbox import Display, Sandbox, VmDiedError
from trio_sandbox.integrations.mcp import check_loopback, open_server, serve_http
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

PNG = b"\x89PNG\r\n\x1a\nrest"


@asynccontextmanager
async def open_local() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


@asynccontextmanager
async def open_client() -> AsyncGenerator[Client]:
    async with open_server(open_local) as server, Client(server) as client:
        yield client


def said(result: CallToolResult) -> str:
    """Give the text of an answer."""
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


async def test_every_tool_says_what_it_does_and_what_its_arguments_are() -> None:
    async with open_client() as client:
        tools = (await client.list_tools()).tools
    assert {tool.name for tool in tools} == {
        *("run_code", "run_command", "read_file", "write_file", "edit_file", "list_files", "search_files"),
        *("checkpoint", "revert", "reset"),
    }
    for tool in tools:
        assert tool.description
        assert not re.search(r"\n {4}", tool.description)
        assert "ctx" not in tool.input_schema["properties"]


async def test_code_keeps_its_variables_and_answers_with_all_that_it_says() -> None:
    async with open_client() as client:
        result = await client.call_tool(
            "run_code", {"code": "import sys\nprint('out')\nprint('err', file=sys.stderr)\nx = 41"}
        )
        assert said(result) == "out\n\nstderr:\nerr\n"
        assert not result.is_error
        assert said(await client.call_tool("run_code", {"code": "x + 1"})) == "42"
        assert said(await client.call_tool("run_code", {"code": "pass"})) == "done; nothing was printed"
        result = await client.call_tool("run_code", {"code": "1 / 0"})
        assert result.is_error
        assert "ZeroDivisionError" in said(result)
        assert said(result).endswith("exit code 1")


async def test_commands_keep_their_directory(tmp_path: Path) -> None:
    async with open_client() as client:
        await client.call_tool("run_command", {"command": f"cd {tmp_path}; export NAME=value"})
        assert said(await client.call_tool("run_command", {"command": "pwd; echo $NAME"})) == f"{tmp_path}\nvalue\n"
        result = await client.call_tool("run_command", {"command": "pwd; exit 3", "directory": "/"})
        assert said(result).startswith("/\n\nexit code 3")
        assert result.is_error


async def test_what_is_printed_is_progress() -> None:
    told: list[tuple[float, str]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        await trio.lowlevel.checkpoint()
        told.append((progress, message or ""))

    async with open_client() as client:
        code = "import time\nprint('first', flush=True)\ntime.sleep(0.3)\nfor n in range(20_000): print(n)"
        result = await client.call_tool("run_code", {"code": code}, progress_callback=note)
    assert min(told)[1].startswith("first")  # the client may hand them out in any order
    assert len(told) < 1000  # many lines are few messages
    assert said(result).endswith("19999\n")


async def test_an_answer_is_bounded_and_says_what_is_left_out() -> None:
    async with open_client() as client:
        result = await client.call_tool("run_code", {"code": "print('x' * 10_000_000)\nprint('end')"})
    assert len(said(result)) < 60_000
    assert re.match(r"\[\d+ characters left out\]\n.*end\n$", said(result), re.DOTALL)


async def test_pictures_are_pictures_and_hostile_ones_are_not() -> None:
    displays = (
        Display("image/png", PNG, 0),
        Display("text/plain", b"<Figure>", 0),
        Display("image/png", b"<svg>", 1),
        Display("text/html", b"<b>table</b>", 2),
        Display("text/plain", b"table", 2),
    )

    async def answer(_: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(displays=displays)

    async with open_server(partial(open_scripted_sandbox, answer)) as server, Client(server) as client:
        content = (await client.call_tool("run_code", {"code": "plot()"})).content
    picture, table = content
    assert isinstance(picture, ImageContent)
    assert (picture.mime_type, base64.b64decode(picture.data)) == ("image/png", PNG)
    assert isinstance(table, TextContent)
    assert table.text == "table"


async def test_a_limit_in_seconds_stops_the_code_and_keeps_the_variables() -> None:
    async with open_client() as client:
        await client.call_tool("run_code", {"code": "x = 5"})
        result = await client.call_tool(
            "run_code", {"code": "print('so far', flush=True)\nwhile True: pass", "seconds": 0.5}
        )
        assert result.is_error
        assert "stopped after 0.5 seconds" in said(result)
        assert said(await client.call_tool("run_code", {"code": "x"})) == "5"
        refused = await client.call_tool("run_code", {"code": "1", "seconds": 1e9})
        assert refused.is_error
        assert "seconds" in said(refused)


async def test_a_cancelled_call_stops_the_code_in_the_guest() -> None:
    sandboxes: list[Sandbox] = []

    @asynccontextmanager
    async def open_noted() -> AsyncGenerator[Sandbox]:
        async with open_local() as sandbox:
            sandboxes.append(sandbox)
            yield sandbox

    async with open_server(open_noted) as server, Client(server) as client:
        with trio.CancelScope() as scope:

            async def cancel(progress: float, total: float | None, message: str | None) -> None:
                await trio.lowlevel.checkpoint()
                scope.cancel()

            code = "x = 5\nprint('begun', flush=True)\nwhile True: pass"
            await client.call_tool("run_code", {"code": code}, progress_callback=cancel)
        assert scope.cancelled_caught
        assert said(await client.call_tool("run_code", {"code": "x"})) == "5"
        (first, _) = sandboxes[0].recent_runs()
        assert (first.outcome, first.exit_code) == ("stopped", 130)


async def test_files(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "a.txt")
    async with open_client() as client:

        async def call(tool: str, **arguments: object) -> CallToolResult:
            return await client.call_tool(tool, {"path": path, **arguments})

        assert "wrote 14 characters" in said(await call("write_file", content="one\ntwo\nthree\n"))
        assert said(await call("read_file")) == "one\ntwo\nthree\n"
        assert said(await call("read_file", first_line=2, lines=1)) == "two\n[there is more, from line 3]"
        assert "replaced 1" in said(await call("edit_file", old="two", new="2"))
        for old, why in (("none", "it is not there"), ("e", "it is there 3 times")):
            result = await call("edit_file", old=old, new="x")
            assert result.is_error
            assert why in said(result)
        assert "replaced 3" in said(await call("edit_file", old="e", new="E", everywhere=True))
        assert said(await call("read_file")) == "onE\n2\nthrEE\n"
        (tmp_path / "new" / "p.png").write_bytes(PNG)
        (image,) = (await client.call_tool("read_file", {"path": str(tmp_path / "new" / "p.png")})).content
        assert isinstance(image, ImageContent)
        listed = said(await client.call_tool("list_files", {"path": str(tmp_path), "pattern": "**/*"}))
        assert [line.split()[-1] for line in listed.splitlines()] == [
            str(tmp_path / "new"),
            path,
            f"{tmp_path}/new/p.png",
        ]
        found = await client.call_tool("search_files", {"path": str(tmp_path), "expression": "^thr+", "names": "*.txt"})
        assert said(found) == f"{path}:3:thrEE\n"
        none = await client.call_tool("search_files", {"path": str(tmp_path), "expression": "nothing of that"})
        assert (said(none), none.is_error) == ("[nothing was found]", False)
        for tool, arguments in (
            ("read_file", {"path": "/none"}),
            ("search_files", {"path": "/none", "expression": "x"}),
            ("search_files", {"path": "/", "expression": "("}),
            ("read_file", {"path": "/"}),
        ):
            assert (await client.call_tool(tool, arguments)).is_error


async def test_a_new_sandbox_after_a_reset_and_after_its_machine_died() -> None:
    async with open_client() as client:
        await client.call_tool("run_code", {"code": "x = 1"})
        assert "the next call gets a new one" in said(await client.call_tool("reset", {}))
        assert "NameError" in said(await client.call_tool("run_code", {"code": "x"}))

    async def answer(call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        if call.code == "die":
            raise VmDiedError("gone")
        return Answer(stdout="alive")

    async with open_server(partial(open_scripted_sandbox, answer)) as server, Client(server) as client:
        assert (await client.call_tool("run_code", {"code": "die"})).is_error
        assert said(await client.call_tool("run_code", {"code": "1"})) == (
            "alive\nnote: this is a new sandbox; the virtual machine of the earlier one has ended"
        )
        assert said(await client.call_tool("run_code", {"code": "1"})) == "alive"


async def test_a_sandbox_that_can_not_be_opened_is_an_error_of_the_call() -> None:
    @asynccontextmanager
    async def fail() -> AsyncGenerator[Sandbox]:
        await trio.lowlevel.checkpoint()
        raise OSError("no room")
        yield  # pragma: no cover - it makes a generator of it

    async with open_server(fail) as server, Client(server) as client:
        for _ in range(2):
            result = await client.call_tool("run_code", {"code": "1"})
            assert (result.is_error, said(result)) == (True, "OSError: no room")


async def scripted(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer(stdout=call.code)


async def test_a_sandbox_that_nobody_uses_is_closed_and_the_next_call_says_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_server(partial(open_scripted_sandbox, scripted), idle=60) as server, Client(server) as client:
        assert said(await client.call_tool("run_code", {"code": "a"})) == "a"
        await trio.sleep(59)
        assert said(await client.call_tool("run_code", {"code": "b"})) == "b"
        await trio.sleep(61)
        assert "note: this is a new sandbox; nobody used the earlier one for 60 seconds" in said(
            await client.call_tool("run_code", {"code": "c"})
        )
        assert said(await client.call_tool("run_code", {"code": "d"})) == "d"


#: The SDK's client for HTTP leaves asynchronous generators to the garbage collector.
leaves_generators = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")


@leaves_generators
async def test_sandboxes_are_bounded_and_who_lost_one_is_told() -> None:
    busy, done = trio.Event(), trio.Event()

    async def answer(call: Call) -> Answer:
        await trio.lowlevel.checkpoint()
        if call.code == "wait":
            busy.set()
            await done.wait()
        return Answer(stdout=call.code)

    async with (
        open_server(partial(open_scripted_sandbox, answer), limit=1) as server,
        trio.open_nursery() as nursery,
    ):
        (url,) = await nursery.start(partial(serve_http, server, "127.0.0.1", 0))
        async with Client(f"{url}/mcp", mode="legacy") as one, Client(f"{url}/mcp", mode="legacy") as two:
            nursery.start_soon(one.call_tool, "run_code", {"code": "wait"})  # noqa: ASYNC111 - it is waited for
            await busy.wait()
            assert "CapacityError: there are 1 sandboxes" in said(await two.call_tool("run_code", {"code": "x"}))
            done.set()
            assert said(await one.call_tool("run_code", {"code": "x"})) == "x"
            assert said(await two.call_tool("run_code", {"code": "x"})) == "x"
            assert said(await one.call_tool("run_code", {"code": "x"})) == (
                "x\nnote: this is a new sandbox; others needed the place of the earlier one"
            )
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_others_are_not_listened_to(host: str) -> None:
    with pytest.raises(ValueError, match="asks nobody who they are"):
        check_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.1.2.3", "localhost"])
def test_addresses_of_this_machines_own(host: str) -> None:
    check_loopback(host)


@leaves_generators
async def test_http_has_a_sandbox_for_each_session() -> None:
    async with open_server(open_local) as server, trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve_http, server, "127.0.0.1", 0))
        async with Client(f"{url}/mcp", mode="legacy") as one, Client(f"{url}/mcp", mode="legacy") as two:
            await one.call_tool("run_code", {"code": "x = 1"})
            await two.call_tool("run_code", {"code": "x = 2"})
            assert said(await one.call_tool("run_code", {"code": "x"})) == "1"
            assert said(await two.call_tool("run_code", {"code": "x"})) == "2"
        nursery.cancel_scope.cancel()


@leaves_generators
async def test_http_without_sessions_has_sandboxes_by_name() -> None:
    async with open_server(open_local) as server, trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve_http, server, "127.0.0.1", 0))
        async with Client(f"{url}/mcp") as client:
            first = said(await client.call_tool("run_code", {"code": "x = 1"}))
            name = re.search(r"^sandbox: (\S+)$", first, re.MULTILINE)
            assert name is not None
            again = await client.call_tool("run_code", {"code": "x", "sandbox": name[1]})
            assert said(again).startswith("1\n")
            assert "NameError" in said(await client.call_tool("run_code", {"code": "x"}))
            unknown = await client.call_tool("run_code", {"code": "x", "sandbox": "guessed"})
            assert unknown.is_error
            assert "no sandbox of that name" in said(unknown)
        nursery.cancel_scope.cancel()
