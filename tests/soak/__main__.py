"""Run the soak: ``python -m tests.soak [--minutes N] [--count N] [--scale X] [--seed S] [--json FILE] [--write FILE] [PART ...]``.

The same seed does the same operations in the same order; what happens between them is up to the machine.
Exit status 0 if every part holds, 1 if one does not, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import trio

from tests.documented import replace_between_marks
from trio_sandbox.bench import LoadWatch, Machine

from ._parts import PARTS
from ._report import Budget, Report, to_json, to_markdown

#: Minutes for each part, if neither these nor a count is said.
DEFAULT_MINUTES = 5.0


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of: {', '.join(PARTS)}; default: all of them")
    parser.add_argument(
        "--minutes",
        type=_positive,
        help=f"how long all parts together may take, each a fair share; default: {DEFAULT_MINUTES:g} each, without --count",
    )
    parser.add_argument("--count", type=int, help="how many operations each part does")
    parser.add_argument(
        "--scale",
        type=_positive,
        default=1.0,
        help="multiplies the numbers of the part `load`, 10000 runs and so on; default: 1",
    )
    parser.add_argument("--seed", type=int, default=1, help="what is drawn at random is drawn from this; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well, as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put its tables between the marks in FILE as well")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are: {', '.join(PARTS)}")
    if options.count is not None and options.count < 1:
        parser.error(f"--count must be at least 1, not {options.count}")
    if options.write is not None:
        replace_between_marks(options.write.read_text("utf-8"), "")  # a wrong file: say so before the long work
    options.parts = options.parts or list(PARTS)
    if options.count is None and options.minutes is None:
        options.minutes = DEFAULT_MINUTES * len(options.parts)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Soak the parts that were named, or all."""
    options = _parse(arguments)
    reports: list[Report] = []
    watch = LoadWatch()
    whole = Budget(options.seed, options.count, options.minutes, options.scale)
    for name, budget in zip(options.parts, whole.shares([options.count] * len(options.parts)), strict=True):
        report = Report(name, options.seed)
        reports.append(report)
        print(f"soaking {name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            trio.run(partial(PARTS[name], budget, report))
        except Exception as exc:  # noqa: BLE001  the other parts have their turn, and the report says it
            report.fail(f"it came to no end: {''.join(traceback.format_exception(exc))[-3000:]}")
        report.seconds = round(time.monotonic() - started, 1)
        print(report, flush=True)
        # After each part: what was learned is not lost with a later one.
        if options.json is not None:
            options.json.write_text(to_json(reports) + "\n", "utf-8")
        if options.write is not None:
            text = f"{Machine.here()}; {watch.stop()}; seed {options.seed}\n\n{to_markdown(reports)}"
            options.write.write_text(replace_between_marks(options.write.read_text("utf-8"), text), "utf-8")
    return 0 if all(report.holds for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
