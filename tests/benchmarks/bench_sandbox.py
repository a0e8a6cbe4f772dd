"""A sandbox as its user meets it: from nothing to the first output, further runs, output, the host's memory."""

from __future__ import annotations

import time
from pathlib import Path

from trio_sandbox import HostConfig, OutputChunk, Sandbox
from trio_sandbox.bench import MEASURES, Figure, Lab, durations

_BOOTS = 7
_RUNS = 300
_FLOODS = 5
#: MB (10**6 bytes) that one flood prints, in pieces of 64 KiB.
_FLOOD_MB = 200


async def measure() -> list[Figure]:
    """Measure with a host that is open already, as an application has one."""
    lab = Lab(host=HostConfig(templates=False))
    cold = await MEASURES["cold"].take(lab, 1, _BOOTS)
    async with lab.open(1) as host, host.open_sandbox() as sandbox:
        runs = await durations(lambda: sandbox.run("print(1)"), runs=_RUNS, warm_up=20)
        before = _resident_mib()
        speeds = [await _flood(sandbox) for _ in range(_FLOODS)]
        grown = _resident_mib() - before
    by = f"under {host.accelerator.name}"
    return [
        Figure.of(f"cold boot to first output, {by}", cold, "s", at_most=MEASURES["cold"].limit(1)),
        Figure.of(f'run("print(1)") again, {by}', runs, "ms", at_most=MEASURES["run"].limit(1)),
        Figure.of(f"output of a run, guest to host, {by}", speeds, "MB/s", at_least=20),
        Figure(
            name=f"host's memory grown after {_FLOODS * _FLOOD_MB} MB of output",
            value=grown,
            unit="MiB",
            samples=1,
            at_most=8,
        ),
    ]


async def _flood(sandbox: Sandbox) -> float:
    size = 0
    start = time.perf_counter()
    code = f"import os\ndata = b'x' * 65536\nfor _ in range({_FLOOD_MB} * 10**6 // len(data)): os.write(1, data)"
    async with sandbox.stream(code) as events:
        async for event in events:
            if isinstance(event, OutputChunk):
                size += len(event.data)
    return size / (time.perf_counter() - start) / 1e6


def _resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024
