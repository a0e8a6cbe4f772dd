"""An agent on this machine, in this process, without a virtual machine: for tests. It confines nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from trio.testing import memory_stream_pair

from . import agent
from .children import Children

# As a package of its own, since importing `trio_sandbox` would import all of it into every fork.
_SPAWNER = (
    "import socket, sys; sys.path.insert(0, sys.argv[1]); from guest.spawner import spawner; "
    "spawner.main(socket.socket(fileno=int(sys.argv[2])), spawner.Confinement(root=sys.argv[3] or None, "
    "cgroup=sys.argv[4] or None, user=int(sys.argv[5]) if sys.argv[5] else None))"
)


def start_local_spawner(
    *, root: str | None = None, cgroup: str | None = None, user: int | None = None
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a spawner as a process of its own; return the agent's socket to it.

    Closing the socket ends it. The arguments are those of `spawner.Confinement`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    package = Path(__file__).parents[2]
    with theirs:
        arguments = [str(package), str(theirs.fileno()), root or "", cgroup or "", "" if user is None else str(user)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SPAWNER, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
    return ours, process


@asynccontextmanager
async def open_local_agent(
    *, root: str | None = None, cgroup: str | None = None, user: int | None = None
) -> AsyncGenerator[trio.abc.Stream]:
    """Run an agent in the background and yield the host's end of its connection.

    Leaving the block ends the agent and whatever was started through it. The arguments are those of
    `spawner.Confinement`; without any, processes run as you, in your file system.
    """
    sock, process = start_local_spawner(root=root, cgroup=cgroup, user=user)
    try:
        host, guest = memory_stream_pair()
        children = Children(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(agent.serve, user=user), guest, children)  # noqa: ASYNC113  who talks to it waits for its hello
            yield host
            await trio.aclose_forcefully(host)
    finally:
        sock.close()
        # It kills what is left and ends at once; nobody else could be asked to reap it.
        process.wait()
