"""Whatever is asked of an agent, cancelled at every point there is: nothing is lost, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests._leaks import cancel_at_every_step
from tests._operations import OPERATIONS
from tests._stage import prepare

from ._sandbox import open_local_sandbox


@pytest.mark.parametrize("name", OPERATIONS)
async def test_cancelled_at_any_point_nothing_is_lost_and_nothing_left(tmp_path: Path, name: str) -> None:
    operation = OPERATIONS[name]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    async with open_local_sandbox() as (sandbox, machine):
        stage = await prepare(sandbox, here, str(there))
        await operation.do(stage)
        await stage.begin()
        # The agent is in this process, so that its steps count, too.
        runs = await cancel_at_every_step(
            lambda: operation.do(stage), check=lambda: operation.check(stage), every_task=True
        )
        assert runs > 10
        await stage.fill_helpers()
        await operation.check(stage)
        assert machine.failure is None
