"""What the soak's parts take for right and for wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.soak import crash, faults
from tests.soak._crashes import BOUND, CRASHES, Crash, judge
from tests.soak._load import Failure, WrongError
from trio_sandbox import OutcomeUnknownError, SandboxClosedError, SnapshotError


def find(name: str) -> Crash:
    return next(crash for crash in CRASHES if crash.name == name)


class UnsafeClosedError(SandboxClosedError):
    retry_safe = False


@pytest.mark.parametrize(
    ("name", "failure", "complaint"),
    [
        ("QEMU is killed", Failure("run", OutcomeUnknownError("gone"), 11, 9), None),
        ("QEMU is killed", Failure("checkpoint", SnapshotError("gone"), 11, 9), None),
        ("QEMU is killed", Failure("run", SandboxClosedError("gone"), 11, 10.5), None),
        ("QEMU is killed", Failure("run", OutcomeUnknownError("gone"), 9, 8), "before anything happened"),
        ("QEMU is killed", Failure("run", KeyError("x"), 11, 9), "nobody expects"),
        ("QEMU is killed", Failure("run", UnsafeClosedError("gone"), 11, 9), "a retry is not safe"),
        ("QEMU is killed", Failure("run", OutcomeUnknownError("gone"), 11 + BOUND, 9), "it was told after 61 s"),
        ("QEMU is killed", Failure("run", OutcomeUnknownError("gone"), 2 * BOUND, 2 * BOUND - 1), None),
        ("the interpreter is killed", Failure("run", WrongError("it printed 3"), 11, 9), "it printed 3"),
        ("the reaper is killed", Failure("run", OutcomeUnknownError("gone"), 11, 9), "nobody expects"),
    ],
)
def test_what_operations_raise_is_judged(name: str, failure: Failure, complaint: str | None) -> None:
    wrong = judge(find(name), [failure], 10)
    assert bool(wrong) is (complaint is not None)
    assert complaint is None or complaint in wrong[0]


def test_every_crash_comes_before_any_comes_again() -> None:
    planned = [crash_ for crash_, _ in zip(crash._plan(random.Random(1)), range(2 * len(CRASHES) + 6), strict=False)]
    half = len(CRASHES) + 3
    assert set(planned[:half]) == set(planned[half:]) >= set(CRASHES)
    assert planned[:half] != planned[half:]
    assert len({crash_.name for crash_ in CRASHES}) == len(CRASHES)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([["opened", "None", "result"], ["computes", "42\n", "result"]], None),
        ([["opened", "OSError: too many open files", "error"]], None),
        ([["computes", "SandboxClosedError: QEMU has no memory left", "error"]], None),
        ([["opened", "KeyError: 1", "surprise"]], "nobody expects KeyError"),
        ([["computes", "41\n", "result"]], "it is '41"),
    ],
)
def test_what_programs_say_of_themselves_is_judged(entries: list[object], complaint: str | None) -> None:
    wrong = faults.judge("x", 0, b"something\n" + json.dumps(entries).encode(), b"", may_fail=True)
    assert bool(wrong) is (complaint is not None)
    assert complaint is None or complaint in wrong[0]


def test_a_program_that_dies_is_wrong_and_so_is_one_that_fails_where_nothing_limits_it() -> None:
    entries = [["opened", "OSError: too many open files", "error"]]
    assert "nobody expects OSError" in faults.judge("x", 0, json.dumps(entries).encode(), b"")[0]
    assert "it ended with 1: broken" in faults.judge("x", 1, b"[]", b"broken")[0]
    assert "it ended with 0" in faults.judge("x", 0, b"", b"")[0]


def test_the_programs_can_be_started() -> None:
    for module in ("_program", "_victim"):
        command = [sys.executable, "-c", f"import tests.soak.{module}"]
        subprocess.run(command, check=True)
