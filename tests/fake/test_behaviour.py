"""The double that users test with, and an agent in this process, here and on a node: they do what a VM does (tests/qemu/test_behaviour.py)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests._behaviour import Files, Life, run_python
from trio_sandbox import Network, NetworkRule, Sandbox, SandboxConfig, SnapshotError
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

from ._fleet import open_fake_fleet
from ._sandbox import open_local_sandbox


class TestDouble(Files, Life):
    @pytest.fixture
    async def sandbox(self) -> AsyncGenerator[Sandbox]:
        async with open_scripted_sandbox(run_python) as sandbox:
            yield sandbox

    @pytest.fixture
    def place(self) -> str:
        return "/home/user"


class TestAgent(Files):
    @pytest.fixture
    async def sandbox(self) -> AsyncGenerator[Sandbox]:
        async with open_local_sandbox() as (sandbox, _):
            yield sandbox

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        (tmp_path / "guest").mkdir()
        return str(tmp_path / "guest")


class TestNode(TestAgent):
    @pytest.fixture
    async def sandbox(self) -> AsyncGenerator[Sandbox]:
        async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox("python") as sandbox:
            yield sandbox


async def test_files_that_are_there_at_first_and_those_that_the_script_makes() -> None:
    async def count(call: Call) -> Answer:
        lines = call.files["/home/user/data.csv"].count(b"\n")
        call.files["/home/user/out/lines.txt"] = str(lines).encode()
        assert sorted(call.files) == ["/etc/motd", "/home/user/data.csv", "/home/user/out/lines.txt"]
        assert "/home/user" not in call.files
        del call.files["/etc/motd"]
        return Answer(stdout=str(len(call.files)))

    files = {"/home/user/data.csv": b"a\nb\n", "/etc/motd": b""}
    async with open_scripted_sandbox(count, files=files) as sandbox:
        assert (await sandbox.run("count()")).stdout == "2"
        assert await sandbox.path("out/lines.txt").read_text() == "2"
        assert not await sandbox.path("/etc/motd").exists()


async def test_connections_are_those_of_the_policy_and_told() -> None:
    async def answer_with_hello() -> trio.abc.HalfCloseableStream:
        guest, ours = trio.testing.memory_stream_pair()
        await ours.send_all(b"hello")
        await ours.send_eof()
        return guest

    async def ask(call: Call) -> Answer:
        host, port = call.code.split(":")
        try:
            async with await call.connect(host, int(port)) as stream:
                return Answer(stdout=b"".join([data async for data in stream]))
        except OSError as exc:
            return Answer(stderr=str(exc), exit_code=1)

    config = SandboxConfig(network=Network.allow(NetworkRule("service.test", port=7, to=answer_with_hello)))
    async with open_scripted_sandbox(ask, config=config) as sandbox:
        with sandbox.watch_network() as watch:
            assert (await sandbox.run("service.test:7")).stdout == "hello"
            assert "Permission denied: other.test:7" in (await sandbox.run("other.test:7")).stderr
            async with sandbox.fork(1) as (child,):
                assert (await child.run("service.test:7")).stdout == "hello"
            async with sandbox.network(Network.none()):
                assert (await sandbox.run("service.test:7")).exit_code == 1
            await sandbox.hibernate()
            await sandbox.resume()
            assert (await sandbox.run("service.test:7")).stdout == "hello"
        events = [event async for event in watch]
        assert [(event.host, event.port, event.outcome) for event in events][:2] == [
            ("service.test", 7, "closed"),
            ("other.test", 7, "refused by policy"),
        ]
        assert sandbox.network_statistics().connections == 2


async def test_without_a_network_nothing_connects() -> None:
    async def ask(call: Call) -> Answer:
        with pytest.raises(OSError, match=r"unreachable: service\.test:7"):
            await call.connect("service.test", 7)
        return Answer()

    async with open_scripted_sandbox(ask) as sandbox:
        await sandbox.run("1")


async def test_who_makes_files_fail_is_told_their_whole_paths() -> None:
    asked: list[str] = []
    async with open_scripted_sandbox(run_python, before=asked.append) as sandbox:
        await sandbox.path("a").write_text("x")
        await sandbox.path("b").symlink_to("a")
        await sandbox.path("/tmp/c").mkdir()
        async with await sandbox.path("a").open("rb") as file:
            await file.read(1)
    assert asked == ["put /home/user/a", "symlink /home/user/b", "mkdir /tmp/c", "open /home/user/a", "read"]


async def test_failures_at_will() -> None:
    asked: list[str] = []
    failures: dict[str, Exception] = {}

    def before(what: str) -> None:
        asked.append(what)
        if what in failures:
            raise failures[what]

    async with open_scripted_sandbox(run_python, state={"x": 1}, before=before) as sandbox:
        checkpoint = await sandbox.checkpoint()
        failures |= {
            what: SnapshotError("no space") for what in ("checkpoint", "revert", "fork", "hibernate", "resume")
        }
        failures["put /home/user/a"] = OSError(28, "No space left on device")
        for fails in (sandbox.checkpoint, lambda: sandbox.revert(checkpoint), sandbox.hibernate):
            with pytest.raises(SnapshotError, match="no space"):
                await fails()
        with pytest.raises(SnapshotError, match="no space"):
            async with sandbox.fork(1):
                pytest.fail("it was copied")
        with pytest.raises(OSError, match="No space left on device: '/home/user/a'"):
            await sandbox.path("/home/user/a").write_text("x")
        assert (await sandbox.run("print(x)")).stdout == "1\n"
        del failures["hibernate"]
        await sandbox.hibernate()
        with pytest.raises(SnapshotError, match="no space"):
            await sandbox.resume()
        assert sandbox.statistics().hibernated
        failures.clear()
        await sandbox.resume()
        assert (await sandbox.run("print(x)")).stdout == "1\n"
    assert asked == [
        *("checkpoint", "checkpoint", "revert", "hibernate", "fork", "put /home/user/a"),
        *("hibernate", "resume", "resume"),
    ]
