"""What SIGINT ends of a run that waits for other processes: the statements after that do not run, and the state is kept."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator

import pytest
import trio

from trio_sandbox import OutputChunk
from trio_sandbox.guest.process_status import read_status

from ._agent import Host, Ran, open_agent
from ._sandbox import open_local_sandbox

#: Code that waits for something that says "go"; it would print "went on" if it went on.
PYTHON = {
    "os.system": "os.system('echo go; exec sleep 1000')",
    "os.system in a loop": "for _ in range(3): os.system('echo go; exec sleep 1000')",
    "os.system of what ignores SIGINT": "os.system('trap \"\" INT; echo go; sleep 2; echo')",
    "os.system of what handles SIGINT": "os.system('trap \"exit 0\" INT; echo go; while true; do sleep 0.1; done')",
    "os.system of a pipeline": "os.system('(echo go >&2; sleep 1000) 2>&1 >&2 | cat')",
    "os.system by its other name": "import posix; posix.system('echo go; exec sleep 1000')",
    "os.system in a thread": (
        "import threading; t = threading.Thread(target=os.system, args=('echo go; exec sleep 1000',)); t.start(); t.join()"
    ),
    "subprocess": "subprocess.run('echo go; exec sleep 1000', shell=True)",
    "subprocess of what ignores SIGINT": "subprocess.run('trap \"\" INT; echo go; sleep 2; echo', shell=True)",
    "subprocess, waiting": "p = subprocess.Popen('echo go; exec sleep 1000', shell=True); p.wait()",
    "output of a pipeline": "subprocess.check_output('(echo go >&2; sleep 1000) | cat', shell=True, stderr=sys.stdout)",
    "os.popen": "os.popen('echo go >&2; exec sleep 1000').read()",
    "os.spawn": "os.spawnlp(os.P_WAIT, 'sh', 'sh', '-c', 'echo go; exec sleep 1000')",
    "asyncio": "p = await asyncio.create_subprocess_shell('echo go; exec sleep 1000'); await p.wait()",
}
JAVASCRIPT = {
    "execSync": "try { execSync('echo go; exec sleep 1000', { stdio: 'inherit' }) } catch {}",
    "spawnSync": "spawnSync('sh', ['-c', 'echo go; exec sleep 1000'], { stdio: 'inherit' })",
}
SHELL = {
    "a command": "(echo go; exec sleep 1000)",
    "a pipeline": "(echo go >&2; exec sleep 1000) 2>&1 >&2 | cat",
    "a substitution": "x=$(echo go >&2; exec sleep 1000)",
    "a loop": "for i in 1 2 3; do echo go; sleep 1000; done",
    "a function": "f() { echo go; sleep 1000; echo went on; }; f",
    "a list": "sh -c 'echo go; exec sleep 1000' || true",
    "waiting": "(echo go; exec sleep 1000) & wait",
}


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


async def interrupt(host: Host, code: str, language: str) -> Ran:
    async with host.open_run(code, language=language) as run:
        while b"go\n" not in b"".join(run.output.values()):
            assert await run.receive()
        await run.interrupt()
        return await run.finish()


async def test_python_does_not_go_on_after_what_it_waited_for(host: Host) -> None:
    await host.run("import asyncio, os, subprocess, sys; x = 1")
    for name, code in PYTHON.items():
        result = await interrupt(host, f"{code}\nprint('went on')", "python")
        assert (result.exit_code, result.state_kept) == (130, True), name
        assert "went on" not in result.stdout, name
        assert result.stderr.endswith("KeyboardInterrupt\n"), name
    assert (await host.run("print(x)")).stdout == "1\n"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js, as the image `node` has it")
async def test_javascript_does_not_go_on_after_what_it_waited_for(host: Host) -> None:
    await host.run("var { execSync, spawnSync } = require('child_process'); let x = 1", language="javascript")
    for name, code in JAVASCRIPT.items():
        result = await interrupt(host, f"{code}\nconsole.log('went on')", "javascript")
        assert (result.exit_code, result.state_kept) == (130, True), name
        assert "went on" not in result.stdout, name
    assert (await host.run("console.log(x)", language="javascript")).stdout == "1\n"


async def test_shell_does_not_go_on_after_what_it_waited_for(host: Host) -> None:
    await host.run("state=kept", language="shell")
    for name, code in SHELL.items():
        result = await interrupt(host, f"{code}; echo went on\necho went on", "shell")
        assert (result.exit_code, result.state_kept) == (130, True), name
        assert "went on" not in result.stdout, name
    assert (await host.run("echo $state", language="shell")).stdout == "kept\n"


# --- Interrupts that come just before Python goes to sleep ---

#: Ways of it to sleep, each of which it wakes up from to see to its signals only if one comes while it sleeps.
ASLEEP = ["lock.acquire()", "time.sleep(1000)", "os.read(quiet, 1)", "thread.join()", "wait()"]
# A SIGINT that another thread takes is as one that comes just before the sleep: Python notes it, and the main thread does not wake up.
SLEEPING = """
import os, signal, threading, time
lock = threading.Lock()
lock.acquire()
quiet, _ = os.pipe()
reader, writer = os.pipe()
thread = threading.Thread(target=os.read, args=(reader, 1))
thread.start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
try:
    print(os.getpid(), flush=True)
    {}
    print('went on')
finally:
    os.write(writer, b'x')
    thread.join()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
"""


@pytest.mark.parametrize("sleep", ASLEEP)
async def test_an_interrupt_that_comes_just_before_a_sleep_ends_that(sleep: str) -> None:
    async with open_local_sandbox() as (sandbox, _):
        await sandbox.run("x = 1")
        async with sandbox.stream(SLEEPING.format(sleep), functions={"wait": trio.sleep_forever}) as events:
            async for event in events:
                assert isinstance(event, OutputChunk)
                pid = int(event.data)
                while read_status(f"{pid}/task/{pid}")[0] != b"S":
                    await trio.lowlevel.checkpoint()
                break
        (stopped,) = sandbox.recent_runs()[-1:]
        assert (stopped.exit_code, "went on" in stopped.stdout) == (130, False)
        result = await sandbox.run("x")
        assert (result.value, result.restarted) == ("1", False)


# --- `os.system` ---


async def test_commands_come_to_what_they_come_to_in_python(host: Host) -> None:
    code = """
import os, pickle, signal
print(os.system('exit 3'), os.system('kill -9 $$'), os.system(b'echo from a command'), os.system('-no-such-option 2>/dev/null'))
print(os.system(''), os.system('no-such-command 2>/dev/null'), pickle.loads(pickle.dumps(os.system)) is os.system)
os.environ['SAID'] = 'by the environment'
os.system('echo said $SAID')
def reap(*_):
    try: print(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError: print('nothing left to wait for')
signal.signal(signal.SIGCHLD, reap)
print(os.system('exit 4'))
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
# Its signals are as they are in any process: that it ends itself by SIGINT works.
print(os.system('kill -INT $$'))
for wrong in ('a\\0b', 5):
    try: os.system(wrong)
    except (TypeError, ValueError) as exc: print(type(exc).__name__)
"""
    result = await host.run(code)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "from a command",
        f"{3 << 8} 9 0 {127 << 8}",
        f"0 {127 << 8} True",
        "said by the environment",
        "nothing left to wait for",
        str(4 << 8),
        "2",
        "ValueError",
        "TypeError",
    ]
