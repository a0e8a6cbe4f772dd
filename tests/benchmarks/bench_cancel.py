"""From cancelling a run to the sandbox's being ready for the next one: all that runs in the guest has ended by then."""

from __future__ import annotations

import time

import trio

from trio_sandbox import Sandbox, open_host
from trio_sandbox.bench import Figure

_INTERRUPTS = 50
_KILLS = 7

_INTERRUPTIBLE = "print('go', flush=True)\nwhile True: pass"
_SLEEPING = "import time\nprint('go', flush=True)\ntime.sleep(1000)"
_IGNORING = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{_INTERRUPTIBLE}"


async def measure() -> list[Figure]:
    """Measure in one sandbox; a KILL costs the grace of one second before it."""
    async with open_host() as host, host.open_sandbox() as sandbox:
        for _ in range(3):
            await _cancel(sandbox, _INTERRUPTIBLE)
        busy = [await _cancel(sandbox, _INTERRUPTIBLE) * 1000 for _ in range(_INTERRUPTS)]
        sleeping = [await _cancel(sandbox, _SLEEPING) * 1000 for _ in range(_INTERRUPTS)]
        ignoring = [await _cancel(sandbox, _IGNORING) for _ in range(_KILLS)]
    by = f"under {host.accelerator.name}"
    return [
        Figure.of(f"cancelling a run that computes, to idle, {by}", busy, "ms", at_most=50),
        Figure.of(f"cancelling a run that sleeps, to idle, {by}", sleeping, "ms", at_most=50),
        Figure.of(f"cancelling a run that ignores SIGINT, to idle, {by}", ignoring, "s", at_most=1.5),
    ]


async def _cancel(sandbox: Sandbox, code: str) -> float:
    """Return the seconds from the cancellation until nothing of the run is left."""
    start = 0.0
    with trio.CancelScope() as scope:
        async with sandbox.stream(code) as events:
            async for _ in events:
                start = time.perf_counter()
                scope.cancel()
    return time.perf_counter() - start
