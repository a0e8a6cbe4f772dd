"""A fleet over a network that is cut: three network namespaces, no Ray, and virtual machines only where a guest connects. See `two_hosts`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .two_hosts import CONNECTIONS, SCENARIOS

APART = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


@pytest.mark.parametrize("scenario", [*SCENARIOS, *CONNECTIONS])
def test_over_a_router(scenario: str) -> None:
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.fleet.two_hosts", scenario], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
