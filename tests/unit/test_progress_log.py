"""What the log says of long work."""

from __future__ import annotations

import logging

import pytest

from trio_sandbox import Progress
from trio_sandbox.machines import ProgressLog

STEPS = [
    Progress("image python", "unpacking"),
    Progress("image python", "unpacking", 0.2),
    Progress("system disk", "100 %", 0.5),
    Progress("image python", "unpacking", 0.4),
    Progress("image python", "built", 1.0),
]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_each_new_message_is_logged_and_all_are_passed_on(level: int, caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Progress] = []
    report = ProgressLog(taken.append)
    with caplog.at_level(level, "trio_sandbox.progress"):
        for step in STEPS:
            report(step)
    assert taken == STEPS
    lines = ["image python: unpacking", "system disk: 100 %", "image python: built"]
    assert caplog.messages == (lines if level == logging.INFO else [])
