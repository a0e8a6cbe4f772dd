"""How the command reads and writes its own standard streams, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WRITER = "import trio; from trio_sandbox.cli._streams import write_output; trio.run(write_output, {stream!r}, {data!r})"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_written_whole_and_as_bytes(stream: str) -> None:
    data = bytes(range(256)) * 1000  # more than a pipe holds
    script = f"data = bytes(range(256)) * 1000; {WRITER.format(stream=stream, data='DATA')}".replace("'DATA'", "data")
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert getattr(completed, stream) == data


def test_output_that_nobody_reads_any_more() -> None:
    script = (
        "import trio\n"
        "from trio_sandbox.cli._streams import OutputClosedError, write_output\n"
        "try:\n    trio.run(write_output, 'stdout', b'x')\n"
        "except OutputClosedError:\n    raise SystemExit(77)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        completed = subprocess.run([sys.executable, "-c", script], stdout=writing, check=False)
    finally:
        os.close(writing)
    assert completed.returncode == 77


def test_a_reader_who_does_not_read_does_not_keep_a_cancelled_write() -> None:
    script = (
        "import trio\n"
        "from trio_sandbox.cli._streams import write_output\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(write_output, 'stdout', bytes(2**22))\n"
        "        await trio.testing.wait_all_tasks_blocked()\n"
        "        nursery.cancel_scope.cancel()\n"
        "import trio.testing\n"
        "trio.run(main)\n"
    )
    reading, writing = os.pipe()
    try:
        # Would wait for ever: nobody reads.
        subprocess.run([sys.executable, "-c", script], stdout=writing, check=True, timeout=60)
    finally:
        os.close(reading)
        os.close(writing)


def in_shell(script: str, *, stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which ``$python`` is our interpreter."""
    return subprocess.run(
        ["bash", "-c", script],
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, "python": sys.executable},
    )


LOOK = (
    "import os, sys; from trio_sandbox.cli._descriptors import fill_closed_streams; fill_closed_streams(); "
    "file = open(os.devnull); "
    "print('out', flush=True); print('err', file=sys.stderr); sys.stdin.read(); "
    "[os.write(fd, b'') for fd in (1, 2)]; os.read(0, 0); "
    "sys.exit(0 if file.fileno() > 2 and all(map(os.fstat, (0, 1, 2))) else 9)"
)


@pytest.mark.parametrize(
    ("closed", "stdout", "stderr"),
    [
        ("", b"out\n", b"err\n"),
        ("<&-", b"out\n", b"err\n"),
        (">&-", b"", b"err\n"),
        ("2>&-", b"out\n", b""),
        ("<&- >&- 2>&-", b"", b""),
        ("<&- 2>&-", b"out\n", b""),
    ],
)
def test_streams_that_are_closed_are_nobodys(closed: str, stdout: bytes, stderr: bytes) -> None:
    completed = in_shell(f'"$python" -c "{LOOK}" {closed}')
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, stdout, stderr)


def test_a_stream_that_does_not_block_is_waited_for() -> None:
    script = (
        "import os, trio; from trio_sandbox.cli._streams import write_output, read_input; "
        "os.set_blocking(0, False); os.set_blocking(1, False); "
        "trio.run(write_output, 'stdout', bytes(300_000)); trio.run(write_output, 'stdout', trio.run(read_input))"
    )
    completed = in_shell(f'(sleep 0.3; echo input) | "$python" -c "{script}" | (sleep 0.3; cat)')
    assert completed.stdout == bytes(300_000) + b"input\n"
    assert completed.stderr == b""


def test_a_full_disk_is_told() -> None:
    script = "import trio; from trio_sandbox.cli._streams import write_output; trio.run(write_output, 'stdout', b'x')"
    completed = in_shell(f'"$python" -c "{script}" > /dev/full')
    assert b"No space left on device: 'stdout'" in completed.stderr


@pytest.mark.parametrize("command", ["--help", "run --help", "image list --json", "ps --json"])
def test_a_reader_who_went_away_ends_a_command_without_a_word(command: str) -> None:
    completed = in_shell(f'"$python" -m trio_sandbox {command} | true; echo "${{PIPESTATUS[0]}}"')
    assert completed.stderr == b""
    assert completed.stdout in (b"141\n", b"0\n")  # it may be the faster one
