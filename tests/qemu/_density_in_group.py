"""What `test_density` runs in a control group with little memory: sandboxes that use what they may have, on a host that counts them as idle.

It prints one JSON object.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack

import trio

from trio_sandbox import CapacityError, HostConfig, Sandbox, Timeouts, open_host

#: Fills memory, page by page, and keeps it.
_EAT = "data = b'x' * (120 << 20)"
#: Leaves a thread behind: so the sandbox is not idle.
_STAY = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
_MOST = 6


async def main() -> None:
    # What other hosts of this user have is not in this group: the budget is not to count it.
    config = HostConfig(memory_overcommit=4, memory_budget_mib=10**6, vcpu_budget=100, timeouts=Timeouts(admission=3))
    seen: dict[str, object] = {}
    async with open_host(config) as host:
        async with AsyncExitStack() as stack:
            busy: list[Sandbox] = []
            try:
                while len(busy) < _MOST:
                    sandbox = await stack.enter_async_context(host.open_sandbox())
                    await sandbox.run(f"{_STAY}\n{_EAT}")
                    busy.append(sandbox)
            except CapacityError as exc:
                seen["refused"] = str(exc)
            seen["busy"] = len(busy)
            seen["busy answer"] = [(await each.run("print(len(data))")).stdout for each in busy]
            seen["busy slept"] = sum(each.statistics().hibernations for each in busy)
        async with AsyncExitStack() as stack:
            idle: list[Sandbox] = []
            for number in range(_MOST):
                sandbox = await stack.enter_async_context(host.open_sandbox())
                await sandbox.run(f"number = {number}\n{_EAT}")
                idle.append(sandbox)
            seen["idle slept"] = sum(each.statistics().hibernations for each in idle)
            seen["idle answer"] = [(await each.run("print(number, len(data))")).stdout for each in idle]
    print(json.dumps(seen))


if __name__ == "__main__":
    trio.run(main)
