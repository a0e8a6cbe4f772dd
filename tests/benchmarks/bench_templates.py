"""Sandboxes that go on from a template: how soon they answer, what they cost, and whether that stays so."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import trio

from trio_sandbox import Host, HostConfig, Progress, Sandbox, SandboxConfig, open_host
from trio_sandbox.host import TemplateStore
from trio_sandbox.image import default_cache_directory
from trio_sandbox.qemu import Vm

from ._figures import Figure

_STARTS = 32
_BOOTS = 3
#: Sandboxes that are open at the same time.
_TOGETHER = 32


async def measure() -> list[Figure]:
    """Measure with a host that is open already, as an application has one."""
    # A template that nobody has, so that making it can be measured, too.
    config = SandboxConfig(warmup=f"token = {secrets.token_hex(8)!r}")
    steps: list[tuple[float, Progress]] = []
    async with open_host(HostConfig(progress=lambda step: steps.append((time.perf_counter(), step)))) as host:
        await host.prepare()
        try:
            begun = time.perf_counter()
            first = await _first_output(host, config)
            saving = begun + first - next(moment for moment, step in steps if step.message == "saving its state")
            starts = [await _first_output(host, config) for _ in range(_STARTS)]
            private = await _private_mib(host, config)
            together = await _together(host, config)
        finally:
            store = TemplateStore(default_cache_directory(), budget_mib=10**6)
            for template in store.list():
                if template.warmup == config.warmup:
                    store.remove(template.key)
    async with open_host(HostConfig(templates=False)) as cold:
        await cold.prepare()
        boots = [await _first_output(cold, config) for _ in range(_BOOTS)]
    by = f"under {host.accelerator.name}"
    tenth = _STARTS // 10
    return [
        Figure.of(f"template to first output, {by}", starts, "s", at_most=0.25),
        Figure.of(f"cold boot to first output, {by}, for comparison", boots, "s"),
        Figure(
            name="first sandbox of all, which makes the template, to first output", value=first, unit="s", samples=1
        ),
        Figure(name="of that after the warm-up: saving, and going on from there", value=saving, unit="s", samples=1),
        Figure(
            name=f"last starts of {_STARTS} against the first, medians of {tenth}",
            value=sorted(starts[-tenth:])[tenth // 2] / sorted(starts[:tenth])[tenth // 2],
            unit="x",
            samples=tenth,
            at_most=1.3,
        ),
        Figure(name="private memory of an idle clone", value=private, unit="MiB", samples=1, at_most=64),
        Figure(
            name=f"{_TOGETHER} clones opened together, until all have answered", value=together, unit="s", samples=1
        ),
    ]


async def _first_output(host: Host, config: SandboxConfig) -> float:
    start = time.perf_counter()
    async with host.open_sandbox(config=config) as sandbox:
        result = await sandbox.run("print(1)")
        seconds = time.perf_counter() - start
        assert result.stdout == "1\n"
    return seconds


async def _together(host: Host, config: SandboxConfig) -> float:
    answered = 0
    all_answered = trio.Event()
    start = seconds = time.perf_counter()

    async def answer() -> None:
        nonlocal answered, seconds
        async with host.open_sandbox(config=config) as sandbox:
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            answered += 1
            if answered == _TOGETHER:
                seconds = time.perf_counter() - start
                all_answered.set()
            await all_answered.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(_TOGETHER):
            nursery.start_soon(answer)
    return seconds


async def _private_mib(host: Host, config: SandboxConfig) -> float:
    async with host.open_sandbox(config=config) as sandbox:
        await sandbox.run("print(1)")
        await trio.sleep(1)
        return private_mib(sandbox)


def private_mib(sandbox: Sandbox) -> float:
    """Return what its QEMU has of memory that no other process uses, and that was written to."""
    vm = sandbox._vm  # pyright: ignore[reportPrivateUsage]
    assert isinstance(vm, Vm)
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{vm.pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Private_Dirty"].split()[0]) / 1024
