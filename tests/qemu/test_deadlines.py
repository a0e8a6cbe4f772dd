"""A deadline that passes while the host is busy with something else."""

from __future__ import annotations

import time

import pytest
import trio

from trio_sandbox import HostConfig, Sandbox, Timeouts

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_UNTIL_INTERRUPTED = "import time\ntry:\n    print('go')\n    while True: pass\nfinally: stopped = time.time()"


@pytest.fixture
def sandbox_host_config() -> HostConfig:
    return HostConfig(timeouts=Timeouts(interrupt_grace=60))  # however slow the machine is now


async def test_the_guest_stops_by_itself_while_the_host_is_blocked(sandbox: Sandbox) -> None:
    seconds, began = 1.0, time.monotonic()
    await sandbox.run(_UNTIL_INTERRUPTED.replace("while True: pass", "0"))
    seconds += 5 * (time.monotonic() - began)  # it is to be under way by then
    with trio.move_on_after(seconds) as scope:
        async with sandbox.stream(_UNTIL_INTERRUPTED) as events:
            async for _ in events:
                block_until(scope.deadline + 4)
    unblocked = time.time()
    assert scope.cancelled_caught
    # The clock of the guest is set from ours. Its variables were kept: it was interrupted, not killed.
    result = await sandbox.run("print(stopped)")
    assert not result.restarted
    assert float(result.stdout) < unblocked

    with trio.move_on_after(seconds) as scope:
        async with sandbox.open_process(["sh", "-c", "while :; do date +%s.%N >> /tmp/alive; done"]):
            block_until(scope.deadline + 4)
            await trio.sleep_forever()
    unblocked = time.time()
    last = await sandbox.run_process(["tail", "-n", "1", "/tmp/alive"], capture_stdout=True)
    assert float(last.stdout) < unblocked


def block_until(moment: float) -> None:
    """Let the event loop wait until *moment* of its clock."""
    time.sleep(max(moment - trio.current_time(), 0))
