"""`trio_sandbox.sessions`, with scripted sandboxes that remember one text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests._leaks import cancel_at_every_step
from trio_sandbox import (
    CapacityError,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxHibernatedError,
    SnapshotError,
)
from trio_sandbox.sessions import Session, SessionEnd, Sessions, SessionsConfig, open_sessions, open_sessions_with
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox

NEVER = SessionsConfig(sleep_after=None, close_after=None)


async def remember(call: Call) -> Answer:
    await trio.lowlevel.checkpoint()
    if call.code == "wait":
        await trio.sleep_forever()
    if call.code:
        call.state["text"] = call.code
    return Answer(stdout=call.state.get("text", ""))


@attrs.define(eq=False)
class Place:
    """Where sandboxes are opened: what is open, what was, and what goes wrong."""

    open: Counter[str] = attrs.field(factory=Counter[str])
    opened: list[str] = attrs.field(factory=list[str])
    seconds: float = 0.0
    """How long opening one takes."""
    leaving: float = 0.0
    """How long leaving one takes."""
    fail: Callable[[str], object] = lambda _: None
    """Called with the key before one is opened; may raise."""
    before: Callable[[str, str], object] = lambda _key, _what: None
    """Called with key and what is to be done; may raise."""
    at_end: Callable[[str], object] = lambda _: None
    """Called with the key after one was left; may raise."""

    @asynccontextmanager
    async def open_sandbox(self, key: str) -> AsyncGenerator[Sandbox]:
        self.opened.append(key)
        self.open[key] += 1
        try:
            await trio.sleep(self.seconds)
            self.fail(key)
            async with open_scripted_sandbox(remember, before=lambda what: self.before(key, what)) as sandbox:
                yield sandbox
                await trio.sleep(self.leaving)
                self.at_end(key)
        finally:
            self.open[key] -= 1

    def sessions(self, limits: SessionsConfig = NEVER) -> AbstractAsyncContextManager[Sessions]:
        return open_sessions_with(self.open_sandbox, limits)

    def none_left(self) -> bool:
        return not any(self.open.values())


@pytest.fixture
def place() -> Place:
    return Place()


async def run(session: Session, code: str = "") -> str:
    return (await session.sandbox.run(code)).stdout


async def use(sessions: Sessions, key: str, code: str = "") -> tuple[str, bool, SessionEnd | None]:
    """Lease, and tell what the sandbox remembers, and what was said of it."""
    async with sessions.lease(key) as session:
        return await run(session, code), session.fresh, session.ended


def fail_with(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> None:
        raise error

    return fail


async def holder(sessions: Sessions, key: str, *, task_status: trio.TaskStatus[trio.Event]) -> None:
    """Have a lease until the event is set."""
    done = trio.Event()
    async with sessions.lease(key):
        task_status.started(done)
        await done.wait()


# --- One sandbox for each key ---


async def test_tasks_of_one_key_find_the_same_sandbox_and_others_another(
    autojump_clock: MockClock, place: Place
) -> None:
    async with place.sessions() as sessions:
        assert await use(sessions, "ada", "x") == ("x", True, None)
        assert await use(sessions, "ada") == ("x", False, None)
        assert await use(sessions, "bob") == ("", True, None)
        assert place.open == {"ada": 1, "bob": 1}
        assert repr(sessions) == "<trio_sandbox.Sessions: 2 sandboxes, 2 awake, 0 leased>"
        assert sessions.remembers("ada")
        assert not sessions.remembers("eve")
    assert place.none_left()


async def test_tasks_that_ask_at_once_wait_for_one_creation(autojump_clock: MockClock, place: Place) -> None:
    place.seconds = 10
    found: list[tuple[Sandbox, bool]] = []

    async def ask() -> None:
        async with sessions.lease("ada") as session:
            found.append((session.sandbox, session.fresh))
            await trio.sleep(1)

    async with place.sessions() as sessions:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert trio.current_time() == 11  # nor do they wait for each other
    assert place.opened == ["ada"]
    assert len({sandbox for sandbox, _ in found}) == 1
    assert sum(fresh for _, fresh in found) == 1


async def test_a_creation_that_fails_is_told_to_all_who_wait_and_tried_again_by_the_next(
    autojump_clock: MockClock, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.seconds = 1
    place.fail = fail_with(CapacityError("no memory"))
    async with place.sessions() as sessions:

        async def expect_failure() -> None:
            with pytest.raises(CapacityError, match=r"^no memory$"):
                await use(sessions, "ada")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(expect_failure)
        assert (place.opened, sessions.statistics().failed, sessions.statistics().sessions) == (["ada"], 1, 0)
        place.fail = lambda _: None
        assert await use(sessions, "ada", "x") == ("x", True, None)
    assert caplog.records == []  # whoever asked was told


async def test_a_creation_that_fails_when_nobody_waits_is_logged(
    autojump_clock: MockClock, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.seconds = 2
    place.fail = fail_with(ValueError("wrong"))
    async with place.sessions() as sessions:
        with trio.move_on_after(1):
            await use(sessions, "ada")
        await trio.sleep(2)
        assert not sessions.remembers("ada")
    assert [record.getMessage() for record in caplog.records] == ["a sandbox could not be opened: wrong"]


async def test_who_is_cancelled_while_it_opens_leaves_it_to_the_others_and_to_the_next(
    autojump_clock: MockClock, place: Place
) -> None:
    place.seconds = 10
    async with place.sessions() as sessions:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, sessions, "ada", "x")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert place.open["ada"] == 1
        assert await use(sessions, "ada") == ("", True, None)  # the first to have it
        assert (place.opened, trio.current_time()) == (["ada"], 10)


async def test_what_the_first_to_ask_has_in_its_context_is_not_for_the_sandbox(
    autojump_clock: MockClock, place: Place
) -> None:
    variable = ContextVar("variable", default="of nobody")
    seen: list[str] = []
    place.fail = lambda _: seen.append(variable.get())
    async with place.sessions() as sessions:
        variable.set("of the first")
        await use(sessions, "ada")
    assert seen == ["of nobody"]


# --- Shared and exclusive ---


async def test_an_exclusive_lease_is_the_only_one_and_nobody_overtakes(autojump_clock: MockClock, place: Place) -> None:
    order: list[str] = []

    async def lease(name: str, *, exclusive: bool) -> None:
        async with sessions.lease("ada", exclusive=exclusive):
            order.append(f"{name} begins")
            await trio.sleep(1)
            order.append(f"{name} ends")

    async with place.sessions() as sessions, trio.open_nursery() as nursery:
        for name, exclusive in (("a", False), ("b", False), ("c", True), ("d", False), ("e", False)):
            nursery.start_soon(partial(lease, name, exclusive=exclusive))
            await trio.sleep(0.1)
        await use(sessions, "bob")  # others are not concerned
        assert order == ["a begins", "b begins"]
        await trio.sleep(10)
    assert order[2:6] == ["a ends", "b ends", "c begins", "c ends"]
    assert {*order[6:8]} == {"d begins", "e begins"}


async def test_a_task_does_not_wait_for_itself(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions() as sessions, trio.open_nursery() as nursery:
        async with sessions.lease("ada"):
            with pytest.raises(RuntimeError, match="would wait for itself"):
                async with sessions.lease("ada", exclusive=True):
                    pytest.fail("it was leased")

            async def wait() -> None:
                async with sessions.lease("ada", exclusive=True):
                    pass

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            async with sessions.lease("ada"):  # though another waits in front, for this very task
                pass
        async with sessions.lease("ada", exclusive=True):
            with pytest.raises(RuntimeError, match="would wait for itself"):
                async with sessions.lease("ada"):
                    pytest.fail("it was leased")
        await use(sessions, "ada")


# --- Sleep, and the end ---


async def test_what_nobody_leases_sleeps_then_ends_and_the_next_is_told(
    autojump_clock: MockClock, place: Place
) -> None:
    async with place.sessions(SessionsConfig(sleep_after=10, close_after=100)) as sessions:
        async with sessions.lease("ada") as session:
            await run(session, "x")
            await trio.sleep(1000)  # a lease keeps it awake, idle or not
            assert not session.sandbox.statistics().hibernated
            sandbox = session.sandbox
        await trio.sleep(9)
        assert await use(sessions, "ada") == ("x", False, None)
        await trio.sleep(11)
        assert sandbox.statistics().hibernated
        with pytest.raises(SandboxHibernatedError):
            await sandbox.run("without a lease")
        numbers = sessions.statistics()
        assert (numbers.sessions, numbers.awake, numbers.slept, numbers.woken) == (1, 0, 1, 0)
        assert await use(sessions, "ada") == ("x", False, None)
        await trio.sleep(101)
        assert place.none_left()
        assert sessions.remembers("ada")
        assert await use(sessions, "ada") == ("", True, "expired")
        assert await use(sessions, "ada") == ("", False, None)  # it is told once
        numbers = sessions.statistics()
        assert (numbers.opened, numbers.slept, numbers.woken, numbers.expired) == (2, 2, 1, 1)


async def test_one_in_which_something_runs_stays_awake_and_is_tried_again(
    autojump_clock: MockClock, place: Place
) -> None:
    tried: list[float] = []

    def refuse(_key: str, what: str) -> None:
        if what == "hibernate":
            tried.append(trio.current_time())
            if len(tried) < 3:
                raise trio.BusyResourceError("processes run")

    place.before = refuse
    async with place.sessions(SessionsConfig(sleep_after=10, close_after=None)) as sessions:
        await use(sessions, "ada", "x")
        await trio.sleep(1000)
        assert tried == [10, 20, 30]
        assert await use(sessions, "ada") == ("x", False, None)


async def test_while_somebody_leases_it_it_is_to_stay_awake(place: Place) -> None:
    async with place.sessions() as sessions:
        async with sessions.lease("ada") as session:
            slot = session.sandbox._slot
            assert slot.stays_awake()
        assert not slot.stays_awake()
        async with sessions.lease("ada"), sessions.lease("ada"):
            assert slot.stays_awake()


async def test_one_that_is_wanted_while_it_falls_asleep_is_there_again(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions(SessionsConfig(sleep_after=10, close_after=None)) as sessions:
        await use(sessions, "ada", "x")

        def want(_key: str, what: str) -> None:
            if what == "hibernate" and not wanted:
                wanted.append(what)
                nursery.start_soon(use, sessions, "ada")

        wanted: list[str] = []
        place.before = want
        async with trio.open_nursery() as nursery:
            await trio.sleep(11)
        assert wanted
        assert await use(sessions, "ada") == ("x", False, None)


async def test_one_that_does_not_wake_up_says_so_and_sleeps_on(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions(SessionsConfig(sleep_after=10)) as sessions:
        await use(sessions, "ada", "x")
        await trio.sleep(11)

        def refuse(_key: str, what: str) -> None:
            if what == "resume":
                raise SnapshotError("no memory")

        place.before = refuse

        async def expect_failure() -> None:
            with pytest.raises(SnapshotError, match="no memory"):
                await use(sessions, "ada")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_failure)
            nursery.start_soon(expect_failure)
        assert sessions.statistics().awake == 0
        place.before = lambda _key, _what: None
        assert await use(sessions, "ada") == ("x", False, None)


async def test_one_whose_vm_died_is_replaced_and_the_next_is_told(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions() as sessions:
        await use(sessions, "ada", "x")
        async with sessions.lease("ada") as session:
            checkpoint = await session.sandbox.checkpoint()
            session.sandbox._slot.machine.retire("killed")
            assert session.sandbox.failure is not None
            async with trio.open_nursery() as nursery:  # others get another at once
                done = await nursery.start(holder, sessions, "ada")
                done.set()
            assert place.open["ada"] == 2
            await session.sandbox.revert(checkpoint)  # who has it may bring it back, for itself
            assert await run(session) == "x"
        await trio.testing.wait_all_tasks_blocked()
        assert place.open["ada"] == 1
        async with sessions.lease("ada") as session:
            assert (await run(session), session.fresh) == ("", False)
            session.sandbox._slot.machine.retire("killed")
        assert await use(sessions, "ada") == ("", True, "died")
        assert sessions.statistics().died == 2


async def test_a_death_in_a_run_is_its_runs_and_the_next_lease_has_another(
    autojump_clock: MockClock, place: Place
) -> None:
    async with place.sessions() as sessions:
        async with sessions.lease("ada") as session, trio.open_nursery() as nursery:

            async def expect_failure() -> None:
                with pytest.raises(OutcomeUnknownError):
                    await run(session, "wait")

            nursery.start_soon(expect_failure)
            await trio.testing.wait_all_tasks_blocked()
            session.sandbox._slot.machine.retire("killed")
        assert await use(sessions, "ada") == ("", True, "died")


async def test_a_user_may_have_put_it_to_sleep(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions() as sessions:
        async with sessions.lease("ada") as session:
            await run(session, "x")
            await session.sandbox.hibernate()
        assert sessions.statistics().awake == 0
        assert await use(sessions, "ada") == ("x", False, None)


# --- Limits ---


async def test_a_lease_wakes_up_what_another_has_put_to_sleep(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions() as sessions, sessions.lease("ada") as session:
        await run(session, "ada's")
        await session.sandbox.hibernate()
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - it has to be another task
            nursery.start_soon(use, sessions, "ada", "another's")
        assert await run(session) == "another's"
        numbers = sessions.statistics()
        assert (numbers.awake, numbers.woken, numbers.leased) == (1, 1, 1)


async def test_who_wakes_it_up_again_leaves_it_awake(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions(SessionsConfig(max_awake=1)) as sessions:
        async with sessions.lease("ada") as session:
            await session.sandbox.hibernate()
            with trio.move_on_after(1):
                async with sessions.lease("bob"), sessions.lease("ada"):
                    raise AssertionError("there is room for one of them")
            await session.sandbox.resume()
        assert sessions.statistics().awake == 1


@asynccontextmanager
async def open_nothing(_key: str) -> AsyncGenerator[None]:
    yield None


def return_five(_key: str) -> int:
    return 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(open_nothing, "must yield a Sandbox, not None"), (return_five, "must return what `async with` takes, .*, not 5")],
)
async def test_a_function_that_opens_no_sandbox_is_told_so(
    autojump_clock: MockClock, wrong: Callable[[str], Any], message: str
) -> None:
    async with open_sessions_with(wrong) as sessions:
        with pytest.raises(TypeError, match=message):
            async with sessions.lease("ada"):
                pass


async def test_the_one_that_was_not_used_for_longest_makes_room(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions(attrs.evolve(NEVER, max_sessions=2)) as sessions:
        for key in ("a", "b", "a", "c"):
            await use(sessions, key, key)
            await trio.sleep(1)
        assert +place.open == {"a": 1, "c": 1}
        assert await use(sessions, "b") == ("", True, "evicted")
        assert await use(sessions, "c") == ("c", False, None)
        assert sessions.statistics().evicted == 2


async def test_the_one_that_was_not_used_for_longest_sleeps_for_another(
    autojump_clock: MockClock, place: Place
) -> None:
    async with place.sessions(attrs.evolve(NEVER, max_awake=2)) as sessions:
        for key in ("a", "b", "c", "d"):
            await use(sessions, key, key)
            await trio.sleep(1)
            assert sessions.statistics().awake <= 2
        for key in ("a", "b", "c", "d"):
            assert await use(sessions, key) == (key, False, None)
            await trio.sleep(1)
        numbers = sessions.statistics()
        assert (numbers.sessions, numbers.awake, numbers.woken, numbers.evicted) == (4, 2, 4, 0)


async def test_where_none_can_sleep_the_oldest_ends(autojump_clock: MockClock, place: Place) -> None:
    busy = {"a", "b", "c"}

    def refuse(key: str, what: str) -> None:
        if what == "hibernate" and key in busy:
            raise trio.BusyResourceError("processes run")

    place.before = refuse
    async with place.sessions(attrs.evolve(NEVER, max_awake=2)) as sessions:
        for key in ("a", "b", "c"):
            await use(sessions, key, key)
            await trio.sleep(1)
        assert await use(sessions, "b") == ("b", False, None)
        assert sessions.statistics().evicted == 1
        busy.remove("c")
        assert await use(sessions, "a", "a") == ("a", True, "evicted")  # and "c" sleeps
        assert sessions.statistics().slept == 1


async def test_who_finds_all_leased_waits_in_the_order_of_the_calls(autojump_clock: MockClock, place: Place) -> None:
    served: list[str] = []

    async def lease(key: str) -> None:
        async with sessions.lease(key):
            served.append(key)
            await trio.sleep(1)

    async with (
        place.sessions(attrs.evolve(NEVER, max_sessions=2)) as sessions,
        trio.open_nursery() as nursery,
    ):
        first, second = [await nursery.start(holder, sessions, key) for key in "ab"]
        for key in ("c", "d", "e"):
            nursery.start_soon(lease, key)
            await trio.sleep(1)
        with trio.move_on_after(5) as scope:
            await use(sessions, "f")
        assert scope.cancelled_caught  # the caller's deadline
        assert sessions.statistics().tasks_waiting_lease == 3
        await use(sessions, "a")  # which needs no room
        second.set()
        await trio.sleep(100)
        assert served == ["c", "d", "e"]
        assert place.open["a"] == 1
        first.set()


async def test_who_finds_all_leased_is_refused_where_that_is_wanted(autojump_clock: MockClock, place: Place) -> None:
    limits = attrs.evolve(NEVER, max_sessions=3, max_awake=2, when_full="refuse")
    async with place.sessions(limits) as sessions, trio.open_nursery() as nursery:
        await use(sessions, "sleeper")
        first, second = [await nursery.start(holder, sessions, key) for key in "ab"]
        for key in ("c", "sleeper"):
            with pytest.raises(CapacityError, match="there are 3 sandboxes, 2 of them awake") as info:
                await use(sessions, key)
            assert info.value.retry_safe
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await use(sessions, "sleeper") == ("", False, None)
        second.set()


async def test_one_that_nobody_waits_for_any_more_makes_room_while_it_opens(
    autojump_clock: MockClock, place: Place
) -> None:
    place.seconds = 1000
    async with place.sessions(attrs.evolve(NEVER, max_sessions=1)) as sessions:
        with trio.move_on_after(1):
            await use(sessions, "a")
        place.seconds = 1
        assert await use(sessions, "b") == ("", True, None)
        assert trio.current_time() == 2
        assert +place.open == {"b": 1}


# --- Closing ---


async def test_closing_one_ends_it_whoever_has_it(autojump_clock: MockClock, place: Place) -> None:
    async with place.sessions() as sessions:
        await sessions.close("nobody")
        await use(sessions, "ada", "x")
        async with sessions.lease("ada") as session:
            await sessions.close("ada")
            assert place.none_left()
            with pytest.raises(SandboxClosedError):
                await run(session)
        assert await use(sessions, "ada") == ("", True, "closed")
        assert sessions.statistics().closed == 1


async def test_closing_one_that_opens_has_those_who_wait_get_another(autojump_clock: MockClock, place: Place) -> None:
    place.seconds = 10
    async with place.sessions() as sessions, trio.open_nursery() as nursery:
        nursery.start_soon(use, sessions, "ada")
        await trio.sleep(5)
        await sessions.close("ada")
        await trio.sleep(20)
        assert (place.opened, place.open["ada"]) == (["ada", "ada"], 1)


async def test_at_the_end_of_the_block_all_end_together_and_who_waits_is_told(
    autojump_clock: MockClock, place: Place
) -> None:
    place.seconds = place.leaving = 3
    async with trio.open_nursery() as nursery:

        async def expect_closed(key: str) -> None:
            with pytest.raises(SandboxClosedError, match=r"the block of open_sessions\(\) has exited"):
                await use(sessions, key)

        async with place.sessions(attrs.evolve(NEVER, max_sessions=21)) as sessions:
            for number in range(20):
                nursery.start_soon(use, sessions, str(number))  # noqa: ASYNC111 - it is over when the block is left
            await trio.sleep(4)
            await nursery.start(holder, sessions, "0")  # noqa: ASYNC111 - which it is to survive
            nursery.start_soon(expect_closed, "opening")
            await trio.testing.wait_all_tasks_blocked()
            assert sum(place.open.values()) == 21
        assert place.none_left()
        assert trio.current_time() == 4 + 3
        assert sessions.statistics().sessions == 0
        await expect_closed("later")
        nursery.cancel_scope.cancel()


async def test_an_end_that_takes_too_long_is_cancelled(
    autojump_clock: MockClock, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.leaving = 1000
    async with place.sessions(attrs.evolve(NEVER, close_grace=5)) as sessions:
        await use(sessions, "ada")
        await sessions.close("ada")
        assert trio.current_time() == 5
    assert "a sandbox was not closed within 5 seconds" in caplog.text


async def test_a_cancelled_block_gives_ends_their_time(autojump_clock: MockClock, place: Place) -> None:
    place.leaving = 3
    saved: list[str] = []
    place.at_end = saved.append
    with trio.move_on_after(10):
        async with place.sessions() as sessions:
            await use(sessions, "ada")
            await trio.sleep_forever()
    assert (saved, trio.current_time()) == (["ada"], 13)


async def test_an_end_that_fails_is_logged_and_other_mistakes_come_out_of_the_block(
    autojump_clock: MockClock, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.at_end = fail_with(OSError("no space"))

    async def end_one() -> None:
        async with place.sessions() as sessions:
            await use(sessions, "ada")
            await sessions.close("ada")
            await use(sessions, "ada")

    await end_one()
    assert caplog.messages == ["a sandbox did not end well: no space"] * 2
    place.at_end = fail_with(ZeroDivisionError("a mistake"))
    with pytest.raises(ZeroDivisionError, match=r"^a mistake$"):
        await end_one()
    assert place.none_left()


# --- Cancellation ---


@pytest.mark.parametrize("every_task", [False, True])
async def test_cancelled_at_any_step_nothing_is_left(autojump_clock: MockClock, place: Place, every_task: bool) -> None:
    place.seconds = 1

    async def everything() -> None:
        async with place.sessions(
            SessionsConfig(sleep_after=1, close_after=10, max_sessions=2, max_awake=1)
        ) as sessions:
            await use(sessions, "a", "a")
            async with sessions.lease("b", exclusive=True):
                pass
            if not every_task:
                await trio.sleep(2)
                assert await use(sessions, "a") == ("a", False, None)
                await use(sessions, "c")
                await sessions.close("c")

    def check() -> None:
        assert place.none_left()

    assert await cancel_at_every_step(everything, check=check, every_task=every_task) > 10


@pytest.mark.parametrize("keys", ["a", "ab"])
async def test_a_task_that_is_cancelled_at_any_step_leaves_the_session_to_others(
    autojump_clock: MockClock, place: Place, keys: str
) -> None:
    """Of one lease; the others go on, and find what was there."""
    limits = SessionsConfig(sleep_after=1, close_after=None, max_awake=1)
    async with place.sessions(limits) as sessions:
        await use(sessions, "a", "a")
        await use(sessions, "b", "b")

        async def work() -> None:
            for key in keys:
                assert (await use(sessions, key))[0] == key
                await trio.sleep(2)

        async def check() -> None:
            numbers = sessions.statistics()
            assert (numbers.sessions, numbers.leased, numbers.tasks_waiting_lease) == (2, 0, 0)
            for key in "ab":
                assert await use(sessions, key) == (key, False, None)

        checking: Callable[[], Awaitable[None]] = check
        assert await cancel_at_every_step(work, check=checking) > 3


# --- All at once ---


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_tasks_do_limits_hold_and_nothing_is_lost_untold(
    autojump_clock: MockClock, place: Place, seed: int
) -> None:
    """Tasks lease, write, are cancelled, close and kill at random; what each key's sandbox must remember is known."""
    dice = random.Random(seed)
    limits = SessionsConfig(sleep_after=3, close_after=20, max_sessions=4, max_awake=2)
    written: dict[str, str] = {}
    place.seconds = 0.5

    def refuse(_key: str, what: str) -> None:
        if what == "hibernate" and dice.random() < 0.3:
            raise trio.BusyResourceError("processes run")
        if what == "resume" and dice.random() < 0.1:
            raise SnapshotError("no memory")

    place.before = refuse

    async def work(sessions: Sessions) -> None:
        for number in range(8):
            key = dice.choice("abcdef")
            with trio.move_on_after(dice.expovariate(0.2)), suppress(SnapshotError):
                async with sessions.lease(key, exclusive=True) as session:
                    numbers = sessions.statistics()
                    assert numbers.awake <= 2
                    assert numbers.sessions <= 4
                    assert sum(place.open.values()) <= 4
                    expected = written.get(key, "")
                    assert await run(session) == ("" if session.fresh else expected)
                    assert session.fresh >= (session.ended is not None)
                    assert session.fresh or session.ended is None
                    if session.fresh:
                        assert (session.ended is not None) == (key in written)
                        written[key] = ""
                    await trio.sleep(dice.random())
                    text = f"{number} of {seed}"
                    written[key] = text
                    with trio.CancelScope(shield=True):
                        await run(session, text)
                    if dice.random() < 0.1:
                        session.sandbox._slot.machine.retire("killed")
            await trio.sleep(dice.random() * 5)

    async with place.sessions(limits) as sessions:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(work, sessions)
        await trio.sleep(30)
        numbers = sessions.statistics()
        assert (numbers.sessions, numbers.awake, numbers.leased, numbers.tasks_waiting_lease) == (0, 0, 0, 0)
        assert numbers.opened == numbers.expired + numbers.evicted + numbers.died
        assert place.none_left()


