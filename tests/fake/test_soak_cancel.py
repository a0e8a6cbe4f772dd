"""The sweep of cancellations, with an agent in this process: it takes every step, and finds what is lost or left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests._operations import OPERATIONS, Operation
from tests._stage import Stage, prepare
from tests.soak import cancel
from tests.soak._report import Budget, Report

from ._sandbox import open_local_sandbox


async def sweep(directory: Path, operation: Operation, count: int) -> Report:
    report = Report("cancel", 1)
    (directory / "here").mkdir()
    (directory / "there").mkdir()
    async with open_local_sandbox() as (sandbox, _):
        stage = await prepare(sandbox, directory / "here", str(directory / "there"), serves=False)
        await cancel.sweep([(stage, {"it": operation})], Budget(1, count, None), report)
    return report


async def test_every_step_is_taken(tmp_path: Path) -> None:
    report = await sweep(tmp_path, OPERATIONS["write a file"], 20)
    assert report.failures == []
    assert report.operations == {"it": 20}
    (note,) = report.notes
    done, steps = note.rpartition(" ")[2].split("/")
    assert done == steps


async def _forget(stage: Stage) -> None:
    """Lose a variable, and hope not to be cancelled meanwhile."""
    await stage.sandbox.run("kept = x; del x")
    await trio.lowlevel.checkpoint()
    await stage.sandbox.run("x = kept")


async def _leave(stage: Stage) -> None:
    """Leave a process behind."""
    await stage.sandbox.run("import subprocess; subprocess.Popen(['sleep', '1000'])")


async def _write_in_pieces(stage: Stage) -> None:
    """Write a file that is there before it is whole."""
    path = stage.sandbox.path(stage.there, "new/file")
    await path.write_bytes(b"half")
    await trio.lowlevel.checkpoint()
    await path.unlink()


@pytest.mark.parametrize("do", [_forget, _leave, _write_in_pieces])
async def test_what_is_wrong_is_found(
    tmp_path: Path, do: Callable[[Stage], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests._stage._LOOKS", 3)
    report = await sweep(tmp_path, Operation(do), 40)
    (failure,) = report.failures
    assert failure.startswith("'it', cancelled at step ")
