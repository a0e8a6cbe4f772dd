"""Sandboxes that go on from a template: how soon they answer, what they cost, and whether that stays so."""

from __future__ import annotations

import secrets
import statistics
import time

from trio_sandbox import HostConfig, Progress, SandboxConfig
from trio_sandbox.bench import MEASURES, Figure, Lab
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines import TemplateStore

_STARTS = 32
_BOOTS = 3
#: Sandboxes that are open at the same time.
_TOGETHER = 32


async def measure() -> list[Figure]:
    """Measure with a host that is open already, as an application has one."""
    # A template that nobody has, so that making it can be measured, too.
    config = SandboxConfig(warmup=f"token = {secrets.token_hex(8)!r}")
    steps: list[tuple[float, Progress]] = []
    lab = Lab(sandbox=config, host=HostConfig(progress=lambda step: steps.append((time.perf_counter(), step))))
    try:
        async with lab.open(1) as host:
            begun = time.perf_counter()
            async with lab.open_answering(host, 1) as sandboxes:
                (first,) = sandboxes.values()
            saving = begun + first - next(moment for moment, step in steps if step.message == "saving its state")
        starts = await MEASURES["template"].take(lab, 1, _STARTS)
        private = await MEASURES["memory"].take(lab, 1, 1)
        together = await MEASURES["template"].take(lab, _TOGETHER, 1)
    finally:
        store = TemplateStore(default_cache_directory(), budget_mib=10**6)
        for template in store.list():
            if template.warmup == config.warmup:
                store.remove(template.key)
    boots = await MEASURES["cold"].take(lab, 1, _BOOTS)
    by = f"under {host.accelerator.name}"
    tenth = _STARTS // 10
    return [
        Figure.of(f"template to first output, {by}", starts, "s", at_most=MEASURES["template"].limit(1)),
        Figure.of(f"cold boot to first output, {by}, for comparison", boots, "s"),
        Figure(
            name="first sandbox of all, which makes the template, to first output", value=first, unit="s", samples=1
        ),
        Figure(name="of that after the warm-up: saving, and restoring the template", value=saving, unit="s", samples=1),
        Figure(
            name=f"last starts of {_STARTS} against the first, medians of {tenth}",
            value=statistics.median(starts[-tenth:]) / statistics.median(starts[:tenth]),
            unit="x",
            samples=tenth,
            at_most=1.3,
        ),
        Figure.of("private memory of an idle clone", private, "MiB", at_most=MEASURES["memory"].limit(1)),
        Figure(
            name=f"{_TOGETHER} clones opened together, until all have answered",
            value=max(together),
            unit="s",
            samples=1,
        ),
    ]
