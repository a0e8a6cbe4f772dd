"""A few sequences of all that can be done to a sandbox, against a dictionary; `nox -s soak -- model` tries many."""

from __future__ import annotations

import pytest
import trio

from tests._model import ALL, Bench, Command, Interpreter, play
from tests.soak.model import try_many
from trio_sandbox import HostConfig, Timeouts, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


async def test_a_sandbox_holds_what_a_dictionary_does() -> None:
    config = HostConfig(
        timeouts=Timeouts(interrupt_grace=60)
    )  # what is cancelled keeps its state, however slow the machine is now
    async with open_host(config) as host, host.open_sandbox() as sandbox:
        holder = Interpreter(sandbox, "/home/user/model")
        await sandbox.path(holder.directory).mkdir()

        async def example(commands: list[Command]) -> None:
            await holder.clear()
            await play(Bench(holder, host), commands)

        # One of each first, in an order in which each has something to lose.
        await example([(kind, f"v_{'abc'[number % 3]}", f"{kind} {number}", number) for number, kind in enumerate(ALL)])
        await trio.to_thread.run_sync(try_many, example, ALL, 8, 3, 1)
