"""Deadlines that travel: what the host tells its guest, and what the guest does where nobody tells it anything."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from trio_sandbox import DeadlinePassedError, Timeouts
from trio_sandbox.wire import STDOUT, RecordStream

from ._agent import Host, Ran, open_agent
from ._guest import FakeMachine, finished, open_fake_sandbox, receive_json

# --- The host, whose guest is scripted ---


class Guest:
    """Notes what the host says, and when; its runs and processes end when they are told to."""

    def __init__(self) -> None:
        self.said: list[tuple[float, dict[str, Any]]] = []
        self.expire_at = math.inf

    async def code(self, records: RecordStream) -> None:
        await self._hear(records)
        await records.send(STDOUT, b"go")
        expired = not await self._hear_to_the_end(records, {"interrupt": True})
        await records.send_json(finished(130, expired=expired), end=True)

    async def process(self, records: RecordStream) -> None:
        await self._hear(records)
        await records.send_json({"started": 7})
        expired = not await self._hear_to_the_end(records, {"kill": True})
        await records.send_json({"exited": {"status": -9, "expired": expired}}, end=True)

    async def _hear(self, records: RecordStream) -> Any:
        message = await receive_json(records)
        if message is not None:
            self.said.append((trio.current_time(), message))
        return message

    async def _hear_to_the_end(self, records: RecordStream, end: dict[str, Any]) -> bool:
        with trio.move_on_at(self.expire_at):
            while await self._hear(records) not in (end, None):
                pass
            return True
        return False

    @property
    def deadlines(self) -> list[tuple[float, float | None]]:
        """When it was told of a deadline, and the seconds that it was given."""
        return [(time, message["deadline"]) for time, message in self.said if "deadline" in message]

    def services(self) -> dict[str, Any]:
        return {"code": self.code, "process": self.process}


async def test_the_effective_deadline_goes_with_the_request(autojump_clock: trio.testing.MockClock) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services(), timeouts=Timeouts(interrupt_grace=3)) as (sandbox, _):
        with trio.move_on_after(100), trio.move_on_after(10):
            await sandbox.run("endless")
        with trio.move_on_after(4), trio.CancelScope(shield=True), trio.move_on_after(20):
            await sandbox.run_process(["endless"])
    (_, run), (interrupted_at, interrupt), (_, process), (killed_at, kill) = guest.said
    assert (run["deadline"], run["grace"]) == (10.5, 3)
    assert (process["deadline"], "grace" in process) == (20.5, False)
    assert (interrupt, kill) == ({"interrupt": True}, {"kill": True})
    assert (interrupted_at, killed_at) == (10, 30), "the host itself stops things, at the very moment"


async def test_without_a_deadline_there_is_none_in_the_guest(autojump_clock: trio.testing.MockClock) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        with trio.CancelScope() as scope:
            async with sandbox.stream("endless"), sandbox.open_process(["endless"]):
                scope.deadline = trio.current_time() + 10  # which the host will see to
                await trio.sleep_forever()
    assert len(guest.said) == 4, "two requests, and the ends of both"
    assert guest.deadlines == []


async def test_a_grace_without_end_is_none_for_the_guest_as_well(autojump_clock: trio.testing.MockClock) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services(), timeouts=Timeouts(interrupt_grace=math.inf)) as (sandbox, _):
        with trio.move_on_after(10):
            await sandbox.run("endless")
    assert "grace" not in guest.said[0][1]


@pytest.mark.parametrize("what", ["run", "process"])
async def test_a_deadline_that_moves_is_told_before_the_old_one_passes(
    autojump_clock: trio.testing.MockClock, what: str
) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        with trio.move_on_after(8) as scope:
            async with sandbox.stream("x") if what == "run" else sandbox.open_process(["x"]):
                await trio.sleep(1.5)
                scope.deadline = 100  # later
                await trio.sleep(9)
                scope.deadline = 50  # sooner
                await trio.sleep(59)
        assert scope.cancelled_caught
        assert trio.current_time() == 50
    assert guest.deadlines == [(0, 8.5), (2, 98.5), (11, 39.5)]


async def test_a_deadline_that_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        with trio.move_on_after(8) as scope:
            async with sandbox.stream("x"):
                scope.deadline = math.inf
                await trio.sleep(1000)
    assert guest.deadlines == [(0, 8.5), (1, None)]


async def test_a_cleanup_that_is_shielded_keeps_its_process(autojump_clock: trio.testing.MockClock) -> None:
    guest = Guest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        with trio.move_on_after(8):
            async with sandbox.open_process(["x"]) as process:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(10)
                    assert process.returncode is None
    assert guest.deadlines == [(0, 8.5), (8.25, None)], "told before it would have passed in the guest"
    assert guest.said[-1] == (18, {"kill": True})


async def expire(what: str, machine: FakeMachine, sandbox: Any) -> None:
    """Start something with a deadline of 8 seconds, and wait for its end."""
    if what == "run":
        await sandbox.run("x")
    elif what == "run_process":
        await sandbox.run_process(["x"])
    else:
        async with sandbox.open_process(["x"]) as process:
            await process.wait()
    pytest.fail("there is no result of what the guest stopped")


@pytest.mark.parametrize("what", ["run", "run_process", "open_process"])
async def test_whose_deadline_it_was_is_cancelled(autojump_clock: trio.testing.MockClock, what: str) -> None:
    guest = Guest()
    guest.expire_at = 7.75  # its clock is fast, or ours was held up
    async with open_fake_sandbox(guest.services()) as (sandbox, machine):
        with pytest.raises(trio.TooSlowError), trio.fail_after(8):
            await expire(what, machine, sandbox)
        assert trio.current_time() == 8
        assert machine.failure is None


@pytest.mark.parametrize("what", ["run", "run_process", "open_process"])
async def test_who_moved_it_too_late_is_told(autojump_clock: trio.testing.MockClock, what: str) -> None:
    guest = Guest()
    guest.expire_at = 8.5
    async with open_fake_sandbox(guest.services()) as (sandbox, machine):

        async def move() -> None:
            await trio.sleep(7.875)
            scope.deadline = 100
            autojump_clock.jump(2)  # the loop is blocked, for longer than the guest waits

        async with trio.open_nursery() as nursery:
            nursery.start_soon(move)
            with trio.move_on_after(8) as scope, pytest.raises(DeadlinePassedError, match="by itself") as caught:
                await expire(what, machine, sandbox)
        assert trio.current_time() == 9.875
        assert not caught.value.retry_safe
        assert machine.failure is None


# --- The guest, whose host is silent ---


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        await host.run("pass")  # an interpreter that is still starting takes its time
        yield host


IGNORING = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('go')\ntime.sleep(1000)"


async def test_a_run_is_interrupted_when_its_deadline_passes(host: Host) -> None:
    await host.run("x = 1")
    async with host.open_run("print('go')\nwhile True: pass", deadline=0.2, grace=None) as run:
        result = await run.finish()
        assert run.end is not None
        assert run.end["finished"]["expired"]
    assert (result.stdout, result.exit_code, result.state_kept) == ("go\n", 130, True)
    assert await host.run("print(x)") == Ran("1\n", "", 0, restarted=False, state_kept=True)


async def test_a_run_that_ignores_the_interrupt_is_killed_after_the_grace(host: Host) -> None:
    async with host.open_run(IGNORING, deadline=0.2, grace=0.2) as run:
        assert await run.finish() == Ran("go\n", "", 137, restarted=False, state_kept=False)
        assert run.end is not None
        assert run.end["finished"]["expired"]
    assert (await host.run("print(1)")).restarted


async def test_an_interpreter_that_is_still_starting_is_killed_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python3"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with open_agent() as host, host.open_run("print(1)", deadline=0.2, grace=0.2) as run:
        assert (await run.finish()).exit_code == 137
        assert run.end is not None
        assert run.end["finished"]["expired"]


async def test_a_host_that_interrupts_need_not_stay_for_the_kill(host: Host) -> None:
    async with host.open_run(IGNORING, deadline=1000, grace=0.2) as run:
        await run.until(b"go\n")
        await run.interrupt()
        assert (await run.finish()).exit_code == 137
        assert run.end is not None
        assert not run.end["finished"]["expired"]


async def test_a_run_is_interrupted_once(host: Host) -> None:
    code = (
        "import signal, time\nhits = []\nsignal.signal(signal.SIGINT, lambda *a: hits.append(1))\nprint('go')\n"
        "while not hits: time.sleep(0.01)\nprint('hit')\ntime.sleep(0.5)\nprint(len(hits))"
    )
    async with host.open_run(code, deadline=0.3, grace=None) as run:
        await run.until(b"go\n")
        await run.interrupt()
        await run.until(b"hit\n")
        await run.records.send_json({"deadline": 0})  # too late to count
        assert (await run.finish()).stdout == "go\nhit\n1\n"


@pytest.mark.parametrize("later", [1000, None])
async def test_a_deadline_that_was_moved_or_dropped_does_not_count_any_more(host: Host, later: int | None) -> None:
    async with host.open_run("import time\nprint('go')\ntime.sleep(1)", deadline=0.5, grace=None) as run:
        await run.records.send_json({"deadline": later})
        assert (await run.finish()).exit_code == 0
        assert run.end is not None
        assert not run.end["finished"]["expired"]


async def test_the_deadline_of_a_run_that_is_over_hits_no_other(host: Host) -> None:
    async with host.open_run("pass", deadline=0.2, grace=0) as run:
        await run.finish()
        async with host.open_run("import time\nprint('go')\ntime.sleep(0.5)") as other:
            assert (await other.finish()).exit_code == 0


async def test_a_process_is_killed_with_its_descendants_when_its_deadline_passes(host: Host) -> None:
    async with host.open_process(["sh", "-c", "sleep 1000 & sleep 1001"], deadline=0.2) as process:
        await process.started()
        end = (await process.message())["exited"]
        assert (end["status"], end["expired"], end["oom"]) == (-signal.SIGKILL, True, False)
    async with host.open_process(["sleep", "1"], deadline=0.2) as process:
        await process.started()
        await process.records.send_json({"deadline": None})
        assert await process.exited() == 0


@pytest.mark.parametrize("wrong", ["1", [], {}])
async def test_a_deadline_that_is_none_is_refused(host: Host, wrong: object) -> None:
    with pytest.raises(trio.BrokenResourceError, match="deadline must be some seconds"):
        await host.run("print(1)", deadline=wrong)
    with pytest.raises(trio.BrokenResourceError, match="deadline must be some seconds"):
        await host.run_process(["true"], deadline=wrong)
