"""A child made by `os.fork` inside a block ends by itself, and its parent does not notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A program whose child does what CHILD says. A task of the parent's waits the while, and it has cleanup to do.
PROGRAM = """
import os, sys, trio, trio.testing
from trio_sandbox.testing import Answer, open_scripted_sandbox

async def answer(call):
    await trio.lowlevel.checkpoint()
    return Answer(stdout="answered")

async def wait_for(fd):
    try:
        await trio.lowlevel.wait_readable(fd)
        print("woken")
    finally:
        print("cleaned up")

async def fork(sandbox):
    pid = os.fork()
    if pid == 0:
        CHILD
    else:
        print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

async def main():
    reading, writing = os.pipe()
    async with open_scripted_sandbox(answer) as sandbox:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for, reading)
            await trio.testing.wait_all_tasks_blocked()
            NURSERY
            os.write(writing, b"x")
        BLOCK
        print((await sandbox.run("x")).stdout)
    print("left")

trio.run(main)
print("end")
"""
#: What a child does, its exit status, and what is said on the standard error, if it is in the block itself.
WAYS = {
    "raises": ("raise ValueError('in the child')", 1, "ValueError: in the child\n"),
    "exits": ("sys.exit(7)", 7, ""),
    "exits well": ("sys.exit()", 0, ""),
    "exits with a message": ("sys.exit('farewell')", 1, "farewell\n"),
    "ends as it should": ("os._exit(5)", 5, ""),
    "waits": ("await trio.sleep(0); print('went on')", 1, "os._exit()"),
    "asks for a run": ("await sandbox.run('x'); print('went on')", 1, "os._exit()"),
    "goes on": ("return", 1, "os._exit()"),
}


def run(child: str, *, nursery: str = "", block: str = "") -> tuple[list[str], str]:
    """Return the lines that the program prints, and what it says on the standard error."""
    program = PROGRAM.replace("CHILD", child).replace("NURSERY", nursery).replace("BLOCK", block)
    ended = subprocess.run(
        # -u: what waits in buffers is written by the child as well.
        [sys.executable, "-u", "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return ended.stdout.split("\n")[:-1], ended.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_child_that_leaves_the_block_ends_there(way: str) -> None:
    child, status, said = WAYS[way]
    lines, errors = run(child, block="await fork(sandbox)")
    assert lines == ["woken", "cleaned up", f"child {status}", "answered", "left", "end"]
    assert said in errors
    assert bool(said) == bool(errors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", ["await fork(sandbox)", "nursery.start_soon(fork, sandbox); await trio.sleep(0)"])
def test_no_other_task_goes_on_in_a_child(way: str, start: str) -> None:
    child, status, _ = WAYS[way]
    lines, errors = run(child, nursery=start)
    # Who leaves a nursery gives control to Trio, which knows of no exit status.
    status = status if "os._exit" in child else 1
    assert lines == [f"child {status}", "woken", "cleaned up", "answered", "left", "end"]
    assert ("os._exit()" in errors) == ("os._exit" not in child)
