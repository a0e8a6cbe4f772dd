"""What results and the errors of failures say."""

from __future__ import annotations

import pickle
import subprocess
from typing import Any

import pytest

from trio_sandbox import Display, ProcessFailedError, RunFailedError, RunResult, SandboxError

TRACEBACK = b'Traceback (most recent call last):\n  File "<run>", line 1\nZeroDivisionError: division by zero\n'


def result(**fields: Any) -> RunResult:
    given: dict[str, Any] = {
        "exit_code": 1,
        "duration": 0.5,
        "restarted": False,
        "state_kept": True,
        "accelerator": "tcg",
    }
    return RunResult(**{**given, **fields})


def test_the_repr_ends_with_the_end_of_stderr_and_is_bounded() -> None:
    shown = repr(
        result(stdout_bytes=b"x" * 10_000 + b"end", stderr_bytes=b"y" * 10_000 + TRACEBACK, value="z" * 10_000)
    )
    assert shown.startswith("RunResult(exit_code=1, ")
    assert "xend'" in shown
    assert shown.endswith(r"ZeroDivisionError: division by zero\n')")
    assert len(shown) < 2000


def test_a_repr_has_nothing_that_a_terminal_obeys() -> None:
    assert repr(result(stdout_bytes=b"\x1b[2J\xff", stderr_bytes="\u202e".encode(), value="\x9b")).isprintable()


def test_a_result_is_ok_if_its_exit_code_is_0() -> None:
    good, bad = result(exit_code=0), result(exit_code=3)
    assert (good.ok, bad.ok) == (True, False)
    assert good.check() is good
    with pytest.raises(RunFailedError) as caught:
        bad.check()
    assert caught.value.result is bad


def test_the_error_has_the_traceback_quoted_and_bounded() -> None:
    error = RunFailedError(result(stderr_bytes=b"\x1b]0;x\x07" * 10_000 + b"\n" + TRACEBACK))
    assert str(error).startswith("the code ended with exit code 1; the end of its stderr:\n| ")
    assert str(error).endswith("| ZeroDivisionError: division by zero")
    assert "\x1b" not in str(error)
    assert len(str(error)) < 50_000
    assert isinstance(error, SandboxError)
    assert not error.retry_safe


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "the code ended with exit code 1; its stderr is empty"),
        ({"exit_code": 139}, "the code ended with exit code 139 (128 + SIGSEGV); its stderr is empty"),
        ({"exit_code": 250}, "the code ended with exit code 250; its stderr is empty"),
        (
            {"exit_code": 137, "oom": True},
            "the code ended with exit code 137 (128 + SIGKILL) (out of memory); its stderr is empty",
        ),
    ],
)
def test_the_error_says_how_it_ended(fields: dict[str, Any], words: str) -> None:
    assert str(RunFailedError(result(**fields))) == words


def test_the_error_of_a_process_is_that_of_subprocess_with_more_to_say() -> None:
    error = ProcessFailedError(2, ["ls", "/x"], None, None, b"ls: \x1b[2J/x: no\n")
    assert isinstance(error, subprocess.CalledProcessError)
    assert (error.returncode, error.cmd, error.output, error.stderr) == (2, ["ls", "/x"], None, None)
    assert str(error) == (
        "the process ['ls', '/x'] in the sandbox ended with exit status 2; the end of its stderr:\n| ls: \\x1b[2J/x: no"
    )
    killed = ProcessFailedError(-9, ["x"], oom=True)
    assert str(killed) == "the process ['x'] in the sandbox was ended by SIGKILL (out of memory); its stderr is empty"


def test_errors_can_be_sent_to_another_process() -> None:
    run = RunFailedError(result(displays=(Display("image/png", b"x"),), stderr_bytes=TRACEBACK))
    copy = pickle.loads(pickle.dumps(run))
    assert (str(copy), copy.result) == (str(run), run.result)
    process = ProcessFailedError(2, ["ls"], b"out", None, b"why", oom=True)
    twin = pickle.loads(pickle.dumps(process))
    assert (str(twin), twin.output, twin.stderr_tail, twin.oom) == (str(process), b"out", b"why", True)
