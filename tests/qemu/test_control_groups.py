"""Control groups for QEMU under a kernel that counts memory and processors, which this machine's need not do: a guest's does."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import trio_sandbox
from trio_sandbox import Sandbox

from . import _control_groups_in_guest

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_LIMIT = str(32 * 2**20)


def _works(place: str, switched_on: list[str]) -> dict[str, Any]:
    return {
        "place": f"/tmp/groups/{place}".rstrip("/"),
        "switched on": switched_on,
        "weight": "50",
        "limits": [_LIMIT, _LIMIT],
        "inside": True,
        "greedy": -signal.SIGKILL,
        "killed": True,
        "modest": 0,
        "machine left": False,
        "left": False,
    }


async def test_a_kernel_that_counts_does_what_is_asked_of_it(sandbox: Sandbox) -> None:
    library = Path(trio_sandbox.__file__).parent
    texts = dict(_control_groups_in_guest.STUBS)
    for name in ("constants.py", "_cgroups.py", "qemu/_control_group.py"):
        texts[f"trio_sandbox/{name}"] = (library / name).read_text()
    texts["look.py"] = Path(_control_groups_in_guest.__file__).read_text()
    for name, text in texts.items():
        path = sandbox.path("groups", name)
        await path.parent.mkdir(parents=True, exist_ok=True)
        await path.write_text(text)
    done = await sandbox.run_process(
        ["python3", "/home/user/groups/look.py"], capture_stdout=True, stderr_to_stdout=True, check=False, user="root"
    )
    assert done.returncode == 0, done.stdout.decode()
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["auto"] == _works("", ["cpu", "memory", "pids"])
    assert seen["delegated"] == seen["again"] == _works("delegated", ["cpu", "memory"])
    assert seen["service"] == _works("service", ["cpu", "memory"])
    # Nothing is left of what can't be used, and it is as it was.
    for name, reason in {
        "busy": "busy/cgroup.subtree_control: Device or resource busy",
        "busy processors": "Operation not supported",
        "threads": "Operation not supported",
        "uncounted": "neither memory nor processors are counted",
        "elsewhere": "a program can't enter a group there",
    }.items():
        assert reason in seen[name]["error"], name
        assert "without processes of its own" in seen[name]["error"]
        assert (seen[name]["left"], seen[name]["switched on"]) == ([], ""), name
