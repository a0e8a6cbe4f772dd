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
    assert await lines(sandbox, "id -un; id -u; pwd") == ["user", "1000", "/home/user"]
    (now,) = await lines(sandbox, "date +%s.%N")
    assert abs(float(now) - time.time()) < 5
    # Nothing of the agent's: no files, no devices, no processes; and the spawner is out of reach even for root.
    (found,) = await lines(sandbox, "echo /agent /image /dev/vd* /dev/vport* /dev/kmsg /dev/mem")
    assert found == "/agent /image /dev/vd* /dev/vport* /dev/kmsg /dev/mem"
    for name in ("/agent", "/image"):
        assert (await lines(sandbox, f"ls {name} 2>&1 >/dev/null | grep -c 'No such'")) == ["1"]
    assert await lines(sandbox, "kill -9 1; ls / | grep -c agent; echo alive", user="root") == ["0", "alive"]
    result = await sandbox.run("import os; open(f'/proc/{os.getppid()}/mem', 'rb')")
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/proc/1/mem'" in result.stderr
    assert await lines(sandbox, "cat /proc/1/comm", user="root") == ["python3.13"]
    # No network but the machine's own.
    assert await lines(sandbox, "ls /sys/class/net") == ["lo"]
    result = await sandbox.run(
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "client = socket.create_connection(server.getsockname())\nprint('up')"
    )
    assert (result.stdout, result.stderr) == ("up\n", "")


#: What the kernel is told before any code of the users' runs; files below /proc/sys.
_RESTRICTIONS = {
    "fs/protected_fifos": "2",
    "fs/protected_hardlinks": "1",
    "fs/protected_regular": "2",
    "fs/protected_symlinks": "1",
    "kernel/dmesg_restrict": "1",
    "kernel/kptr_restrict": "1",
    "kernel/modules_disabled": "1",
    "kernel/perf_event_paranoid": "3",
    "kernel/sysrq": "0",
    "kernel/unprivileged_bpf_disabled": "1",
    "kernel/unprivileged_userns_clone": "0",
    "kernel/yama/ptrace_scope": "1",
}
_LOOK_AT_RIGHTS = "grep -E '^(Cap|NoNewPrivs)' /proc/self/status"
_NO_RIGHTS = [f"Cap{name}:\t{0:016}" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] + ["NoNewPrivs:\t1"]
#: Stops a process that is to be traced by another one, which is not its parent.
_ATTACH = "import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace(16, int(sys.argv[1]), None, None) != 0)"
#: Traces a child of its own, as a debugger does.
_TRACE_CHILD = """
import ctypes, os
libc = ctypes.CDLL(None)
if (pid := os.fork()) == 0:
    libc.ptrace(0, 0, None, None)  # PTRACE_TRACEME
    os.execv("/bin/true", ["true"])
_, status = os.waitpid(pid, 0)
print(os.WIFSTOPPED(status), libc.ptrace(7, pid, None, None), os.waitpid(pid, 0)[1])  # PTRACE_CONT
"""


async def test_the_kernel_keeps_users_from_each_other_and_from_what_they_do_not_need(sandbox: Sandbox) -> None:
    assert await lines(sandbox, f"cd /proc/sys; cat {' '.join(_RESTRICTIONS)}", "root") == [*_RESTRICTIONS.values()]
    # A process of the users' can never get rights, whatever it executes; root's has all.
    assert await lines(sandbox, _LOOK_AT_RIGHTS) == _NO_RIGHTS
    assert (await sandbox.run(_LOOK_AT_RIGHTS, language="shell")).stdout.splitlines() == _NO_RIGHTS
    result = await sandbox.run(f"import subprocess; subprocess.run({_LOOK_AT_RIGHTS!r}, shell=True)")
    assert result.stdout.splitlines() == _NO_RIGHTS
    rights = dict(line.split() for line in await lines(sandbox, _LOOK_AT_RIGHTS, "root"))
    assert rights["NoNewPrivs:"] == "0"
    assert (
        rights["CapBnd:"]
        == rights["CapEff:"]
        == f"{2 ** (int((await lines(sandbox, 'cat /proc/sys/kernel/cap_last_cap'))[0]) + 1) - 1:016x}"
    )
    # A program that would give root's rights gives none.
    await lines(sandbox, "cp /bin/id /usr/bin/rooted; chmod u+s /usr/bin/rooted", "root")
    assert await lines(sandbox, "stat -c %a /usr/bin/rooted; rooted -u") == ["4755", "1000"]
    # Neither user namespaces nor modules.
    assert await lines(sandbox, "unshare --user true; echo $?") == [
        "unshare: unshare failed: Operation not permitted",
        "1",
    ]
    assert await lines(sandbox, "unshare --user true; echo $?", "root") == ["0"]
    assert await lines(sandbox, "echo 0 > /proc/sys/kernel/modules_disabled; echo $?", "root") != ["0"]


