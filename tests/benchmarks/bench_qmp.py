"""Round trips of one QMP command: ours, a bare Trio stream loop, and qemu.qmp's."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from trio_sandbox.bench import Figure
from trio_sandbox.qemu import open_qmp

_COMMAND = "query-jobs"
#: Alternating rounds, so that a machine that gets slower for a while does so for all three.
_ROUNDS = 8
_RUNS = 250


@asynccontextmanager
async def _daemon(directory: str) -> AsyncGenerator[str]:
    """Run a storage daemon; yield the path of its monitor. It serves one client at a time."""
    path = str(Path(directory, "qmp"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4)
        process = await trio.lowlevel.open_process(
            [
                "qemu-storage-daemon",
                f"--chardev=socket,id=qmp,fd={listener.fileno()},server=on,wait=off",
                "--monitor=chardev=qmp",
            ],
            pass_fds=[listener.fileno()],
            process_group=0,
        )

    try:
        yield path
    finally:
        process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()


async def _channel(path: str) -> list[float]:
    samples: list[float] = []
    async with open_qmp(path) as channel:
        for _ in range(_RUNS):
            start = time.perf_counter()
            await channel.execute(_COMMAND)
            samples.append((time.perf_counter() - start) * 1000)
    return samples


async def _bare(path: str) -> list[float]:
    """Do only what can't be left out: encode, send, receive to the end of the line, decode.

    The bytes are those that `QMPChannel` sends: QEMU reads a monitor byte by byte, so a longer
    command would cost the reference time that is not the loop's.
    """
    samples: list[float] = []
    encode = json.JSONEncoder(separators=(",", ":")).encode
    async with await trio.open_unix_socket(path) as stream:

        async def execute(command: str) -> object:
            await stream.send_all(f"{encode({'execute': command, 'id': 0})}\n".encode())
            line = b""
            while not line.endswith(b"\n"):
                line += await stream.receive_some(65536)
            return json.loads(line)["return"]

        await stream.receive_some(65536)
        await execute("qmp_capabilities")
        for _ in range(_RUNS):
            start = time.perf_counter()
            await execute(_COMMAND)
            samples.append((time.perf_counter() - start) * 1000)
    return samples


def _qemu_qmp(path: str) -> list[float]:
    async def run() -> list[float]:
        # By name: type checkers take `qemu` for the tests' package of that name.
        client = importlib.import_module("qemu.qmp").QMPClient()
        samples: list[float] = []
        await client.connect(path)
        for _ in range(_RUNS):
            start = time.perf_counter()
            await client.execute(_COMMAND)
            samples.append((time.perf_counter() - start) * 1000)
        await client.disconnect()
        return samples

    return asyncio.run(run())


async def measure() -> list[Figure]:
    """Measure `QMPChannel.execute` against its two references, in the same run."""
    ours: list[float] = []
    bare: list[float] = []
    qemu_qmp: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        async with _daemon(directory) as path:
            await _channel(path)  # warms up both sides
            for _ in range(_ROUNDS):
                ours += await _channel(path)
                bare += await _bare(path)
                # asyncio has a loop of its own, in a thread: Trio waits idle meanwhile.
                qemu_qmp += await trio.to_thread.run_sync(partial(_qemu_qmp, path))
    median = statistics.median
    return [
        Figure.of("QMPChannel.execute round trip", ours, "ms"),
        Figure.of("bare Trio stream loop round trip", bare, "ms"),
        Figure.of("qemu.qmp execute round trip", qemu_qmp, "ms"),
        Figure(
            name="QMPChannel.execute / bare Trio stream loop",
            value=median(ours) / median(bare),
            unit="x",
            samples=len(ours),
            at_most=1.15,
        ),
        Figure(
            name="QMPChannel.execute / qemu.qmp",
            value=median(ours) / median(qemu_qmp),
            unit="x",
            samples=len(ours),
            at_most=1.0,
        ),
    ]
