"""A fleet on Ray with a node whose disk is full, in a mount namespace. See `full_disk`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .full_disk import SCENARIOS

APART = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_with_a_full_disk(scenario: str) -> None:
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.fleet.full_disk", scenario], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
