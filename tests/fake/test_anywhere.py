"""What a sandbox does, wherever it is: the same tests on this machine and on a node of a fleet. Guests are agents in this process."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import OutcomeUnknownError, OutputChunk, OutputLimitError, Sandbox, SandboxConfig

from ._fleet import open_fake_fleet
from ._sandbox import open_local_sandbox

CONFIG = SandboxConfig(max_output_bytes=100_000)


@pytest.fixture(params=["here", "on a node"])
async def sandbox(request: pytest.FixtureRequest) -> AsyncGenerator[Sandbox]:
    if request.param == "here":
        async with open_local_sandbox(CONFIG) as (sandbox, _):
            assert sandbox.node is None
            yield sandbox
    else:
        async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox("python", CONFIG) as sandbox:
            assert sandbox.node == "one"
            yield sandbox


class TestSandbox:
    async def test_runs_share_an_interpreter(self, sandbox: Sandbox) -> None:
        await sandbox.run("x = 6")
        result = await sandbox.run("print(x * 7)\nx")
        assert (result.stdout, result.value, result.exit_code) == ("42\n", "6", 0)
        assert "ZeroDivisionError" in (await sandbox.run("1 / 0")).stderr
        assert (await sandbox.run("echo shell", language="shell")).stdout == "shell\n"

    async def test_input_and_variables(self, sandbox: Sandbox, tmp_path: Path) -> None:
        code = "import os\nprint(input(), os.environ['NAME'], os.getcwd())"
        result = await sandbox.run(code, stdin=b"read\n", env={"NAME": "value"}, cwd=str(tmp_path))
        assert result.stdout == f"read value {tmp_path}\n"

    async def test_events_come_as_they_happen(self, sandbox: Sandbox) -> None:
        async with sandbox.stream("print('first', flush=True)\nprint(input())", stdin=True) as events:
            assert events.stdin is not None
            printed = b""
            async for event in events:
                if isinstance(event, OutputChunk):
                    printed += event.data
                    if printed == b"first\n":
                        await events.stdin.send_all(b"second\n")
        assert printed == b"first\nsecond\n"

    async def test_functions_of_the_program(self, sandbox: Sandbox) -> None:
        async def double(number: int) -> int:
            await trio.lowlevel.checkpoint()
            return 2 * number

        assert (await sandbox.run("print(double(21))", functions={"double": double})).stdout == "42\n"

    async def test_output_is_bounded(self, sandbox: Sandbox) -> None:
        with pytest.raises(OutputLimitError) as info:
            await sandbox.run("print('x' * 1_000_000)")
        assert len(info.value.stdout_bytes) == CONFIG.max_output_bytes
        assert (await sandbox.run("print(1)")).stdout == "1\n"

    async def test_a_cancelled_run_is_interrupted(self, sandbox: Sandbox) -> None:
        await sandbox.run("x = 1")
        with trio.CancelScope() as scope:
            async with sandbox.stream("print('begun', flush=True)\nimport time\ntime.sleep(1000)") as events:
                async for _ in events:
                    scope.cancel()
        assert (await sandbox.run("x")).value == "1"

    async def test_processes(self, sandbox: Sandbox) -> None:
        done = await sandbox.run_process(["tr", "a-z", "A-Z"], stdin=b"text", capture_stdout=True)
        assert done.stdout == b"TEXT"
        with pytest.raises(subprocess.CalledProcessError):
            await sandbox.run_process(["false"])
        with pytest.raises(FileNotFoundError):
            await sandbox.run_process(["no-such-program"])
        async with sandbox.open_process(["cat"]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.send_all(b"there and back")
            assert await process.stdout.receive_some() == b"there and back"
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM

    async def test_files(self, sandbox: Sandbox, tmp_path: Path) -> None:
        there = sandbox.path(str(tmp_path / "there"))
        await there.mkdir()
        await (there / "a").write_text("hello")
        async with await (there / "a").open("ab") as file:
            await file.write(b" world")
        assert await (there / "a").read_text() == "hello world"
        with pytest.raises(FileExistsError):
            await there.mkdir()
        await sandbox.download(there, tmp_path / "back")
        assert (tmp_path / "back" / "a").read_text() == "hello world"
        await sandbox.upload(tmp_path / "back", str(tmp_path / "again"))
        assert [path.name for path in await sandbox.path(str(tmp_path / "again")).iterdir()] == ["a"]

    async def test_tunnels(self, sandbox: Sandbox) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, trio.open_nursery() as nursery:

            async def serve() -> None:
                async with await listener.accept() as server:
                    async for data in server:
                        await server.send_all(data.upper())

            nursery.start_soon(serve)
            async with await sandbox.open_tcp_stream(listener.socket.getsockname()[1]) as stream:
                await stream.send_all(b"text")
                await stream.send_eof()
                data = b""
                async for piece in stream:
                    data += piece
                assert data == b"TEXT"

    async def test_a_machine_that_is_given_up(self, sandbox: Sandbox) -> None:
        async with trio.open_nursery() as nursery:

            async def expect_unknown() -> None:
                with pytest.raises(OutcomeUnknownError, match="the virtual machine ended during a run") as info:
                    await sandbox.run("import time; time.sleep(1000)")
                assert "the test says so" in str(info.value.__cause__)

            nursery.start_soon(expect_unknown)
            await wait_until(lambda: sandbox.statistics().runs == 1)
            sandbox._slot.machine.retire("the test says so")
