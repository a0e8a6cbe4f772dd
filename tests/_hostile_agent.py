"""A guest whose agent was replaced by a program that says what it likes: in a virtual machine, by the guest's root.

The kernel starts the program, as the handler of a crash, outside the namespaces of the users' processes. It stops the agent, takes
the descriptor of the guest channel's port out of it, and speaks there from then on. Each of `BEHAVIOURS` is what it does when it is
asked for a run.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import attrs
import trio

from tests._leaks import HANG_LIMIT
from trio_sandbox import GuestProtocolError, OutcomeUnknownError, OutputLimitError, Sandbox, SandboxError

#: Where a program takes the port from: in a virtual machine from the agent, which it stops; here its parent gave it one.
_TAKE_OVER = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
SEIZE, INTERRUPT, ALL_THREADS, PIDFD_OPEN, PIDFD_GETFD = 0x4206, 0x4207, 0x40000000, 434, 438
number = next(int(fd) for fd in os.listdir("/proc/1/fd") if "vport" in os.readlink("/proc/1/fd/" + fd))
for thread in map(int, os.listdir("/proc/1/task")):
    libc.ptrace(SEIZE, thread, 0, 0)
    libc.ptrace(INTERRUPT, thread, 0, 0)
    os.waitpid(thread, ALL_THREADS)
port = libc.syscall(PIDFD_GETFD, libc.syscall(PIDFD_OPEN, 1, 0), number, 0)
os.set_blocking(port, True)
# A stream that the host refuses, which nobody closes, tells it that we are here.
os.write(port, (2).to_bytes(4, "big") + b"\\2" + (1000000).to_bytes(4, "big") + b"{}")
"""
_BE_GIVEN = """
import os, sys
port = int(sys.argv[1])
os.write(port, b"\\0\\0\\0\\x0d\\1\\0\\0\\0\\0" b'{"version":1}')
"""
#: What it can say then.
_PROGRAM = """
import json, os, struct, time
HEADER = struct.Struct(">IBI")
HELLO, OPEN, DATA, END, RESET, CREDIT, PING, PONG = range(1, 9)
credit = {}
unread = b""
def frame(kind, stream=0, payload=b""):
    return HEADER.pack(len(payload), kind, stream) + payload
def record(tag, payload):
    return struct.pack(">cI", tag, len(payload)) + payload
def say(data):
    view = memoryview(data)
    while view:
        view = view[os.write(port, view):]
def hear():
    global unread
    while True:
        if len(unread) >= 9:
            length, kind, stream = HEADER.unpack_from(unread)
            if len(unread) >= 9 + length:
                payload, unread = unread[9:9 + length], unread[9 + length:]
                if kind == OPEN:
                    credit[stream] = 262144
                elif kind == CREDIT:
                    credit[stream] = credit.get(stream, 0) + struct.unpack(">I", payload)[0]
                return kind, stream, payload
        unread += os.read(port, 65536)
def send(stream, data):
    # Keeps to the credit, answers pings, and stops where the host gives the stream up.
    while data:
        while not credit.get(stream, 0):
            kind, which, payload = hear()
            if kind == PING:
                say(frame(PONG, 0, payload))
            elif kind == RESET and which == stream:
                return False
            elif kind == DATA and which == stream and b"kill" in payload:
                end(stream)
                return False
        size = min(credit[stream], len(data), 65536)
        say(frame(DATA, stream, data[:size]))
        credit[stream] -= size
        data = data[size:]
    return True
def end(stream):
    over = json.dumps({"finished": {"exit_code": 137, "value": None, "restarted": False, "state_kept": False}})
    say(frame(DATA, stream, record(b"J", over.encode())) + frame(END, stream))
def wait_for(service):
    while True:
        kind, stream, payload = hear()
        if kind == PING:
            say(frame(PONG, 0, payload))
        elif kind == OPEN and json.loads(payload)["service"] == service:
            return stream
def flood(data):
    while True:
        say(data)
"""


def _program(behaviour: Behaviour, beginning: str) -> str:
    return (
        f"{beginning}{_PROGRAM}\nstream = wait_for({behaviour.service!r})\n{behaviour.does}\nwhile True:\n    hear()\n"
    )


@attrs.frozen
class Behaviour:
    """What the program does, and what the host's request must come to."""

    name: str
    does: str
    raises: tuple[type[Exception], ...]
    service: str = "code"


