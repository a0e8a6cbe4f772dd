"""A sandbox whose machine is replaced: requests that come meanwhile wait, those under way stay with theirs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from trio_sandbox import OutcomeUnknownError, SandboxClosedError, SandboxConfig, Timeouts
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import STDOUT, RecordStream

from ._guest import FakeMachine, finished, open_fake_machine, receive_json


@asynccontextmanager
async def open_machine(name: str) -> AsyncGenerator[FakeMachine]:
    """Yield a machine whose runs print its name, but for "wait", which never ends."""

    async def code(records: RecordStream) -> None:
        request = await receive_json(records)
        if request["code"] == "wait":
            await trio.sleep_forever()
        await records.send(STDOUT, name.encode())
        await records.send_json(finished())
        await records.send_eof()

    async with open_fake_machine({"code": code}) as machine:
        yield machine


class Gate:
    """Keeps requests waiting until it is opened, or refuses them."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.opened = trio.Event()
        self.asked: list[str] = []
        self._refusal = refusal

    async def __call__(self, what: str) -> None:
        self.asked.append(what)
        if self._refusal is not None:
            raise self._refusal
        await self.opened.wait()


def sandbox_in(slot: Slot) -> Sandbox:
    return Sandbox(slot, "python", SandboxConfig(), Timeouts())


async def test_a_request_that_comes_while_the_machine_is_replaced_waits_for_the_new_one() -> None:
    async with open_machine("old") as old, open_machine("new") as new:
        slot, gate = Slot(old), Gate()
        sandbox = sandbox_in(slot)
        path = sandbox.path("/tmp")
        assert (await sandbox.run("")).stdout == "old"
        outputs: list[str] = []

        async def run() -> None:
            outputs.append((await sandbox.run("")).stdout)

        slot.shut_off(gate)
        assert slot.shut
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            assert gate.asked == ["the run"]
            slot.reopen(new)
            gate.opened.set()
        assert outputs == ["new"]
        assert sandbox.path("/tmp") == path


async def test_a_request_under_way_fails_with_its_own_machine() -> None:
    async with open_machine("old") as old, open_machine("new") as new:
        slot = Slot(old)
        sandbox = sandbox_in(slot)

        async def run() -> None:
            with pytest.raises(OutcomeUnknownError) as caught:
                await sandbox.run("wait")
            assert str(caught.value.__cause__) == "replaced"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            slot.reopen(new)
            old.retire("replaced")
        assert (await sandbox.run("")).stdout == "new"


async def test_a_gate_may_refuse_and_nothing_is_sent() -> None:
    async with open_machine("old") as old:
        slot = Slot(old)
        slot.shut_off(Gate(SandboxClosedError("no")))
        with pytest.raises(SandboxClosedError, match="no"):
            await sandbox_in(slot).run("")
        slot.reopen()
        assert (await sandbox_in(slot).run("")).stdout == "old"


async def test_one_that_waits_can_be_cancelled() -> None:
    async with open_machine("old") as old:
        slot = Slot(old)
        slot.shut_off(Gate())
        with trio.CancelScope() as scope:
            scope.cancel()
            await sandbox_in(slot).run("")
        assert scope.cancelled_caught


async def test_a_machine_that_is_there_costs_no_checkpoint() -> None:
    async with open_machine("old") as old:
        with trio.testing.assert_no_checkpoints():
            assert await Slot(old).resolve("a test") is old


async def test_the_end_of_a_machine_is_the_slots_only_if_none_takes_its_place() -> None:
    async with open_machine("old") as old, open_machine("new") as new:
        slot = Slot(old)
        ends: list[Exception | None] = []

        async def wait() -> None:
            ends.append(await slot.wait_ended())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            slot.shut_off(Gate())
            old.retire("old")
            await trio.testing.wait_all_tasks_blocked()
            assert ends == []
            slot.reopen(new)
            await trio.testing.wait_all_tasks_blocked()
            assert ends == []
            new.retire("new")
        assert ends == [new.failure]


async def test_the_end_of_a_machine_whose_replacement_failed_is_the_slots() -> None:
    async with open_machine("old") as old:
        slot = Slot(old)
        async with trio.open_nursery() as nursery:
            slot.shut_off(Gate())
            nursery.start_soon(slot.wait_ended)
            old.retire("old")
            await trio.testing.wait_all_tasks_blocked()
            slot.reopen()
        assert await slot.wait_ended() is old.failure


async def test_a_forwarded_port_leads_to_the_machine_that_is_there() -> None:
    async def tcp(records: RecordStream) -> None:
        async with records.stream as stream:
            await stream.send_all(b"\0\0new")

    async with open_machine("old") as old, open_fake_machine({"tcp": tcp}) as new, trio.open_nursery() as nursery:
        slot = Slot(old)
        port = await nursery.start(sandbox_in(slot).forward_port, 80)
        slot.reopen(new)
        old.retire("replaced")
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            received = b""
            while len(received) < len(b"new"):
                received += await client.receive_some()
        assert received == b"new"
        nursery.cancel_scope.cancel()
