"""What `trio-sandbox run` refuses before it starts anything."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio_sandbox.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "1", "--memory", "64"], "`memory_mib` must be at least 128 MiB, not 64"),
        (["-c", "1", "--vcpus", "0"], "`vcpus` must be from 1 to"),
        (["/nonexistent/file.py"], "/nonexistent/file.py"),
        (["/"], "Is a directory"),
        ([""], "Is a directory"),
        (["--language", "ruby", "-c", "1"], "there is no language 'ruby'; there are: python, javascript, shell"),
        (["--image", "python", "--language", "javascript", "-c", "1"], "images that have it: node"),
        (["program.ts"], "program.ts"),
        (["-e", "NOT_SET_HERE", "-c", "1"], "-e NOT_SET_HERE: it is not set here"),
        (["--upload", "/no/such/file", "-c", "1"], "/no/such/file"),
        (["--download", "x:/no/such/directory/x", "-c", "1"], "no directory '/no/such/directory'"),
    ],
)
def test_wrong_use_is_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_text_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"\x7fELF\xff\xfe")
    assert main(["run", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"trio-sandbox: {file} is not Python in the encoding that it declares")
    assert said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="may not be somebody else")
def test_a_file_that_may_not_be_read_is_status_2(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("print(1)")
    file.chmod(0)
    # All of it is imported before: who else can't look into root's home has no checkout there.
    script = (
        "import os, sys; from trio_sandbox.cli import _run, main; "
        f"os.seteuid(65534); sys.exit(main(['run', {str(file)!r}]))"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert completed.returncode == 2
    assert b"Permission denied" in completed.stderr
    assert b"Traceback" not in completed.stderr


def test_python_of_standard_input_that_is_no_text_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"# coding: klingon\n1")))
    assert main(["run"]) == 2
    assert "klingon" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "-c", "1"], ["image", "list"], ["template", "list"], ["bench", "--quick"]])
def test_no_cache_directory_is_one_line_and_125(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert main(command) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trio-sandbox: there is no cache directory")
    assert captured.err.count("\n") == 1
