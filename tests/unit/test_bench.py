"""Figures, tables, plans and reports of `trio_sandbox.bench`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import attrs
import pytest

from trio_sandbox import SandboxConfig
from trio_sandbox.bench import MEASURES, Figure, Load, LoadWatch, Machine, Plan, Report, Skipped, table
from trio_sandbox.qemu import Accelerator, Confinement, QemuBuild

ACCELERATOR = Accelerator(
    name="tcg",
    hardware=False,
    reason="a test",
    qemu=QemuBuild(path="qemu", size=0, modified_ns=0, version=(7, 2, 22)),
    confinement=Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False),
)
LOAD = Load(before=(0.25, 0.5, 0.75), after=(1.0, 0.5, 0.75), others_share=0.02, loop_ms=(20.5, 21.0))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


# --- Figures ---


def test_a_figure_is_the_median_of_its_samples() -> None:
    figure = Figure.of("a thing", [9.0, 1.0, 2.0, 100.0, 3.0], "ms")
    assert (figure.value, figure.samples, figure.p95) == (3.0, 5, 100.0)


def test_the_95th_percentile_leaves_the_worst_twentieth_out() -> None:
    assert Figure.of("a thing", range(1, 101), "ms").p95 == 95
    assert Figure.of("a thing", [7.0], "ms").p95 == 7.0


def test_no_samples_make_no_figure() -> None:
    with pytest.raises(ValueError, match="a thing: no samples"):
        Figure.of("a thing", [], "ms")


@pytest.mark.parametrize(
    ("at_most", "at_least", "within"),
    [
        (None, None, None),
        (4, None, True),
        (3, None, True),
        (2, None, False),
        (None, 3, True),
        (None, 4, False),
        (4, 4, False),
    ],
)
def test_limits(at_most: float | None, at_least: float | None, within: bool | None) -> None:
    figure = Figure(name="x", value=3, unit="ms", samples=1, at_most=at_most, at_least=at_least)
    assert figure.within_limits is within


def test_the_table_shows_limits_and_what_is_over() -> None:
    good = Figure(name="fast", value=3.14159, unit="ms", samples=10, p95=4, at_most=4)
    bad = Figure(name="slow", value=12.6, unit="MB/s", samples=10, at_least=20)
    lines = table([good, bad]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert cells(lines[2]) == ["fast", "3.14", "4", "ms", "<= 4", "ok", "10"]
    assert cells(lines[3]) == ["slow", "12.6", "", "MB/s", ">= 20", "OVER", "10"]
    assert Figure(name="x", value=1, unit="x", samples=1).limit == ""


def test_the_table_has_numbers_of_sandboxes_where_there_are_any_and_shows_what_is_missing() -> None:
    figures: list[Figure | Skipped] = [
        Figure(name="starts", value=345.6, unit="ms", samples=8, n=8),
        Skipped(name="starts", measure="template", n=32, reason="does not fit", failed=False),
        Skipped(name="starts", measure="template", n=64, reason="VmError: no", failed=True),
    ]
    lines = table(figures).splitlines()
    assert [cells(line)[:3] for line in lines[2:]] == [
        ["starts", "8", "346"],
        ["starts", "32", "no room"],
        ["starts", "64", "failed"],
    ]


# --- Plans ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"measures": ("cold", "astrology")}, "must be some of overlay, cold, .*; not astrology"),
        ({"measures": ()}, "not nothing"),
        ({"counts": ()}, "`counts` must be numbers of sandboxes"),
        ({"counts": (1, 0)}, "each at least 1, not"),
    ],
)
def test_what_can_not_be_measured_is_said_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**fields)


@pytest.mark.parametrize("key", MEASURES)
@pytest.mark.parametrize("quick", [True, False])
def test_every_measure_takes_at_least_its_samples_and_fewer_if_quick(key: str, quick: bool) -> None:
    measure = MEASURES[key]
    wanted = measure.quick_samples if quick else measure.samples
    assert 1 <= measure.quick_samples < measure.samples
    for n in (1, 7, 1000):
        assert wanted <= measure.rounds(n, quick=quick) * n < wanted + n


def test_limits_are_of_one_number_of_sandboxes_or_of_any() -> None:
    assert (MEASURES["template"].limit(1), MEASURES["template"].limit(8)) == (0.25, None)
    assert MEASURES["memory"].limit(1) == MEASURES["memory"].limit(32) == 64


# --- Reports ---


def report(*figures: Figure | Skipped) -> Report:
    machine = Machine(cpu="Abacus", cpus=2, memory_mib=1024, kernel="6.1", python="3.11", trio="0.35")
    plan = Plan(sandbox=SandboxConfig(memory_mib=512), quick=True)
    return Report(plan=plan, machine=machine, accelerator=ACCELERATOR, load=LOAD, figures=figures)


STARTS = Figure.of("starts", [0.5, 0.25, 0.75], "s", at_most=0.25, measure="template", n=1)
TOO_MANY = Skipped(name="starts", measure="template", n=32, reason="does not fit: needs 9 MiB", failed=False)


def test_the_json_is_what_the_reference_says() -> None:
    value = json.loads(report(STARTS, TOO_MANY).as_json())
    assert value.pop("trio_sandbox")
    assert value == {
        "schema": 1,
        "machine": {"cpu": "Abacus", "cpus": 2, "memory_mib": 1024, "kernel": "6.1", "python": "3.11", "trio": "0.35"},
        "accelerator": {
            "name": "tcg",
            "hardware": False,
            "meaning": "tcg (software emulation: slow, and no security boundary); a test",
            "qemu": "7.2.22",
        },
        "load": {
            "before": [0.25, 0.5, 0.75],
            "after": [1.0, 0.5, 0.75],
            "others_share": 0.02,
            "loop_ms": [20.5, 21.0],
            "quiet": True,
        },
        "sandbox": {"image": "python", "memory_mib": 512, "vcpus": 1},
        "quick": True,
        "figures": [
            {
                "measure": "template",
                "what": "starts",
                "n": 1,
                "unit": "s",
                "median": 0.5,
                "p95": 0.75,
                "samples": 3,
                "at_most": 0.25,
                "within_limits": False,
            },
            {
                "measure": "template",
                "what": "starts",
                "n": 32,
                "skipped": "does not fit: needs 9 MiB",
                "failed": False,
            },
        ],
    }


def test_the_text_says_on_what_it_was_measured_and_why_something_is_missing() -> None:
    text = report(STARTS, TOO_MANY).as_text()
    for words in ("512 MiB", "Abacus, 2 CPUs", "QEMU 7.2.22", "no security boundary", "quiet: other programs took 2%"):
        assert words in text
    assert "template, n = 32: does not fit: needs 9 MiB." in text


def test_what_does_not_fit_is_no_failure() -> None:
    assert not report(STARTS, TOO_MANY).failed
    assert report(STARTS, attrs.evolve(TOO_MANY, failed=True)).failed


# --- The machine ---


def test_the_machine_is_described() -> None:
    machine = Machine.here()
    assert machine.cpu
    assert machine.cpus == len(os.sched_getaffinity(0))
    assert machine.memory_mib > 64
    assert f"{machine.memory_mib} MiB" in str(machine)


def test_load_of_others_is_a_share_and_our_own_is_none_of_it() -> None:
    watch = LoadWatch()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    load = watch.stop()
    assert 0 <= load.others_share <= 1
    assert load.quiet is (load.others_share < 0.1)
    assert len(load.before) == len(load.after) == 3
    assert min(load.loop_ms) > 0
    busy = attrs.evolve(load, others_share=0.5, loop_ms=(20.0, 41.25))
    assert str(busy).startswith("NOT QUIET: other programs took 50%")
    assert str(busy).endswith("a loop of 200000 steps in Python took 20.0 ms before, 41.2 after")


def test_forks_are_measured_with_the_number_that_has_a_limit_as_well() -> None:
    assert MEASURES["fork"].counts((1, 8), quick=False) == [1, 4, 8]
    assert MEASURES["fork"].counts((4,), quick=False) == [4]
    assert MEASURES["fork"].counts((1,), quick=True) == [1]
    assert MEASURES["run"].counts((8, 1), quick=False) == [8, 1]
