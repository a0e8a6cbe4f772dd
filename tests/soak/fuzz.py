"""The part `fuzz`: inputs by the million for everything that takes apart what a guest, QEMU or a disk says.

Atheris draws them, guided by the branches that are taken: see `tests/_parsers.py`. An input may end in a documented error and in
nothing else; it has at most 4 KiB, and may take 50 ms of processor time, its process 1 GiB of memory. With ``--count`` the same seed
draws the same inputs; the default is ten million in all.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from tests._parsers import PARSERS, Parser, odd_variants

from ._report import Budget, Report

#: Inputs in all, if neither a count nor minutes are said.
TEN_MILLION = 10_000_000
#: Bytes of an input, seconds of processor time that it may take, and MiB of the process.
_LONGEST, _SECONDS, _MEMORY_MIB = 4096, 0.05, 1024
#: How many inputs one parser gets for each that another gets; those with Trio, or with files, take so much longer.
_SHARES = {"a download": 0.02, "a template's manifest": 0.02, "a saved sandbox's manifest": 0.02, "HTTP": 0.02}
_SHARE_WITH_TRIO = 0.1
_WITH_TRIO = ("a listing", "a search", "changes", "an open file", "the accelerator's verdict")
_RUNS = re.compile(r"stat::number_of_executed_units: *(\d+)")
#: Seconds that the process may take beyond those that it was given.
_PATIENCE = 120.0


def _share(name: str) -> float:
    return _SHARES.get(name, _SHARE_WITH_TRIO if name in _WITH_TRIO else 1.0)


async def soak(budget: Budget, report: Report) -> None:
    """Soak parsers."""
    if importlib.util.find_spec("atheris") is None:
        report.fail("the part `fuzz` needs Atheris, which `nox -s soak` installs: pip install atheris")
        return
    whole = sum(map(_share, PARSERS))
    for name, parser in PARSERS.items():
        share = _share(name) / whole
        if budget.minutes is None:
            bounds = [f"-runs={max(1, round((budget.count or TEN_MILLION) * share))}"]
            seconds = 3600.0
        else:
            seconds = max(budget.minutes * 60 - (time.monotonic() - budget.started), 1.0) / _left(name)
            bounds = [f"-max_total_time={max(1, round(seconds))}"]
            if budget.count is not None:
                bounds.append(f"-runs={max(1, round(budget.count * share))}")
        with tempfile.TemporaryDirectory(prefix="trio-sandbox-fuzz-") as directory:
            await _fuzz(name, parser, Path(directory), [*bounds, f"-seed={budget.seed}"], seconds, report)


def _left(name: str) -> int:
    """How many parsers still want their time."""
    return len(PARSERS) - list(PARSERS).index(name)


async def _fuzz(
    name: str, parser: Parser, directory: Path, arguments: list[str], seconds: float, report: Report
) -> None:
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, data in enumerate(_corpus(parser)):
        (corpus / f"{number:04}").write_bytes(data)
    command = [
        *(sys.executable, "-m", "tests.soak._fuzzer", name, str(_SECONDS)),
        *(f"-max_len={_LONGEST}", f"-rss_limit_mb={_MEMORY_MIB}", f"-artifact_prefix={directory}/found-"),
        *("-timeout=20", "-print_final_stats=1", "-verbosity=1", *arguments, str(corpus)),
    ]
    done = None
    with trio.move_on_after(seconds + _PATIENCE):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done is None:
        report.fail(f"{name}: the fuzzer did not come back")
        return
    told = done.stderr.decode("utf-8", "replace")
    runs = _RUNS.search(told)
    report.operations[name] += int(runs[1]) if runs else 0
    slowest = max((json.loads(line) for line in done.stdout.splitlines()), key=_milliseconds, default=None)
    if slowest is not None:
        report.slowest = max(report.slowest, round(_milliseconds(slowest) / 1000, 3))
        report.notes.append(f"{name}: at most {slowest['milliseconds']:g} ms, for {slowest['bytes']} bytes")
    if done.returncode:
        found = [path.read_bytes() for path in directory.glob("found-*")]
        report.fail(f"{name}: status {done.returncode}, with {found}:\n{told[-3000:]}")


def _milliseconds(slowest: dict[str, float]) -> float:
    return slowest["milliseconds"]


def _corpus(parser: Parser) -> Iterator[bytes]:
    for example in parser.examples:
        yield example
        yield from (data for data in odd_variants(example) if len(data) <= _LONGEST)
