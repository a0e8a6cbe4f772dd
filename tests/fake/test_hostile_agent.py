"""An agent that says what it likes, as a process of this machine: requests come to the right end, and the machine is given up."""

from __future__ import annotations

import pytest
import trio

from tests._hostile_agent import BEHAVIOURS, Behaviour, ask, hostile_process
from tests._leaks import HANG_LIMIT, nothing_left
from trio_sandbox import OutputLimitError, SandboxConfig, Timeouts
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import PortStream, Role, open_channel

from ._guest import FakeMachine


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
async def test_whatever_an_agent_says_its_requests_end_in_the_right_error(behaviour: Behaviour) -> None:
    config, timeouts = SandboxConfig(max_output_bytes=2**13), Timeouts(interrupt_grace=0.1, kill=20)
    with nothing_left(), hostile_process(behaviour) as port:
        stream = PortStream(port)
        async with open_channel(stream, role=Role.HOST, hello={"version": 1}, silence_timeout=1) as channel:
            machine = FakeMachine(channel, lambda: trio.lowlevel.spawn_system_task(trio.aclose_forcefully, stream))
            machine.ended.set()  # whoever waits for QEMU's end need not
            sandbox = Sandbox(Slot(machine), "python", config, timeouts)
            with trio.fail_after(HANG_LIMIT), pytest.raises(behaviour.raises) as caught:
                await ask(sandbox, behaviour)
            if not isinstance(caught.value, OutputLimitError | OSError):  # which are limits of ours
                await channel.wait_closed()
                assert channel.failure or machine.failure
