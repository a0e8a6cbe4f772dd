"""An agent that was replaced in a real machine: requests come to the right end, and the neighbour has noticed nothing."""

from __future__ import annotations

import pytest
import trio

from tests._hostile_agent import BEHAVIOURS, replaced_agent
from tests._leaks import HANG_LIMIT, nothing_left
from trio_sandbox import HostConfig, SandboxConfig, Timeouts, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

#: One of each kind; `nox -s soak -- hostile` has all of them, and measures.
NAMES = ("says half a frame", "gives more credit than there is", "floods with resets", "prints a byte at a time")


async def test_whatever_an_agent_says_its_requests_end_and_the_neighbour_goes_on() -> None:
    config = SandboxConfig(max_output_bytes=2**16)
    with nothing_left():
        async with open_host(HostConfig(timeouts=Timeouts(kill=3, agent_silence=3))) as host:
            async with host.open_sandbox() as neighbour:
                await neighbour.run("x = 7")
                for behaviour in (one for one in BEHAVIOURS if one.name in NAMES):
                    async with host.open_sandbox(config=config) as sandbox, replaced_agent(sandbox, behaviour) as ask:
                        with trio.fail_after(HANG_LIMIT), pytest.raises(behaviour.raises):
                            await ask()
                    assert (await neighbour.run("print(x)")).stdout == "7\n"
            assert host.statistics().sandboxes_open == 0
