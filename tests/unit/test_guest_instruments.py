"""What the agent does to Trio's instruments."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio._core import _run  # pyright: ignore[reportPrivateUsage]

from trio_sandbox.guest.agent import instruments

TRIO_RUN: Any = _run


def runner() -> Any:
    return TRIO_RUN.GLOBAL_RUN_CONTEXT.runner


async def go_on() -> None:
    """Take all the steps at which Trio looks for instruments."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.001)
        await trio.lowlevel.checkpoint()


def test_trio_looks_into_a_dict_and_goes_on() -> None:
    async def main() -> None:
        assert type(runner().instruments) is not dict, "Trio does so itself, and this can go"
        instruments.look_quickly()
        assert type(runner().instruments) is dict
        await go_on()

    trio.run(main)


def test_instruments_that_are_there_are_heard() -> None:
    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1

    async def main() -> None:
        instruments.look_quickly()
        before = steps.count
        await go_on()
        assert steps.count > before

    steps = Steps()
    trio.run(main, instruments=[steps])


def test_a_trio_that_keeps_them_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        __slots__ = ()

    other = Other()
    monkeypatch.setattr(TRIO_RUN.GLOBAL_RUN_CONTEXT, "runner", other, raising=False)
    instruments.look_quickly()
    assert not hasattr(other, "instruments")
