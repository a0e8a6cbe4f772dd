"""The doors of the library say how to come in, to who tries without Trio or without ``async with``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

import trio_sandbox
import trio_sandbox.qemu
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox


async def answer(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer()


DOORS: dict[str, Callable[[], AbstractAsyncContextManager[Any]]] = {
    "open_sandbox()": trio_sandbox.open_sandbox,
    "open_host()": trio_sandbox.open_host,
    "open_scripted_sandbox()": lambda: open_scripted_sandbox(answer),
    "open_qmp()": lambda: trio_sandbox.qemu.open_qmp("/nonexistent"),
    "open_runtime()": trio_sandbox.qemu.open_runtime,
}


async def enter(name: str) -> None:
    async with DOORS[name]():
        raise AssertionError("it must not open")


@pytest.mark.parametrize("name", DOORS)
def test_asyncio_is_told_the_way(name: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(enter(name))
    assert str(caught.value).startswith(f"{name} needs Trio, and asyncio runs here: ")
    assert "trio.run(main)" in str(caught.value)


@pytest.mark.parametrize("name", DOORS)
def test_no_loop_at_all_is_told_the_way(name: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        enter(name).send(None)
    assert str(caught.value).startswith(f"{name} needs Trio, and no Trio runs here: ")
    assert "trio.run(main)" in str(caught.value)


@pytest.mark.parametrize("name", DOORS)
def test_a_synchronous_block_is_told_the_way(name: str) -> None:
    door: Any = DOORS[name]()
    with pytest.raises(TypeError, match=r"opens a block: write `async with .*trio.run\(main\)"):
        with door:
            raise AssertionError("it must not open")


async def test_what_is_awaited_is_told_the_way() -> None:
    door: Any = trio_sandbox.open_sandbox()
    with pytest.raises(TypeError, match=r"write `async with open_sandbox\(\.\.\.\) as \.\.\.:`"):
        await door
    await trio.lowlevel.checkpoint()


async def test_a_sandbox_in_another_loop_is_told_the_way() -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        for request, what in (
            (lambda: sandbox.run("1"), "a run"),
            (lambda: sandbox.run_process(["true"]), "the process 'true'"),
            (lambda: sandbox.path("/x").read_bytes(), "read_bytes of '/x'"),
            (lambda: sandbox.wait_port(80), "the wait for port 80"),
        ):

            def in_asyncio() -> str:
                async def main() -> None:
                    await request()  # noqa: B023 - it is called before the next

                with pytest.raises(RuntimeError) as caught:
                    asyncio.run(main())
                return str(caught.value)

            said = await trio.to_thread.run_sync(in_asyncio)
            assert "asyncio runs here" in said
            assert said.startswith(f"{what} needs Trio"), said


def test_the_doors_keep_their_signatures() -> None:
    assert "image" in inspect.signature(trio_sandbox.open_sandbox).parameters
    assert trio_sandbox.open_sandbox.__doc__
    assert trio_sandbox.open_sandbox.__module__ == "trio_sandbox"
