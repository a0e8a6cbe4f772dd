"""What only a real guest shows of its process 1 and its spawner: limits, identity, and what users can't reach."""

from __future__ import annotations

import signal
import time

import pytest
import trio

from trio_sandbox import Sandbox

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


async def lines(sandbox: Sandbox, script: str, user: str | None = None) -> list[str]:
    completed = await sandbox.run_process(
        ["sh", "-c", script], capture_stdout=True, stderr_to_stdout=True, check=False, user=user
    )
    return completed.stdout.decode().splitlines()


async def test_the_world_of_users(sandbox: Sandbox) -> None:
    # Who it is, and that the clock is the host's.
    assert await lines(sandbox, "id -un; id -u; pwd; cat /proc/1/comm") == [
        "user",
        "1000",
        "/home/user",
        "python3.13",
    ]
    (now,) = await lines(sandbox, "date +%s.%N")
    assert abs(float(now) - time.time()) < 5
    # Nothing of the agent's: no files, no devices, no processes; and the spawner is out of reach even for root.
    (found,) = await lines(sandbox, "echo /agent /image /dev/vd* /dev/vport* /dev/kmsg /dev/mem")
    assert found == "/agent /image /dev/vd* /dev/vport* /dev/kmsg /dev/mem"
    for name in ("/agent", "/image"):
        assert (await lines(sandbox, f"ls {name} 2>&1 >/dev/null | grep -c 'No such'")) == ["1"]
    assert await lines(sandbox, "kill -9 1; ls / | grep -c agent; echo alive", user="root") == ["0", "alive"]
    result = await sandbox.run("import os; open(f'/proc/{os.getppid()}/mem', 'rb')")
    assert "PermissionError: [Errno 13] Permission denied: '/proc/1/mem'" in result.stderr
    # No network but the machine's own.
    assert await lines(sandbox, "ls /sys/class/net") == ["lo"]
    result = await sandbox.run(
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "client = socket.create_connection(server.getsockname())\nprint('up')"
    )
    assert (result.stdout, result.stderr) == ("up\n", "")


@pytest.mark.sandbox(memory_mib=256)
async def test_no_virtual_machines_inside_the_guest(sandbox: Sandbox) -> None:
    (flags, *_) = await lines(sandbox, "grep -m 1 ^flags /proc/cpuinfo")
    assert "rdrand" in flags.split()
    assert not {"vmx", "svm"} & set(flags.split())


_TAKE_ALL = "x = []\nwhile True: x.append(bytearray(1 << 20))"


@pytest.mark.sandbox(memory_mib=256)
async def test_a_run_that_was_killed_for_want_of_memory_says_so_and_no_other(sandbox: Sandbox) -> None:
    for code, exit_code, oom in (
        (_TAKE_ALL, 137, True),
        (f"import threading\ndef f():\n    {_TAKE_ALL.replace(chr(10), chr(10) + '    ')}\nt = threading.Thread(target=f); t.start(); t.join()", 137, True),
        # Its children are not it, and what becomes of it later has nothing to do with that.
        (f"import subprocess, sys\nassert subprocess.run([sys.executable, '-c', {_TAKE_ALL!r}]).returncode == -9", 0, False),
        ("import os; os.kill(os.getpid(), 9)", 137, False),
        (f"import os\nif os.fork() == 0:\n    {_TAKE_ALL.replace(chr(10), chr(10) + '    ')}\nassert os.wait()[1] == 9\nos.kill(os.getpid(), 9)", 137, False),
        ("b'x' * (1 << 45)", 1, False),
    ):  # fmt: skip
        result = await sandbox.run(code)
        assert (result.exit_code, result.oom) == (exit_code, oom), code


async def test_a_process_that_takes_all_there_are_leaves_others_their_share(sandbox: Sandbox) -> None:
    # All processes: others keep their share of the processor meanwhile, and the end of the block takes them
    # all, since none can leave its control group.
    async with sandbox.open_process(["sh", "-c", "f() { f & f & sleep 1000; }; echo go; f 2>/dev/null"]) as process:
        assert process.stdout is not None
        assert await process.stdout.receive_some() == b"go\n"
        assert (await sandbox.run("print(2)")).stdout == "2\n"
    assert await lines(sandbox, "echo on") == ["on"]
    assert (await sandbox.run("print(3)")).stdout == "3\n"


@pytest.mark.sandbox(memory_mib=256)
async def test_what_takes_all_memory_little_by_little_is_killed(sandbox: Sandbox) -> None:
    # The kernel alone would let it wait for its own program's pages, again and again, for minutes.
    grow = "l = []\nwhile True: l.append(bytes(50_000))"
    for argv in (["tail", "/dev/zero"], ["python3", "-c", grow]):
        with trio.fail_after(180):
            completed = await sandbox.run_process(argv, check=False)
        assert completed.returncode == -signal.SIGKILL
        assert await lines(sandbox, "echo on") == ["on"]
    # A child of a persistent interpreter goes alone; the interpreter itself with its state.
    with trio.fail_after(180):
        result = await sandbox.run("x=1; tail /dev/zero; echo $? $x", language="shell")
    assert result.stdout == "137 1\n"
    with trio.fail_after(180):
        result = await sandbox.run(grow)
    assert (result.exit_code, result.state_kept) == (137, False)
    assert (await sandbox.run("print(3)")).stdout == "3\n"
