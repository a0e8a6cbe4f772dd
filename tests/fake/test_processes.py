"""Processes against a scripted guest: the vocabulary of Trio's own, and ends that are always reached."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import Any

import pytest
import trio
import trio.testing

from tests._leaks import cancel_at_every_step
from trio_sandbox import GuestProtocolError, OutcomeUnknownError, OutputLimitError, SandboxConfig, Timeouts
from trio_sandbox.client import GuestProcess
from trio_sandbox.wire import RecordStream

from ._guest import Service, open_fake_sandbox, receive_json


class ScriptedGuest:
    """The services `pipe` and `process` of a guest; *play* is what a process does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.pipes: dict[int, RecordStream] = {}
        self.over = trio.Event()

    def services(self) -> dict[str, Service]:
        return {"pipe": self.pipe, "process": self.process}

    async def pipe(self, records: RecordStream) -> None:
        self.pipes[records.stream.id] = records
        await self.over.wait()

    async def process(self, records: RecordStream) -> None:
        request = await receive_json(records)
        self.requests.append(request)
        await records.send_json({"started": 77})
        status = -9
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listen, records, nursery.cancel_scope)
            status = await self.play(request)
            nursery.cancel_scope.cancel()
        for pipe in [
            self.pipes[request[name]] for name in ("stdin", "stdout", "stderr") if request[name] in self.pipes
        ]:
            with contextlib.suppress(trio.BrokenResourceError):
                await pipe.send_eof()
        await records.send_json({"exited": {"status": status}}, end=True)

    async def listen(self, records: RecordStream, life: trio.CancelScope) -> None:
        """Take signals until one is the kill, or the host has gone."""
        while (message := await receive_json(records)) is not None:
            self.requests.append(message)
            if message == {"kill": True}:
                break
        life.cancel()

    async def play(self, request: Any) -> int:
        """Do what the process does and return its exit status; a plain one sleeps until killed."""
        await trio.sleep_forever()
        return 0


class Cat(ScriptedGuest):
    """Copies standard input to standard output, says something on standard error, exits with 3."""

    async def play(self, request: Any) -> int:
        if request["stderr"] not in (None, "stdout"):
            await self.pipes[request["stderr"]].stream.send_all(b"warning")
        if request["stdin"] is not None:
            while data := await self.pipes[request["stdin"]].stream.receive_some():
                await self.pipes[request["stdout"]].stream.send_all(data)
        return 3


async def test_run_process_feeds_captures_and_reports_like_trio() -> None:
    guest = Cat()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        completed = await sandbox.run_process(
            ["cat", "-"], stdin=b"text" * 50_000, capture_stdout=True, capture_stderr=True, check=False, cwd="/tmp"
        )
        assert isinstance(completed, subprocess.CompletedProcess)
        assert (completed.args, completed.returncode) == (["cat", "-"], 3)
        assert (completed.stdout, completed.stderr) == (b"text" * 50_000, b"warning")
        assert guest.requests[0]["argv"] == ["cat", "-"]
        assert guest.requests[0]["cwd"] == "/tmp"
        assert sandbox.statistics().processes == 1


async def test_the_process_of_the_machine_is_told_while_there_is_one() -> None:
    async with open_fake_sandbox({}) as (sandbox, machine):
        assert sandbox.statistics().qemu_pid == machine.pid
        machine.retire("the test says so")
        assert sandbox.statistics().qemu_pid is None


async def test_a_status_other_than_0_is_an_error_if_checked() -> None:
    async with open_fake_sandbox(Cat().services()) as (sandbox, _):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await sandbox.run_process(["cat"], stdin=b"x", capture_stdout=True)
    assert (caught.value.returncode, caught.value.output, caught.value.stderr) == (3, b"x", None)


async def test_what_is_not_captured_is_not_sent() -> None:
    guest = Cat()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        completed = await sandbox.run_process(["true"], check=False)
    assert completed.stdout is None
    assert completed.stderr is None
    assert [guest.requests[0][name] for name in ("stdin", "stdout", "stderr")] == [None, None, None]


async def test_a_shell_line_is_one_argument_of_the_guests_shell() -> None:
    guest = Cat()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        await sandbox.run_process("echo $HOME; false", shell=True, stderr_to_stdout=True, check=False)
        assert guest.requests[0]["argv"] == ["/bin/sh", "-c", "echo $HOME; false"]
        assert guest.requests[0]["stderr"] == "stdout"
        with pytest.raises(TypeError, match="shell=True"):
            await sandbox.run_process("echo")
        with pytest.raises(TypeError, match="one string"):
            await sandbox.run_process(["echo"], shell=True)
        with pytest.raises(ValueError, match="exclude each other"):
            await sandbox.run_process(["echo"], capture_stderr=True, stderr_to_stdout=True)


async def test_a_program_that_is_not_there_raises_what_it_raises_on_the_host() -> None:
    async def process(records: RecordStream) -> None:
        await receive_json(records)
        failure = {"errno": 2, "strerror": "No such file or directory", "filename": "nope"}
        await records.send_json({"failed": failure}, end=True)

    async with open_fake_sandbox({"process": process}) as (sandbox, machine):
        with pytest.raises(FileNotFoundError) as caught:
            await sandbox.run_process(["nope"])
        assert caught.value.filename == "nope"
        assert machine.failure is None


async def test_signals_arrive_in_order_and_after_the_end_they_are_nothing() -> None:
    guest = ScriptedGuest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _):
        async with sandbox.open_process(["sleep"], stdin=False, stdout=False, stderr="discard") as process:
            assert process.pid == 77
            assert process.returncode is None
            assert "running with PID 77" in repr(process)
            process.send_signal(signal.SIGUSR1)
            process.terminate()
            process.kill()
            assert await process.wait() == -9
            assert "exited with status -9" in repr(process)
            process.kill()
            with pytest.raises(ValueError, match="12345"):
                process.send_signal(12345)
        assert guest.requests[1:] == [{"signal": 10}, {"signal": 15}, {"kill": True}]


