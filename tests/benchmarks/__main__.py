"""Run the benchmarks: ``python -m tests.benchmarks [--json] [--write FILE] [NAME ...]``.

Every module `bench_NAME.py` here is one benchmark, with

    async def measure() -> list[Figure]: ...

It warms up by itself, takes enough samples, and measures a named reference in the same run wherever
a figure is a ratio: machines differ, and so does one machine from minute to minute. What users can
measure as well, ``trio-sandbox bench``, is in `trio_sandbox.bench` and only used here. Where a machine lacks what one needs
it raises `UnmeasuredError`, and the report says why. Exit status 0 if every figure keeps its
limit, 1 if one does not, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import attrs
import trio

from tests.documented import replace_between_marks
from trio_sandbox.bench import Figure, LoadWatch, Machine, table

from ._unmeasured import UnmeasuredError

#: Those that take so long, or so much of the machine, that they run only if they are named.
BY_NAME = ("density",)


def known_benchmarks() -> list[str]:
    """Give the names of the benchmarks beside this module, sorted."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


async def measure(name: str) -> list[Figure]:
    """Run one benchmark."""
    module = importlib.import_module(f"{__package__}.bench_{name}")
    figures: list[Figure] = await module.measure()
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that were named, or all."""
    known = known_benchmarks()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"one of: {', '.join(known)}; default: all of them but {', '.join(BY_NAME)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks in FILE as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    if options.write is not None:
        replace_between_marks(options.write.read_text("utf-8"), "")  # a wrong file: say so before the long work
    results: dict[str, list[Figure]] = {}
    unmeasured: dict[str, str] = {}
    watch = LoadWatch()
    for name in options.names or [name for name in known if name not in BY_NAME]:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        # A run of its own for each: no benchmark inherits another's tasks.
        try:
            results[name] = trio.run(measure, name)
        except UnmeasuredError as exc:
            unmeasured[name] = str(exc)
    figures = [figure for group in results.values() for figure in group]
    machine, load = Machine.here(), watch.stop()
    notes = "".join(f"\n\nNot measured: {name}, since {reason}." for name, reason in unmeasured.items())
    report = f"{machine}; {load}\n\n{table(figures)}{notes}"
    if options.json:
        rows = {
            name: [{**attrs.asdict(figure), "within_limits": figure.within_limits} for figure in group]
            for name, group in results.items()
        }
        values = {
            "machine": attrs.asdict(machine),
            "load": attrs.asdict(load),
            "figures": rows,
            "unmeasured": unmeasured,
        }
        print(json.dumps(values, indent=2))
    else:
        print(report)
    if options.write is not None:
        options.write.write_text(replace_between_marks(options.write.read_text("utf-8"), report), "utf-8")
    return int(any(figure.within_limits is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
