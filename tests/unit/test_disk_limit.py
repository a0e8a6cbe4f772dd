"""How much of a guest's file system is held back for a limit of its disk."""

from __future__ import annotations

import os

import pytest

from trio_sandbox.guest.agent.disk import clusters_to_reserve


@pytest.mark.parametrize(
    ("blocks", "free", "limit", "reserved"),
    [
        (2**21, 2**20, 64 * 2**20, 2**20 - 64 * 256),
        (2**21, 2**20, 4095, 2**20),  # less than a block is none
        (2**21, 2**20, 0, 2**20),
        (2**21, 2**20, 2**50, 4096),  # more than there is
        (2**21, 10, 4096, 4096),  # fuller than what ext4 keeps for itself
        (2**21, 2**20, None, 4096),
        (5000, 4000, None, 100),
    ],
)
def test_all_but_the_limit_is_held_back(blocks: int, free: int, limit: int | None, reserved: int) -> None:
    disk = os.statvfs_result((4096, 4096, blocks, free, free, 0, 0, 0, 0, 255))
    assert clusters_to_reserve(disk, limit) == reserved