async def test_a_guest_that_takes_no_signals_makes_the_sender_busy_not_the_memory_full() -> None:
    async def process(records: RecordStream) -> None:
        await receive_json(records)
        await records.send_json({"started": 1})
        await trio.sleep_forever()

    timeouts = Timeouts(kill=0.01)
    async with open_fake_sandbox({"process": process}, timeouts=timeouts) as (sandbox, machine):
        async with sandbox.open_process(["deaf"]) as running:
            with pytest.raises(trio.BusyResourceError, match="last 64 signals"):
                while True:
                    running.terminate()
            with trio.CancelScope() as scope:
                scope.cancel()
                await running.wait()
        assert "did not end when it was killed" in str(machine.failure)


async def test_leaving_the_block_kills_the_process() -> None:
    guest = ScriptedGuest()
    async with open_fake_sandbox(guest.services()) as (sandbox, machine):
        processes: list[GuestProcess] = []
        with trio.move_on_after(0.01):
            async with sandbox.open_process(["sleep", "1000"]) as process:
                processes.append(process)
                await trio.sleep_forever()
        assert [process.returncode for process in processes] == [-9]
        assert guest.requests[1:] == [{"kill": True}]
        assert machine.failure is None


async def test_a_process_that_does_not_die_costs_the_machine_in_bounded_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Immortal(ScriptedGuest):
        async def listen(self, records: RecordStream, life: trio.CancelScope) -> None:
            await trio.sleep_forever()

    async with open_fake_sandbox(Immortal().services(), timeouts=Timeouts(kill=5)) as (sandbox, machine):
        start = trio.current_time()
        processes: list[GuestProcess] = []
        with trio.move_on_after(1):
            async with sandbox.open_process(["immortal"]) as process:
                processes.append(process)
                await trio.sleep_forever()
        assert trio.current_time() - start == 6
        assert machine.failure is not None
        assert processes[0].usage is None
        with pytest.raises(OutcomeUnknownError):
            await processes[0].wait()


async def test_too_much_captured_output_ends_the_process() -> None:
    class Flood(ScriptedGuest):
        async def play(self, request: Any) -> int:
            for _ in range(3):
                await self.pipes[request["stdout"]].stream.send_all(b"y" * 40)
            return await super().play(request)

    guest = Flood()
    async with open_fake_sandbox(guest.services(), config=SandboxConfig(max_output_bytes=100)) as (sandbox, machine):
        with pytest.raises(OutputLimitError, match="'yes' printed more than 100 bytes to stdout") as caught:
            await sandbox.run_process(["yes"], capture_stdout=True)
        assert caught.value.stdout_bytes == b"y" * 100
        assert guest.requests[-1] == {"kill": True}
        assert machine.failure is None


async def test_nursery_start_returns_the_running_process() -> None:
    guest = ScriptedGuest()
    async with open_fake_sandbox(guest.services()) as (sandbox, _), trio.open_nursery() as nursery:
        process = await nursery.start(sandbox.run_process, ["server"])
        assert isinstance(process, GuestProcess)
        assert process.returncode is None
        nursery.cancel_scope.cancel()


async def test_closing_the_input_twice_and_sending_afterwards() -> None:
    guest = Cat()
    async with open_fake_sandbox(guest.services()) as (sandbox, _), sandbox.open_process(["cat"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(b"x")
        await process.stdin.wait_send_all_might_not_block()
        await process.stdin.aclose()
        await process.stdin.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await process.stdin.send_all(b"y")
        assert await process.stdout.receive_some(1) == b"x"
        assert await process.stdout.receive_some() == b""
        assert await process.wait() == 3
        await process.stdout.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await process.stdout.receive_some()


@pytest.mark.parametrize("when", ["before it started", "while it runs"])
async def test_a_machine_that_dies_leaves_the_outcome_unknown(when: str) -> None:
    async def process(records: RecordStream) -> None:
        await receive_json(records)
        if when == "while it runs":
            await records.send_json({"started": 1})
        machine.retire("QEMU was killed")
        await trio.sleep_forever()

    async with open_fake_sandbox({"process": process}) as (sandbox, machine):
        with pytest.raises(OutcomeUnknownError) as caught:
            await sandbox.run_process(["work"])
        assert caught.value.__cause__ is machine.failure


@pytest.mark.parametrize("message", [{"finished": 1}, {"exited": {"status": "0"}}, {"started": 2}, None])
async def test_a_guest_that_breaks_the_rules_loses_its_machine(message: dict[str, Any] | None) -> None:
    async def process(records: RecordStream) -> None:
        await receive_json(records)
        await records.send_json({"started": 1})
        if message is not None:
            await records.send_json(message)
        await records.send_eof()
        await trio.sleep_forever()

    async with open_fake_sandbox({"process": process}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError):
            await sandbox.run_process(["work"])
        assert machine.failure is not None


async def test_cancelled_at_every_step_a_process_leaves_the_sandbox_usable() -> None:
    async with open_fake_sandbox(Cat().services()) as (sandbox, machine):

        async def work(stdin: bytes = b"in") -> bytes:
            completed = await sandbox.run_process(["cat"], stdin=stdin, capture_stdout=True, check=False)
            assert isinstance(completed.stdout, bytes)
            return completed.stdout

        assert await cancel_at_every_step(work) > 5
        assert await work(b"probe") == b"probe"
        assert machine.failure is None
