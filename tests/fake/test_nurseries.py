"""Services outlive the body, end in reverse order, and don't show their nursery."""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing

from tests._interrupts import InterruptAt
from trio_sandbox._nurseries import Services, hide_nursery, open_services


class Recorder:
    """Services that write down what happens to them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def serve(self, name: str, *, task_status: trio.TaskStatus[str]) -> None:
        task_status.started(name.upper())
        try:
            await trio.sleep_forever()
        finally:
            self.log.append(f"{name} ends")


async def test_a_cancelled_body_is_through_with_its_cleanup_before_a_service_ends() -> None:
    recorder = Recorder()
    with trio.CancelScope() as scope:
        async with open_services("test") as services:
            assert await services.start(recorder.serve, "first") == "FIRST"
            assert await services.start(recorder.serve, "second") == "SECOND"
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    for _ in range(10):
                        await trio.lowlevel.checkpoint()
                recorder.log.append("body ends")
    assert recorder.log == ["body ends", "second ends", "first ends"]


async def test_an_error_of_the_body_comes_out_bare() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError):
        async with open_services("test") as services:
            await services.start(recorder.serve, "one")
            raise KeyError("body")
    assert recorder.log == ["one ends"]


async def test_an_error_of_a_service_cancels_the_body_and_comes_out_bare() -> None:
    async def fail(go: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await go.wait()
        raise OSError("service")

    go = trio.Event()
    with pytest.raises(OSError, match="service"):
        async with open_services("test") as services:
            await services.start(fail, go)
            go.set()
            await trio.sleep_forever()


async def test_two_errors_come_out_together_with_the_owners_name() -> None:
    async def fail_at_the_end(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("service")

    with pytest.RaisesGroup(OSError, KeyError) as caught:
        async with open_services("open_thing()") as services:
            await services.start(fail_at_the_end)
            raise KeyError("body")
    assert caught.value.__notes__ == ["open_thing(): more than one of its tasks failed"]


async def test_a_group_of_the_body_passes_whole() -> None:
    with pytest.RaisesGroup(KeyError, ValueError):
        async with open_services("test"):
            raise ExceptionGroup("mine", [KeyError(), ValueError()])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_wins_over_other_errors(interrupt: BaseException) -> None:
    error = OSError()
    with pytest.raises(type(interrupt)) as raised, hide_nursery("test"):
        raise BaseExceptionGroup("both", [error, interrupt])
    assert raised.value is interrupt
    cause = cast("BaseExceptionGroup[BaseException]", interrupt.__cause__)
    assert cause.exceptions == (error,)


async def test_an_interrupt_has_no_more_to_say_than_where_it_came() -> None:
    """A traceback of all of our blocks, each with a group of its own, would be some two hundred lines."""

    @asynccontextmanager
    async def open_three() -> AsyncGenerator[None]:
        async with open_services("one"), open_services("two"), open_services("three"):
            yield

    with pytest.raises(KeyboardInterrupt) as raised:
        async with open_three():
            raise KeyboardInterrupt
    lines = traceback.format_exception(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert len(lines) == 3  # the headline, this function, and the exception


async def test_before_it_has_started_a_service_is_the_callers_to_cancel() -> None:
    async def slow(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep_forever()

    async with open_services("test") as services:
        with trio.CancelScope() as scope:
            scope.cancel()
            await services.start(slow)
        assert scope.cancelled_caught


async def test_cancelled_at_every_step_of_starting_and_serving_everything_ends() -> None:
    """Also where the cancellation and started() come in the same step of the scheduler."""

    async def serve(checkpoints: int, *, task_status: trio.TaskStatus[None]) -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        task_status.started()
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def cancel_later(scope: trio.CancelScope, steps: int) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def body(services: Services, checkpoints: int) -> None:
        await services.start(serve, checkpoints)
        await services.start(serve, 0)
        await trio.sleep_forever()

    for _ in range(20):  # the scheduler shuffles
        for steps in range(8):
            for checkpoints in range(3):
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as scope:
                        # Cancelling a scope that was left already does nothing.
                        nursery.start_soon(cancel_later, scope, steps)  # noqa: ASYNC111
                        async with open_services("test") as services:
                            await body(services, checkpoints)
                    assert scope.cancelled_caught


def run_interrupted(*numbers: int) -> tuple[list[str], int, bool]:
    """Return what two services and their body wrote down, the steps of the main task, and whether it was interrupted."""
    recorder = Recorder()
    instrument = InterruptAt(*numbers)

    async def serve(name: str, *, task_status: trio.TaskStatus[str]) -> None:
        try:
            await trio.sleep(1)
            task_status.started(name)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            recorder.log.append(f"{name} ends")

    async def main() -> None:
        instrument.main = trio.lowlevel.current_task()
        with trio.fail_after(100):
            async with open_services("outer") as outer:
                await outer.start(serve, "first")
                await outer.start(serve, "second")
                async with open_services("inner") as inner:
                    await inner.start(serve, "third")
                    await trio.sleep(1)

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[instrument])
    except KeyboardInterrupt:
        return recorder.log, instrument.steps, True
    return recorder.log, instrument.steps, False


def test_ctrl_c_at_any_step_ends_every_service_in_order() -> None:
    log, steps, interrupted = run_interrupted()
    ends = ["third ends", "second ends", "first ends"]
    assert (log, interrupted) == (ends, False)
    for first in range(1, steps + 1):
        for second in range(first + 1, steps + 1):
            log, _, interrupted = run_interrupted(first, second)
            assert interrupted, (first, second)
            assert log == ends[len(ends) - len(log) :], (first, second)


async def test_ctrl_c_is_never_raised_in_a_service_itself() -> None:
    async def serve(*, task_status: trio.TaskStatus[bool]) -> None:
        task_status.started(trio.lowlevel.currently_ki_protected())
        await trio.sleep_forever()

    async with open_services("test") as services:
        assert await services.start(serve)
