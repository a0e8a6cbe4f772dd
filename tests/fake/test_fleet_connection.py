"""A program's connection to Ray, which fleets share; Ray itself is played here."""

from __future__ import annotations

import threading

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import FleetError
from trio_sandbox.fleet import _connection
from trio_sandbox.fleet._connection import connected


@attrs.define(eq=False)
class FakeRay:
    """One that can be connected to once at a time, as the real one."""

    inits: list[object] = attrs.field(factory=list[object])
    up: bool = False
    failure: BaseException | None = None
    gate: threading.Event = attrs.field(factory=threading.Event)

    def __attrs_post_init__(self) -> None:
        self.gate.set()

    def is_initialized(self) -> bool:
        return self.up

    def init(self, *, address: str, **_: object) -> None:
        self.inits.append(address)
        self.gate.wait()
        if self.up:
            raise RuntimeError("ray.init was called twice")
        if self.failure is not None:
            raise self.failure
        self.up = True

    def shutdown(self) -> None:
        self.gate.wait()
        self.up = False


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("address", [None, "auto"])
async def test_fleets_that_are_open_at_once_share_it_and_the_last_ends_it(address: str | None, first: int) -> None:
    ray, ends = FakeRay(), [trio.Event(), trio.Event()]
    ray.gate.clear()
    inside = 0

    async def use(end: trio.Event) -> None:
        nonlocal inside
        async with connected(ray, address):
            inside += 1
            await end.wait()
            assert ray.up, "it is there for as long as the block"
            inside -= 1

    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(use, end)
        await wait_until(lambda: len(ray.inits) == 1)
        ray.gate.set()
        await wait_until(lambda: inside == 2)
        ends[first].set()
        await wait_until(lambda: inside == 1)
        async with connected(ray, None):
            pass
        assert ray.up
        ends[1 - first].set()
    assert not ray.up
    assert ray.inits == [address or "local"]


async def test_the_programs_own_connection_is_used_and_stays() -> None:
    ray = FakeRay(up=True)
    async with connected(ray, None), connected(ray, None):
        pass
    assert ray.up
    with pytest.raises(ValueError, match=r"connected to Ray already: leave `address` out"):
        async with connected(ray, "auto"):
            pass


async def test_one_program_is_not_in_two_clusters() -> None:
    ray = FakeRay()
    async with connected(ray, "one:1"):
        with pytest.raises(ValueError, match="connected to Ray already, at 'one:1': leave `address` out"):
            async with connected(ray, "two:1"):
                pass
        assert ray.up
    async with connected(ray, "two:1"):
        pass
    assert ray.inits == ["one:1", "two:1"]


@pytest.mark.parametrize(
    ("address", "failure", "kind", "text"),
    [
        (None, RuntimeError("no room"), FleetError, "Ray could not be started: no room"),
        ("far:1", ConnectionError("no route"), FleetError, "Ray could not be connected to: no route"),
        ("far:1", ValueError("no address"), ValueError, "no address"),
        (None, SystemExit("1"), SystemExit, "1"),
    ],
)
async def test_one_that_does_not_come_about(
    address: str | None, failure: BaseException, kind: type[BaseException], text: str
) -> None:
    ray = FakeRay(failure=failure)
    with pytest.raises(kind, match=text):
        async with connected(ray, address):
            pass
    ray.failure = None
    async with connected(ray, address):
        assert ray.up
    assert not ray.up


async def test_cancelled_while_it_is_made_it_is_ended() -> None:
    ray = FakeRay()
    ray.gate.clear()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def use() -> None:
                async with connected(ray, None):
                    await trio.sleep_forever()

            nursery.start_soon(use)
            await wait_until(lambda: len(ray.inits) == 1)
            scope.cancel()
            ray.gate.set()
    assert not ray.up


async def test_one_that_somebody_else_has_ended_is_made_again() -> None:
    ray = FakeRay()
    async with connected(ray, None):
        ray.shutdown()
        async with connected(ray, None):
            assert ray.up
        assert ray.up, "the first fleet is open still"
    assert not ray.up


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    ray = FakeRay()
    with pytest.raises(KeyError, match="ours"):
        async with connected(ray, None):
            raise KeyError("ours")
    assert not ray.up


async def test_a_ray_that_does_not_let_go_is_left_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_connection, "_END_PATIENCE", 0.1)
    ray = FakeRay()
    async with connected(ray, None):
        ray.gate.clear()
    assert ray.up
    assert "Ray does not answer" in caplog.text
    ray.gate.set()
    await wait_until(lambda: not ray.up)