# --- Arguments ---


@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), (b"ada", TypeError), (None, TypeError), (("a", 1), TypeError)]
)
async def test_what_is_no_key_is_refused(
    autojump_clock: MockClock, place: Place, key: object, error: type[Exception]
) -> None:
    async with place.sessions() as sessions:
        with pytest.raises(error, match="`key` must"):
            async with sessions.lease(key):  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
                pytest.fail("it was leased")
        with pytest.raises(error, match="`key` must"):
            await sessions.close(key)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="`exclusive` must be True or False"):
            async with sessions.lease("ada", exclusive=1):  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
                pytest.fail("it was leased")
    assert place.opened == []


class OneKind:
    """A host that opens scripted sandboxes."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, SandboxConfig | None]] = []

    @asynccontextmanager
    async def open_sandbox(
        self, image: object = "python", config: SandboxConfig | None = None, **_fields: object
    ) -> AsyncGenerator[Sandbox]:
        self.asked.append((image, config))
        async with open_scripted_sandbox(remember, config=config) as sandbox:
            yield sandbox


async def test_a_host_opens_what_all_sessions_are() -> None:
    host = OneKind()
    async with open_sessions(host, "node", memory_mib=512) as sessions:
        assert sessions.config == SessionsConfig()
        await use(sessions, "ada")
    assert host.asked == [("node", SandboxConfig(memory_mib=512))]


@pytest.mark.parametrize(
    ("open_wrong", "error", "message"),
    [
        (lambda: open_sessions(OneKind(), "python", hibernate_after=60), ValueError, "sleep_after"),
        (lambda: open_sessions(OneKind(), "python", limits={"max_sessions": 3}), TypeError, "`limits` must be"),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        (lambda: open_sessions("python"), TypeError, "`host` must have"),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        (lambda: open_sessions(OneKind(), 3), TypeError, "image"),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        (lambda: open_sessions_with("python"), TypeError, "`open_sandbox` must be a function"),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_opened(
    open_wrong: Callable[[], AbstractAsyncContextManager[Sessions]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        async with open_wrong():
            pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("sleep_after", 0, ValueError),
        ("close_after", "1", TypeError),
        ("max_sessions", 0, ValueError),
        ("max_awake", 0, ValueError),
        ("when_full", "fail", ValueError),
        ("close_grace", -1, ValueError),
    ],
)
def test_limits_that_can_not_be(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{field}` must"):
        SessionsConfig(**{field: value})  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
