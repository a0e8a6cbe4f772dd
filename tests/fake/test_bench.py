"""`trio-sandbox bench` on hosts whose sandboxes are real agents in this process, confined to nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from trio_sandbox import (
    AdmissionStatistics,
    HostConfig,
    HostStatistics,
    Progress,
    Sandbox,
    SandboxConfig,
    VmBootError,
    WarmStatistics,
)
from trio_sandbox.bench import Figure, Plan, Skipped, measure
from trio_sandbox.cli import main
from trio_sandbox.cli._bench import run_bench
from trio_sandbox.cli._signals import end_on_signal
from trio_sandbox.qemu import Accelerator

from ._guest import ACCELERATOR
from ._sandbox import open_local_sandbox


@attrs.define
class LocalHost:
    """Opens sandboxes on this machine, and logs what is done to it."""

    budget_mib: int = 3 * (256 + 104)
    on_open: Callable[[], object] = lambda: None
    """Called before each sandbox is opened."""
    log: list[str] = attrs.field(factory=list[str])
    alive: int = 0
    most_alive: int = 0
    accelerator: Accelerator = ACCELERATOR

    @asynccontextmanager
    async def open(self, config: HostConfig) -> AsyncGenerator[LocalHost]:
        self.log.append("host opened" if config.templates else "host without templates opened")
        try:
            yield self
        finally:
            self.log.append("host closed")

    async def prepare(self, image: str) -> None:
        await trio.lowlevel.checkpoint()
        self.log.append(f"{image} prepared")

    @asynccontextmanager
    async def open_sandbox(self, image: str, config: SandboxConfig) -> AsyncGenerator[Sandbox]:
        self.on_open()
        async with open_local_sandbox() as (sandbox, _):
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            try:
                yield sandbox
            finally:
                self.alive -= 1

    def statistics(self) -> HostStatistics:
        admission = AdmissionStatistics(
            memory_mib_reserved=0,
            memory_mib_budget=self.budget_mib,
            vcpus_reserved=0,
            vcpu_budget=4,
            tasks_waiting=0,
        )
        return HostStatistics(0, 0, admission, WarmStatistics())


async def take(plan: Plan, host: LocalHost, progress: Callable[[Progress], object] = lambda _: None) -> list[Figure]:
    """Take the measures of *plan*, none of which may be skipped."""
    report = await measure(plan, progress=progress, open_host=host.open)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert report.accelerator is ACCELERATOR
    figures = [figure for figure in report.figures if isinstance(figure, Figure)]
    assert len(figures) == len(report.figures)
    return figures


async def test_so_many_as_were_asked_for_are_alive_at_once_and_each_is_a_sample() -> None:
    host = LocalHost()
    figures = await take(Plan(measures=("cold",), counts=(1, 3), quick=True), host)
    assert [(figure.measure, figure.n, figure.unit, figure.samples) for figure in figures] == [
        ("cold", 1, "s", 1),
        ("cold", 3, "s", 3),
    ]
    assert (host.most_alive, host.alive) == (3, 0)
    assert host.log[:3] == ["host opened", "python prepared", "host closed"]
    assert host.log[3:] == ["host without templates opened", "python prepared", "host closed"] * 2


async def test_starts_from_a_template_come_after_the_one_that_makes_it() -> None:
    opened: list[None] = []
    (figure,) = await take(Plan(measures=("template",), quick=True), LocalHost(on_open=lambda: opened.append(None)))
    assert figure.samples == 3
    assert len(opened) == 4


async def test_runs_and_memory() -> None:
    runs, memory = await take(Plan(measures=("memory", "run"), counts=(2,), quick=True), LocalHost())
    assert (runs.measure, runs.samples, runs.unit) == ("run", 20, "ms")
    assert runs.value > 0
    # The process that is asked for its memory is this one here.
    assert (memory.measure, memory.samples) == ("memory", 2)
    assert 1 < memory.value < 10_000


async def test_idle_sandboxes_are_all_alive_when_they_are_asked() -> None:
    host = LocalHost()
    (figure,) = await take(Plan(measures=("idle",), counts=(3,), quick=True), host)
    assert (figure.measure, figure.n, figure.samples, figure.unit, host.most_alive) == ("idle", 3, 3, "ms", 3)


async def test_progress_tells_what_is_measured_and_how_far_it_is() -> None:
    steps: list[Progress] = []
    await take(Plan(measures=("run",), counts=(2,), quick=True), LocalHost(), steps.append)
    assert {step.stage for step in steps} == {"run, n = 2"}
    fractions = [step.fraction for step in steps]
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert fractions == sorted(fractions, key=lambda fraction: fraction or 0)
    assert len(fractions) > 20


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (
            Plan(measures=("template",), counts=(4,)),
            "does not fit: needs 1440 MiB, and all sandboxes may have 1080 MiB",
        ),
        (
            Plan(measures=("cold",), counts=(1,), sandbox=SandboxConfig(vcpus=5)),
            "does not fit: needs 5 vCPUs, and all sandboxes may have 4",
        ),
    ],
)
async def test_what_does_not_fit_is_said_and_nothing_is_opened(plan: Plan, reason: str) -> None:
    host = LocalHost()
    report = await measure(plan, progress=lambda _: None, open_host=host.open)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (skipped,) = report.figures
    assert isinstance(skipped, Skipped)
    assert (skipped.reason, skipped.failed, skipped.n) == (reason, False, plan.counts[0])
    assert host.most_alive == 0


async def test_what_fails_loses_no_other_figure_and_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    host = LocalHost()
    calls: list[None] = []

    def fail_at_second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise VmBootError("it did not boot", console="Kernel panic")

    host.on_open = fail_at_second
    plan = Plan(measures=("cold",), counts=(2, 1), quick=True)
    status = await run_bench(plan, quiet=True, as_json=True, open_host=host.open)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    value = json.loads(capsys.readouterr().out)
    assert status == 125
    failed, good = value["figures"]
    assert (failed["n"], failed["failed"]) == (2, True)
    assert failed["skipped"].startswith("VmBootError: it did not boot")
    assert (good["n"], good["samples"]) == (1, 1)
    assert host.alive == 0


async def test_a_bug_is_not_a_figure_that_failed() -> None:
    def fail() -> None:
        raise KeyError("a bug")

    plan = Plan(measures=("cold",), quick=True)
    with pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="a bug"), flatten_subgroups=True):
        await measure(plan, progress=lambda _: None, open_host=LocalHost(on_open=fail).open)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_the_table_goes_to_standard_output_and_progress_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan(measures=("cold",), quick=True)
    assert await run_bench(plan, quiet=False, as_json=False, open_host=LocalHost().open) == 0  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    captured = capsys.readouterr()
    assert "| cold boot to first output | 1 |" in captured.out
    assert captured.err == "cold, n = 1: measuring\n"


async def test_a_signal_leaves_nothing() -> None:
    host = LocalHost(on_open=lambda: os.kill(os.getpid(), signal.SIGINT))
    plan = Plan(measures=("run",), counts=(3,))
    status = await end_on_signal(lambda: run_bench(plan, quiet=True, as_json=False, open_host=host.open))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert status == 128 + signal.SIGINT
    assert host.alive == 0
    assert host.log[-1] == "host closed"


def test_wrong_use_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--memory", "64"]) == 2
    assert "`memory_mib` must be at least 128 MiB, not 64" in capsys.readouterr().err
