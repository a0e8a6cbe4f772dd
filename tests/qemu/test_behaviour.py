"""What tests/fake/test_behaviour.py asks of the double, asked of VMs: copies of one, so that not each of them costs a start."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import trio

from tests._behaviour import Files, Life
from tests._leaks import HANG_LIMIT
from trio_sandbox import open_sandbox

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("kind", [Files, Life])
async def test_a_vm_does_what_the_double_does(kind: type[Files | Life], tmp_path: Path) -> None:
    tests = [name for name in dir(kind) if name.startswith("test_")]
    assert len(tests) > 5
    with trio.fail_after(HANG_LIMIT):
        async with open_sandbox("python") as original:
            for name in tests:
                directory = tmp_path / name
                directory.mkdir()
                test = getattr(kind(), name)
                async with original.fork(1) as (sandbox,):
                    given = {"sandbox": sandbox, "place": "/home/user", "tmp_path": directory}
                    try:
                        await test(**{each: given[each] for each in inspect.signature(test).parameters})
                    except Exception as exc:
                        exc.add_note(f"in {kind.__name__}.{name}")
                        raise
