"""The switch of the guest's side of its network, and what is done of it before a template is saved."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any
from unittest import mock

import pytest
import trio

from trio_sandbox.guest.agent.network import steering
from trio_sandbox.guest.agent.network.service import NetworkService
from trio_sandbox.guest.agent.snapshot import SnapshotService

from ._wire import open_pair


class FakeChildren:
    def __init__(self) -> None:
        self.resolvers: list[str | None] = []

    async def set_resolver(self, address: str | None) -> None:
        await trio.lowlevel.checkpoint()
        self.resolvers.append(address)


class FakeSteering:
    """Counts how often it was made, and what it was switched to; *fails* the first so many times."""

    fails = 0
    made: list[FakeSteering] = []  # noqa: RUF012

    def __init__(self) -> None:
        if FakeSteering.fails:
            FakeSteering.fails -= 1
            raise OSError(errno.ENOSYS, "an old kernel")
        self.switched: list[bool] = []
        FakeSteering.made.append(self)

    def switch(self, *, on: bool) -> None:
        self.switched.append(on)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> FakeChildren:
    monkeypatch.setattr(steering, "Steering", FakeSteering)
    monkeypatch.setattr(FakeSteering, "made", [])
    monkeypatch.setattr(FakeSteering, "fails", 0)
    return FakeChildren()


async def switch(service: NetworkService, *, on: bool) -> int:
    async with open_pair() as pair:
        stream, other = await pair.open_stream()
        await service.serve(other, {"service": "network", "on": on})
        (number,) = struct.unpack(">H", await stream.receive_some())
        return int(number)


async def test_what_is_prepared_is_off_and_is_what_is_switched_on(children: Any) -> None:
    service = NetworkService(children)
    service.prepare()
    service.prepare()
    (kernel,) = FakeSteering.made
    assert kernel.switched == []
    await service.adopt({"network": False})
    assert (kernel.switched, children.resolvers) == ([], [])
    assert await switch(service, on=True) == 0
    assert await switch(service, on=True) == 0
    assert await switch(service, on=False) == 0
    assert FakeSteering.made == [kernel]
    assert kernel.switched == [True, False]
    assert children.resolvers == ["198.18.0.2", None]


async def test_where_nothing_can_be_prepared_a_switch_says_why(children: Any) -> None:
    service = NetworkService(children)
    FakeSteering.fails = 2
    service.prepare()
    assert await switch(service, on=True) == errno.ENOSYS
    assert await switch(service, on=True) == 0
    assert len(FakeSteering.made) == 1


async def test_only_a_machine_that_is_there_to_be_saved_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: steps.append("sync"))

    class Machine:
        def count_threads(self) -> int:
            return 0

        async def freeze(self) -> None:
            await trio.lowlevel.checkpoint()

        def hold_still(self, _marker: bytes, _token: bytes) -> bytes:
            steps.append("stands still")
            return b""

        def thaw(self) -> None:
            pass

    async with open_pair() as pair:
        headers: list[dict[str, object]] = [{"marker": "00" * 16, "token": "11" * 16}, {"marker": "00" * 16}]
        for header in headers:
            machine: Any = Machine()
            snapshots = SnapshotService(machine, lambda: 0, lambda: None, lambda: steps.append("prepare"))
            stream, other = await pair.open_stream()
            monkeypatch.setattr(other, "send_blocking", mock.Mock(return_value=None))
            await snapshots.serve(other, header)
            stream.close()
    assert steps == ["sync", "stands still", "prepare", "sync"]
