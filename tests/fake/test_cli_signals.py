"""Ctrl-C in every command that starts machines: the first cleans up, the second ends it at once, whatever the cleanup does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack

import pytest

#: Runs a command whose host opens, and then closes for ever. What it says of that comes on standard error.
_SCRIPT = """
import sys, trio
from contextlib import asynccontextmanager
import trio_sandbox.host, trio_sandbox.qemu

@asynccontextmanager
async def open_endless(*_, **__):
    print("open", file=sys.stderr, flush=True)
    try:
        await trio.sleep_forever()
        yield
    finally:
        print("closing", file=sys.stderr, flush=True)
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

async def examine(*_):
    async with open_endless():
        pass

trio_sandbox.host.open_host = trio_sandbox.qemu.open_runtime = open_endless
from trio_sandbox.cli import _doctor, main
_doctor.examine = examine
print("ready", file=sys.stderr, flush=True)
sys.exit(main(sys.argv[1:]))
"""

COMMANDS = [
    "run -q -c 1",
    "shell -q",
    "mcp -q",
    "bench --quick -q",
    "doctor",
    "image build python",
]


@pytest.fixture(scope="module")
def started() -> Generator[dict[str, subprocess.Popen[str]]]:
    """Run all of them side by side, on a terminal; their imports take longest."""
    with ExitStack() as stack:
        processes: dict[str, subprocess.Popen[str]] = {}
        for command in COMMANDS:
            ours, theirs = os.openpty()
            stack.callback(os.close, ours)
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _SCRIPT, *command.split()],
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            os.close(theirs)
            stack.callback(process.kill)
            processes[command] = process
        yield processes


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_ctrl_c_ends_it_at_once(command: str, started: dict[str, subprocess.Popen[str]]) -> None:
    process = started[command]
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert next(lines) == "ready\n"
    assert next(lines) == "open\n"
    process.send_signal(signal.SIGINT)
    assert next(lines).startswith("trio-sandbox: SIGINT: c")
    assert next(lines) == "closing\n"
    process.send_signal(signal.SIGINT)
    assert list(lines) == []
    assert process.wait() == -signal.SIGINT
