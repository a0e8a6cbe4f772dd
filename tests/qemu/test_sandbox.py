"""The whole way, from a user's block to the process inside a real guest. A boot takes seconds: few tests, many looks."""

from __future__ import annotations

import os
import resource
import signal
import textwrap
from pathlib import Path

import pytest
import trio

from tests._leaks import nothing_left
from trio_sandbox import (
    HostConfig,
    ImageMissingError,
    MissingProgramError,
    OutcomeUnknownError,
    OutputChunk,
    OutputLimitError,
    RunResult,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    Timeouts,
    UnknownImageError,
    open_host,
    open_sandbox,
)
from trio_sandbox.image import BuiltImage, SystemDisk
from trio_sandbox.qemu import Vm

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


@pytest.fixture
def sandbox_host_config() -> HostConfig:
    return HostConfig(timeouts=Timeouts(interrupt_grace=60))  # however slow the machine is now


@pytest.mark.parametrize("templates", [True, False], ids=["from a template", "booted"])
async def test_the_shapes_that_others_rely_on(templates: bool) -> None:
    with nothing_left():
        async with open_host(HostConfig(templates=templates)) as host:
            async with host.open_sandbox("python", SandboxConfig(memory_mib=256, vcpus=1)) as sandbox:
                assert (await sandbox.run("x = 41")).stdout == ""
                result = await sandbox.run("print(x + 1)")
                assert (result.stdout, result.stderr, result.exit_code) == ("42\n", "", 0)
                assert result.accelerator == host.accelerator.name
                completed = await sandbox.run_process(["uname", "-r"], capture_stdout=True)
                assert (
                    completed.stdout.decode().strip()
                    == (await sandbox.run("import platform; print(platform.release())")).stdout.strip()
                )
                assert completed.stdout.decode().strip() != os.uname().release
                assert host.statistics().sandboxes_open == 1
                assert "qemu" in Path(f"/proc/{sandbox.statistics().qemu_pid}/cmdline").read_text()
            assert sandbox.statistics().qemu_pid is None
            result = await host.run("print('fresh', 'x' in globals())")
            assert result.stdout == "fresh False\n"
            assert (host.statistics().sandboxes_open, host.statistics().sandboxes_opened) == (0, 2)
        with pytest.raises(SandboxClosedError):
            await sandbox.run("print(1)")
        with pytest.raises(SandboxClosedError):
            async with host.open_sandbox():
                pytest.fail("a closed host opens nothing")


async def test_user_code_is_shut_off_from_what_is_ours_and_from_every_network(sandbox: Sandbox) -> None:
    report = await sandbox.run(
        textwrap.dedent("""
            import os, socket
            print(os.getuid(), os.getgid())
            print(sorted(os.listdir("/sys/class/net")))
            try:
                socket.create_connection(("192.0.2.1", 80), timeout=5)
            except OSError as exc:
                print(exc.strerror)
            print(os.path.exists("/agent"))
        """)
    )
    uid, interfaces, reason, agent = report.stdout.splitlines()
    assert uid == "1000 1000"
    assert interfaces == "['lo']"
    assert reason == "Network is unreachable"
    assert agent == "False"
    for directory in ("/agent", "/proc/1/root/agent", "/proc/1/cwd/agent"):
        assert (await sandbox.run_process(["test", "-e", directory], user="root", check=False)).returncode == 1
    for program in ("pip", "python3 -m venv", "bash", "git", "curl"):
        completed = await sandbox.run_process(f"{program} --help", shell=True, check=False, capture_stderr=True)
        assert completed.returncode == 0, f"{program}: {completed.stderr!r}"


async def test_cancelling_stops_whatever_was_started(sandbox: Sandbox) -> None:
    await sandbox.run("kept = 'yes'")
    with trio.move_on_after(1) as scope:
        await sandbox.run("import subprocess; subprocess.run(['sleep', '1000'])")
    assert scope.cancelled_caught
    assert (await sandbox.run_process(["pgrep", "-x", "sleep"], check=False)).returncode == 1
    assert (await sandbox.run("print(kept)")).stdout == "yes\n"

    with trio.move_on_after(1) as scope:
        await sandbox.run_process("trap '' INT TERM; sleep 1000 & sleep 1001", shell=True)
    assert scope.cancelled_caught
    assert (await sandbox.run_process(["pgrep", "-x", "sleep"], check=False)).returncode == 1


