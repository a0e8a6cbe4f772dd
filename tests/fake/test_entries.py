"""The doors of the library say how to come in, to who tries without Trio or without ``async with``."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

import trio_sandbox
import trio_sandbox.aio
import trio_sandbox.blocking
import trio_sandbox.qemu
from trio_sandbox import GuestProcess, Sandbox, SandboxConfig
from trio_sandbox._entries import OPENED_BY_DOORS
from trio_sandbox.fleet import open_ray_host
from trio_sandbox.sessions import Sessions
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

from ._host import open_fake_host


async def answer(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer()


DOORS: dict[str, Callable[[], AbstractAsyncContextManager[Any]]] = {
    "open_sandbox()": trio_sandbox.open_sandbox,
    "open_host()": trio_sandbox.open_host,
    "open_scripted_sandbox()": lambda: open_scripted_sandbox(answer),
    "open_qmp()": lambda: trio_sandbox.qemu.open_qmp("/nonexistent"),
    "open_runtime()": trio_sandbox.qemu.open_runtime,
    "open_ray_host()": open_ray_host,
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


@pytest.mark.parametrize("door", [trio_sandbox.aio, trio_sandbox.blocking], ids=["aio", "blocking"])
def test_nobody_is_sent_to_a_door_that_is_not_there(door: ModuleType) -> None:
    assert {f"{name}()" for name in vars(door) if name.startswith("open_")} == OPENED_BY_DOORS
    for name in DOORS:
        with pytest.raises(RuntimeError) as caught:
            if door is trio_sandbox.aio:
                asyncio.run(enter(name))
            else:
                enter(name).send(None)
        assert (door.__name__ in str(caught.value)) == (name in OPENED_BY_DOORS)


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


async def test_a_sandbox_in_another_trio_run_is_told_the_way_and_hurts_neither() -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        for request, what in (
            (lambda: sandbox.run("1"), "a run"),
            (lambda: sandbox.run_process(["true"]), "the process 'true'"),
            (lambda: sandbox.path("/x").read_bytes(), "read_bytes of '/x'"),
            (lambda: sandbox.wait_port(80), "the wait for port 80"),
        ):

            def in_another_run() -> str:
                async def main() -> str:
                    with pytest.raises(RuntimeError) as caught:
                        await request()  # noqa: B023 - it is called before the next
                    return str(caught.value)

                return trio.run(main)

            said = await trio.to_thread.run_sync(in_another_run)
            assert said.startswith(f"{what} belongs to another call of `trio.run()`"), said
        assert (await sandbox.run("1")).ok


async def test_a_host_in_another_trio_run_is_told_the_way(tmp_path: Path) -> None:
    async with open_fake_host(tmp_path) as host, host.open_sandbox(config=SandboxConfig(memory_mib=128)) as sandbox:

        async def open_one() -> None:
            async with host.open_sandbox():
                raise AssertionError("it must not open")

        for request in (
            open_one,
            host.prepare,
            sandbox.checkpoint,
            sandbox.revert,
            sandbox.hibernate,
            sandbox.resume,
            lambda: sandbox.save("x"),
        ):

            def in_another_run() -> None:
                with pytest.raises(RuntimeError, match=r"belongs to another call of `trio\.run\(\)`"):
                    trio.run(request)  # noqa: B023 - it is called before the next

            await trio.to_thread.run_sync(in_another_run)
        assert (await sandbox.run("")).ok


def test_the_doors_keep_their_signatures() -> None:
    assert "image" in inspect.signature(trio_sandbox.open_sandbox).parameters
    assert trio_sandbox.open_sandbox.__doc__
    assert trio_sandbox.open_sandbox.__module__ == "trio_sandbox"


#: What callers expect to take a ``timeout``, as the functions of `subprocess` and `socket` do.
WAITING: dict[str, Callable[..., Any]] = {
    "run()": Sandbox.run,
    "stream()": Sandbox.stream,
    "run_process()": Sandbox.run_process,
    "open_process()": Sandbox.open_process,
    "open_tcp_stream()": Sandbox.open_tcp_stream,
    "wait_port()": Sandbox.wait_port,
    "install()": Sandbox.install,
    "wait()": GuestProcess.wait,
    "lease()": Sessions.lease,
}
#: What else `subprocess.run` takes, and what to do in its place.
INSTEAD = {
    "input": "pass bytes as `stdin`",
    "capture_output": "`capture_stdout=True`",
    "text": "decode",
    "encoding": "decode",
}
REFUSED = [(name, "timeout", "trio.fail_after(seconds)") for name in WAITING] + [
    *(("run_process()", argument, way) for argument, way in INSTEAD.items()),
    *((name, "input", INSTEAD["input"]) for name in ("run()", "stream()")),
]


@pytest.mark.parametrize("door", ["trio_sandbox", "trio_sandbox.aio", "trio_sandbox.blocking"])
@pytest.mark.parametrize(("name", "argument", "way"), REFUSED)
async def test_who_passes_what_other_libraries_take_is_told_the_way(
    name: str, argument: str, way: str, door: str
) -> None:
    owner, method = WAITING[name].__qualname__.replace("GuestRequests", "Sandbox").split(".")
    module = importlib.import_module("trio_sandbox.sessions" if (door, owner) == ("trio_sandbox", "Sessions") else door)
    function = getattr(getattr(module, owner), method)
    with pytest.raises(TypeError) as caught:
        called = function(None, "1", **{argument: 5})
        if inspect.isawaitable(called):
            await called
    assert str(caught.value).startswith(f"{name} has no `{argument}`, and nothing was done: ")
    assert way in str(caught.value)
    assert argument not in inspect.signature(function).parameters


@pytest.mark.parametrize("name", WAITING)
def test_what_refuses_an_argument_stays_the_kind_of_function_that_it_is(name: str) -> None:
    function = WAITING[name]
    inner: Any = inspect.unwrap(function)
    assert inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)
    assert inspect.iscoroutinefunction(function) == inspect.iscoroutinefunction(inner)


async def test_a_sandbox_goes_on_after_an_argument_was_refused() -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        with pytest.raises(TypeError, match=r"^run\(\) has no `timeout`"):
            await sandbox.run("1", timeout=5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
        assert (await sandbox.run("1")).ok
        assert sandbox.statistics().runs == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stdin": "yes"}, "`stdin` must be bytes, not str; encode it, as in 'yes'.encode()"),
        ({"stdin": None}, "`stdin` must be bytes, not NoneType"),
        ({"stdin": True}, "`stdin` must be bytes, not bool"),
        ({"stdin": memoryview(b"abcd")[::2]}, "`stdin` must be bytes, not memoryview: "),
        ({"env": ["TZ=UTC"]}, "`env` must be a mapping from names to values, as in {'TZ': 'UTC'}, not list"),
        ({"command": ["head", "-c", 5]}, "an argument in `command` must be str or a path in the guest, not int: 5"),
        ({"command": ["cat", b"x"]}, "an argument in `command` must be str or a path in the guest, not bytes: b'x'"),
        ({"command": 5}, "`command` must be a sequence of arguments"),
    ],
)
async def test_arguments_of_a_process_that_can_be_none_are_refused(arguments: dict[str, Any], words: str) -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        given: dict[str, Any] = {"command": ["true"]} | arguments
        with pytest.raises(TypeError) as caught:
            await sandbox.run_process(**given)
        assert str(caught.value).startswith(words)
        assert sandbox.statistics().processes == 0


async def test_a_command_may_be_any_iterable() -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        command: Any = (word for word in ("ls", "-l"))
        assert (await sandbox.run_process(command)).args == ["ls", "-l"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stdin": "yes"}, "`stdin` must be bytes, not str; encode it"),
        ({"stdin": None}, "`stdin` must be bytes, not NoneType"),
        ({"stdin": memoryview(b"abcd")[::2]}, "`stdin` must be bytes, not memoryview: "),
        ({"env": "TZ=UTC"}, "`env` must be a mapping from names to values"),
    ],
)
async def test_arguments_of_a_run_that_can_be_none_are_refused(arguments: dict[str, Any], words: str) -> None:
    async with open_scripted_sandbox(answer) as sandbox:
        with pytest.raises(TypeError) as caught:
            await sandbox.run("1", **arguments)
        assert str(caught.value).startswith(words)
        assert sandbox.statistics().runs == 0