_BROKEN = (GuestProtocolError,)
#: Answers that could be one of ours, but have no end. What is cut off by a limit leaves the machine; the kill is acknowledged.
_ENDLESS = (OutputLimitError,)
BEHAVIOURS = (
    Behaviour("says nothing any more", "time.sleep(1000)", (OutcomeUnknownError,)),
    Behaviour(
        "says half a frame",
        "say(HEADER.pack(60000, DATA, stream) + record(b'O', bytes(59995))[:100])\ntime.sleep(1000)",
        (OutcomeUnknownError,),
    ),
    Behaviour("says anything", "flood(os.urandom(65536))", _BROKEN),
    Behaviour(
        "gives more credit than there is", "say(frame(CREDIT, stream, struct.pack('>I', 2**31 - 1)) * 2)", _BROKEN
    ),
    Behaviour("says more than it has credit for", "say(frame(DATA, stream, bytes(65536)) * 5)", _BROKEN),
    Behaviour("answers pings that there were not", "say(frame(PONG, 0, bytes(8)))", _BROKEN),
    Behaviour("floods with resets", "flood(frame(RESET, stream) * 20000)", (*_BROKEN, OutcomeUnknownError)),
    Behaviour("floods with credit", "flood(frame(CREDIT, stream, struct.pack('>I', 1)) * 20000)", _BROKEN),
    Behaviour("floods with pings", "flood(frame(PING, 0, bytes(8)) * 20000)", _BROKEN),
    Behaviour(
        "opens streams without end",
        "number = 2000000\nwhile True:\n    say(b''.join(frame(OPEN, number + 2 * n, b'{}') + frame(RESET, number + 2 * n)"
        " for n in range(2000)))\n    number += 4000",
        (*_BROKEN, OutcomeUnknownError),  # where it is slow, it is its silence that is noticed
    ),
    Behaviour("prints without end", "while send(stream, record(b'O', bytes(65536))): pass", _ENDLESS),
    Behaviour("prints a byte at a time", "while send(stream, record(b'O', b'x') * 10000): pass", _ENDLESS),
    Behaviour(
        "shows nothing without end",
        """while send(stream, record(b'J', b'{"display":{"mime":"a/b","size":0,"item":0}}') * 1000): pass""",
        _ENDLESS,
    ),
    Behaviour(
        "shows things in huge messages",
        """while send(stream, record(b'J', b'{"display":{"mime":"a/b","size":0,"item":0,"x":[' + b'[],' * 300000 + b'0]}}')): pass""",
        (*_ENDLESS, *_BROKEN),
    ),
    Behaviour("nests a message deep", "send(stream, record(b'J', b'[' * 1000000))", _BROKEN),
    Behaviour(
        "lists names without end",
        "number = 0\n"
        "while send(stream, b''.join(record(b'D', b'\\0'.join(b'f%d' % (number + n + m) for m in range(100)))"
        " for n in range(0, 10000, 100))): number += 10000",
        (OSError,),
        service="file",
    ),
)


async def ask(sandbox: Sandbox, behaviour: Behaviour) -> None:
    """Ask for what the program is waiting for."""
    if behaviour.service == "file":
        await sandbox.path("/").iterdir()
    else:
        await sandbox.run("1")


@contextmanager
def hostile_process(behaviour: Behaviour) -> Generator[int]:
    """Run the program as a process of this machine, for the block; yield the descriptor of the port's other end."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-I", "-S", "-c", _program(behaviour, _BE_GIVEN), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    try:
        yield ours.detach()
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def replaced_agent(sandbox: Sandbox, behaviour: Behaviour) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
    """Replace the sandbox's agent for good; yield what asks for what the program is waiting for."""
    await sandbox.path("/hostile.py", user=0).write_text(_program(behaviour, _TAKE_OVER))
    crash = "echo '|/usr/bin/python3 -I -S /image/hostile.py' > /proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$'"

    async def take_over() -> None:
        with suppress(SandboxError):  # nobody answers it
            crashed = await sandbox.run_process(["sh", "-c", crash], user=0, capture_stderr=True, check=False)
            raise AssertionError(f"the agent is there still: {crashed}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_over)
        with trio.fail_after(HANG_LIMIT):
            channel = sandbox._slot.machine.guest  # pyright: ignore[reportPrivateUsage]
            while not channel.statistics().peer_streams:
                await trio.sleep(0.01)
        yield partial(ask, sandbox, behaviour)
        nursery.cancel_scope.cancel(reason="its answer never comes")
