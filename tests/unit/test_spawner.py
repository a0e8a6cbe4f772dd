"""What the spawner does about processes that do not end when they are killed."""

from __future__ import annotations

import os
import socket
from typing import cast

from trio_sandbox.guest.spawner.cgroups import Group
from trio_sandbox.guest.spawner.spawner import Confinement, Spawner, _Process  # pyright: ignore[reportPrivateUsage]


class FakeGroup:
    """A control group into which somebody comes after each kill."""

    def __init__(self) -> None:
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1

    def threads(self) -> list[int]:
        return []


def test_a_group_that_does_not_become_empty_is_killed_again() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group = FakeGroup()
    with ours, theirs:
        spawner = Spawner(theirs, Confinement())
        process = _Process(1, os.getpid(), -1, cast("Group", group), [])
        process.reaped = True
        spawner._kill(process)  # pyright: ignore[reportPrivateUsage]
        for _ in range(3):
            spawner._kill_again()  # pyright: ignore[reportPrivateUsage]
    assert group.kills == 4
