"""What `trio-sandbox run` does before it starts anything, and how it writes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio_sandbox import constants
from trio_sandbox.cli import main
from trio_sandbox.cli._run import read_source

WRITER = "import trio; from trio_sandbox.cli._run import write_output; trio.run(write_output, {stream!r}, {data!r})"


class Terminal(io.TextIOWrapper):
    """Standard input that says whether it is a terminal."""

    def __init__(self, data: bytes, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(data))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_code_on_the_command_line_is_taken_as_it_is() -> None:
    assert read_source("print('é')", None) == "print('é')"


def test_a_file_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    file = tmp_path / "latin.py"
    file.write_bytes("# coding: latin-1\nprint('é')\n".encode("latin-1"))
    assert read_source(None, str(file)) == "# coding: latin-1\nprint('é')\n"


@pytest.mark.parametrize("file", [None, "-"])
def test_standard_input_is_read(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(b"print(1)\r\n", terminal=False))
    assert read_source(None, file) == "print(1)\n"


def test_reading_from_a_terminal_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(b"1", terminal=True))
    assert read_source(None, None) == "1"
    assert "Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "1", "--memory", "64"], "`memory_mib` must be at least 128 MiB, not 64"),
        (["-c", "1", "--vcpus", "0"], "`vcpus` must be from 1 to"),
        (["/nonexistent/file.py"], "/nonexistent/file.py"),
        (["/"], "Is a directory"),
    ],
)
def test_wrong_use_is_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_text_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"\x7fELF\xff\xfe")
    assert main(["run", str(file)]) == 2
    assert "trio-sandbox: " in capsys.readouterr().err


def test_a_file_that_is_too_long_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long.py"
    file.write_bytes(b"#" * (constants.MAXIMUM_REQUEST_BYTES + 1))
    assert main(["run", str(file)]) == 2
    assert f"at most {constants.MAXIMUM_REQUEST_BYTES}" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_written_whole_and_as_bytes(stream: str) -> None:
    data = bytes(range(256)) * 1000  # more than a pipe holds
    script = f"data = bytes(range(256)) * 1000; {WRITER.format(stream=stream, data='DATA')}".replace("'DATA'", "data")
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert getattr(completed, stream) == data


def test_output_that_nobody_reads_any_more() -> None:
    script = (
        "import trio\n"
        "from trio_sandbox.cli._run import OutputClosedError, write_output\n"
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
        "from trio_sandbox.cli._run import write_output\n"
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