async def test_processes_stream_in_both_directions_and_take_signals(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["cat"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in (b"one\n", b"two\n"):
            await process.stdin.send_all(text)
            assert await process.stdout.receive_some() == text
        await process.stdin.aclose()
        assert await process.stdout.receive_some() == b""
        assert await process.wait() == 0

    big = os.urandom(3_000_000)
    completed = await sandbox.run_process(["cat"], stdin=big, capture_stdout=True)
    assert completed.stdout == big

    async with sandbox.open_process(["sleep", "1000"]) as process:
        process.terminate()
        assert await process.wait() == -signal.SIGTERM
    with pytest.raises(FileNotFoundError):
        await sandbox.run_process(["no-such-program"])
    with pytest.raises(PermissionError):
        await sandbox.run_process(["/etc/passwd"])
    root = await sandbox.run_process(["id", "-u"], user="root", capture_stdout=True)
    assert root.stdout == b"0\n"
    where = await sandbox.run_process(
        "pwd; echo $COLOUR >&2", shell=True, cwd="/tmp", env={"COLOUR": "red"}, capture_stdout=True, capture_stderr=True
    )
    assert (where.stdout, where.stderr) == (b"/tmp\n", b"red\n")


async def test_values_displays_and_input_of_a_real_guest(sandbox: Sandbox) -> None:
    code = """
class Picture:
    def _repr_png_(self): return data
import os, sys
data = os.urandom(3_000_000)
print(input(), end='')
display(Picture())
print(sys.stdin.read(), end='')
import asyncio
await asyncio.sleep(0, hash(data))
"""
    result = await sandbox.run(code, stdin=b"first\n" + b"x" * 200_000)
    assert (result.stderr, result.exit_code) == ("", 0)
    assert result.stdout == "first" + "x" * 200_000
    picture, text = result.displays
    assert (picture.mime, len(picture.data), picture.item) == ("image/png", 3_000_000, 0)
    assert (text.mime, text.item, "Picture object" in text.text) == ("text/plain", 0, True)
    same = await sandbox.run("import sys; hash(sys.stdin.buffer.read()) == hash(data)", stdin=picture.data)
    assert (same.value, same.displays) == ("True", ())
    assert "EOFError" in (await sandbox.run("input()")).stderr, "nothing is left of what others were given"
    async with sandbox.stream("for line in sys.stdin: print(line.upper(), end='', flush=True)", stdin=True) as events:
        assert events.stdin is not None
        for word in (b"one", b"two"):
            await events.stdin.send_all(word + b"\n")
            assert await events.__anext__() == OutputChunk("stdout", word.upper() + b"\n")
        await events.stdin.aclose()
        assert isinstance(await events.__anext__(), RunResult)


@pytest.mark.sandbox(max_output_bytes=2**20)
async def test_a_guest_that_prints_for_ever_costs_the_host_no_memory(sandbox: Sandbox) -> None:
    with pytest.raises(OutputLimitError) as caught:
        await sandbox.run("import os\nwhile True: os.write(1, b'x' * 65536)")
    assert caught.value.stdout_bytes == b"x" * 2**20
    assert (await sandbox.run("print('fine')")).stdout == "fine\n"

    # A slow reader makes the run wait, and the whole of it may be of any size.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = 0
    async with sandbox.stream("import os\nfor _ in range(800): os.write(1, b'y' * 65536)") as events:
        async for event in events:
            if isinstance(event, OutputChunk):
                total += len(event.data)
            else:
                assert isinstance(event, RunResult)
                assert event.exit_code == 0
    assert total == 800 * 65536
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 * 1024


def vm_of(sandbox: Sandbox) -> Vm:
    """Give what a user has no business with."""
    machine = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
    assert isinstance(machine, Vm)
    return machine


async def test_an_agent_that_hangs_is_noticed_and_its_machine_ended() -> None:
    config = HostConfig(timeouts=Timeouts(agent_silence=3))
    async with open_sandbox(host_config=config) as sandbox:
        with pytest.raises(OutcomeUnknownError) as caught:
            async with sandbox.stream("print('here')\nimport time; time.sleep(1000)") as events:
                async for _ in events:
                    # The monitor stops the guest's processors: nothing in it answers any more.
                    await vm_of(sandbox).qmp.execute("stop")
        assert "did not answer for 3 s" in str(caught.value.__cause__)


async def test_what_is_wrong_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_image: BuiltImage, system_disk: SystemDisk
) -> None:
    with nothing_left():
        async with open_host(HostConfig(cache_dir=tmp_path / "empty", build_images=False)) as host:
            with pytest.raises(UnknownImageError, match="python"):
                await host.run("print(1)", image="cobol")
            with pytest.raises(ImageMissingError, match="python"):
                await host.run("print(1)")
        assert not list(tmp_path.glob("empty/staging/*"))
    with pytest.raises(ValueError, match="at least 128 MiB, not 64"):
        SandboxConfig(memory_mib=64)
    with nothing_left(), monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(MissingProgramError, match="install the package qemu-system-x86"):
            async with open_host():
                pytest.fail("there is no QEMU")
