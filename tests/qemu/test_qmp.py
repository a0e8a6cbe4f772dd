"""The QMP channel with a real QEMU program at the other end."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from trio_sandbox import QMPClosedError, QMPCommandError, QMPConnectError, QMPProtocolError, Timeouts
from trio_sandbox.qemu import InheritedFds, OwnedProcess, minimal_environment, open_qmp, run_owned

from .._leaks import cancel_at_every_step, nothing_left

pytestmark = pytest.mark.qemu


@asynccontextmanager
async def monitor() -> AsyncGenerator[tuple[Path, OwnedProcess]]:
    """Run a QEMU without a guest; give its monitor's path. QEMU makes the socket itself."""
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        path = Path(directory, "qmp")
        with socket.socket(socket.AF_UNIX) as listener, InheritedFds() as inherited:
            listener.bind(str(path))
            listener.listen(4)
            fd = inherited.add(os.dup(listener.fileno()))
            async with trio.open_nursery() as nursery:
                process: OwnedProcess = await nursery.start(
                    partial(
                        run_owned,
                        [
                            "qemu-system-x86_64",
                            *("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"),
                            *("-chardev", f"socket,id=qmp,fd={fd},server=on,wait=off"),
                            *("-mon", "chardev=qmp,mode=control"),
                        ],
                        environment=minimal_environment(),
                        inherited=inherited,
                    )
                )
                yield path, process
                nursery.cancel_scope.cancel()


async def test_commands_events_and_errors() -> None:
    with nothing_left():
        async with monitor() as (path, process), open_qmp(path, expected_uid=os.geteuid()) as channel:
            assert channel.greeting.version >= (7, 0, 0)
            version = await channel.execute("query-version")
            assert (version["qemu"]["major"], version["qemu"]["minor"]) == channel.greeting.version[:2]
            with pytest.raises(QMPCommandError, match="no-such-command") as caught:
                await channel.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"
            with pytest.raises(QMPCommandError) as caught:
                await channel.execute("query-balloon")
            assert caught.value.error_class == "DeviceNotActive"
            with channel.subscribe("STOP", "RESUME") as events:
                await channel.execute("stop")
                await channel.execute("cont")
                assert [(await events.receive()).name for _ in range(2)] == ["STOP", "RESUME"]
            with channel.subscribe() as events:
                await channel.execute("quit")
                await process.wait()
                assert (await events.receive()).name == "SHUTDOWN"
            assert isinstance(await channel.wait_closed(), QMPClosedError)


async def test_many_commands_in_flight() -> None:
    answers: dict[int, object] = {}

    async with monitor() as (path, _), open_qmp(path) as channel:

        async def execute(number: int) -> None:
            try:
                answers[number] = await channel.execute(
                    "qom-get", {"path": "/machine" if number % 2 else f"/nowhere{number}", "property": "type"}
                )
            except QMPCommandError as exc:
                answers[number] = exc.desc

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(execute, number)
        for number in range(100):
            assert ("none-machine" if number % 2 else f"/nowhere{number}") in str(answers[number])
        assert channel.statistics().commands_in_flight == 0


async def test_descriptors_are_handed_over() -> None:
    with nothing_left():
        async with monitor() as (path, process), open_qmp(path) as channel:
            with tempfile.TemporaryFile() as file:

                async def add(number: int) -> None:
                    got = await channel.execute(
                        "add-fd", {"fdset-id": number, "opaque": f"o{number}"}, fds=[file.fileno()]
                    )
                    assert got["fdset-id"] == number

                async with trio.open_nursery() as nursery:
                    for number in range(20):
                        nursery.start_soon(add, number)
                await channel.execute("getfd", {"fdname": "one"}, fds=[file.fileno()])
            sets = await channel.execute("query-fdsets")
            assert sorted(each["fdset-id"] for each in sets) == list(range(20))
            links = [os.readlink(f"/proc/{process.pid}/fd/{each['fds'][0]['fd']}") for each in sets]
            assert len(set(links)) == 1


async def test_second_client_is_told_after_a_while() -> None:
    async with monitor() as (path, _), open_qmp(path):
        with pytest.raises(QMPConnectError, match="another client"):
            async with open_qmp(path, timeouts=Timeouts(qmp_connect=0.2)):
                raise AssertionError("not reached")


async def test_next_client_gets_in_after_the_first() -> None:
    async with monitor() as (path, _):
        for _ in range(3):
            async with open_qmp(path) as channel:
                assert await channel.execute("query-name") == {}


async def test_killed_qemu_wakes_the_waiter() -> None:
    with nothing_left():
        async with monitor() as (path, process), open_qmp(path) as channel, trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(QMPClosedError, match="query-name may have run"):
                    await channel.execute("query-name")

            process.send_signal(signal.SIGSTOP)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            process.kill()


async def test_bytes_that_are_not_qmp_are_reported_by_qemu() -> None:
    async with monitor() as (path, _), open_qmp(path) as channel:
        channel._sock.send(b"}{\n")
        assert isinstance(await channel.wait_closed(), QMPProtocolError)
        with pytest.raises(QMPProtocolError, match="did not understand"):
            await channel.execute("query-name")


async def test_cancelled_at_every_await_the_channel_stays_in_step() -> None:
    async with monitor() as (path, _), open_qmp(path) as channel:

        async def execute() -> None:
            await channel.execute("query-status")

        async def check() -> None:
            assert await channel.execute("query-name") == {}
            assert channel.statistics().commands_in_flight == 0

        async def both() -> None:
            try:
                await execute()
            finally:
                with trio.CancelScope(shield=True):  # noqa: ASYNC102 # the test's own bound is enough
                    await check()

        assert await cancel_at_every_step(both, every_task=True) > 6