async def test_what_users_do_with_their_own_processes(sandbox: Sandbox) -> None:
    async with (
        sandbox.open_process(["sleep", "1001"]),
        sandbox.open_process(["sleep", "1002"], user="root"),
    ):
        # They see and trace their own.
        assert await lines(sandbox, "ps -A -o args | grep ^sleep; pgrep -c sleep") == ["sleep 1001", "1"]
        assert await lines(sandbox, "ps -A -o args | grep ^sleep", "root") == ["sleep 1001", "sleep 1002"]
        assert (await sandbox.run(_TRACE_CHILD)).stdout == "True 0 0\n"
        # A debugger may have what it started, and root's all.
        attach = f"python3 -c '{_ATTACH}' $(pgrep -f '^sleep 1001'); echo $?"
        assert await lines(sandbox, attach) == ["1"]
        assert await lines(sandbox, attach, "root") == ["0"]
    # Root may write to what they have in /tmp.
    await sandbox.run("open('/tmp/theirs', 'w').write('theirs')")
    theirs = sandbox.path("/tmp/theirs", user="root")
    async with await theirs.open("a") as file:
        await file.write(" and ours")
    assert await theirs.read_text() == "theirs and ours"
    # Its descriptors are open to itself, and to the tools that look.
    assert await lines(sandbox, "ls -l /proc/self/fd/0 > /dev/null && readlink /proc/self/exe") == ["/usr/bin/readlink"]


@pytest.mark.sandbox(guest_namespaces=True)
async def test_user_namespaces_for_who_asks(sandbox: Sandbox) -> None:
    # Root of its own, with a /proc of its own.
    look = "unshare --user --map-root-user --mount --pid --fork --mount-proc sh -c 'id -u; echo $$; cat /proc/1/comm'"
    assert await lines(sandbox, look) == ["0", "1", "sh"]
    assert await lines(sandbox, _LOOK_AT_RIGHTS) == _NO_RIGHTS
    # So in whatever goes on from it.
    async with sandbox.fork(1) as (copy,):
        assert await lines(copy, "unshare --user true; echo $?") == ["0"]


@pytest.mark.sandbox(memory_mib=256)
async def test_no_virtual_machines_inside_the_guest(sandbox: Sandbox) -> None:
    (flags, *_) = await lines(sandbox, "grep -m 1 ^flags /proc/cpuinfo")
    assert "rdrand" in flags.split()
    assert not {"vmx", "svm"} & set(flags.split())


_TAKE_ALL = "x = []\nwhile True: x.append(bytearray(1 << 20))"

#: Its child is killed for want of memory, and it itself in the same instant, by its own hand.
_LOSE_A_CHILD = f"""
import os
if os.fork() == 0:
    {_TAKE_ALL.replace(chr(10), chr(10) + "    ")}
assert os.wait()[1] == 9
os.kill(os.getpid(), 9)
"""


@pytest.mark.sandbox(memory_mib=256)
async def test_a_run_that_was_killed_for_want_of_memory_says_so_and_no_other(sandbox: Sandbox) -> None:
    for code, exit_code, oom in (
        (_TAKE_ALL, 137, True),
        (f"import threading\ndef f():\n    {_TAKE_ALL.replace(chr(10), chr(10) + '    ')}\nt = threading.Thread(target=f); t.start(); t.join()", 137, True),
        # Its children are not it, and what becomes of it later has nothing to do with that.
        (f"import subprocess, sys\nassert subprocess.run([sys.executable, '-c', {_TAKE_ALL!r}]).returncode == -9", 0, False),
        ("import os; os.kill(os.getpid(), 9)", 137, False),
        *[(_LOSE_A_CHILD, 137, False)] * 4,
        ("b'x' * (1 << 45)", 1, False),
    ):  # fmt: skip
        result = await sandbox.run(code)
        assert (result.exit_code, result.oom) == (exit_code, oom), code


@pytest.mark.sandbox(memory_mib=256)
async def test_a_process_that_was_killed_for_want_of_memory_says_so_and_no_other(sandbox: Sandbox) -> None:
    take_all = f"python3 -c '{_TAKE_ALL}'"
    for script, oom in ((f"exec {take_all}", True), (f"{take_all}; kill -9 $$", False), ("kill -9 $$", False)):
        # With a neighbour that lives on, and one that ends at the same time.
        async with sandbox.open_process(["sleep", "1000"]) as other:
            async with sandbox.open_process(["sh", "-c", script]) as process:
                assert await process.wait() == -signal.SIGKILL
                assert process.oom is oom
            other.send_signal(signal.SIGKILL)
            assert await other.wait() == -signal.SIGKILL
            assert not other.oom


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
