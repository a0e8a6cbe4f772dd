"""Run the benchmarks: ``python -m tests.benchmarks [--json] [--write FILE] [NAME ...]``.

Every module `bench_NAME.py` here is one benchmark. Exit status 0 if every figure keeps its
limit, 1 if one does not, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

import attrs
import trio

from ._figures import Figure

START_MARK = "<!-- figures: start -->"
END_MARK = "<!-- figures: end -->"


def known_benchmarks() -> list[str]:
    """Give the names of the benchmarks beside this module, sorted."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def limit_text(figure: Figure) -> str:
    """Say the limit as a person would: ``<= 4`` or ``>= 20``."""
    parts = [
        f"{sign} {bound:g}" for sign, bound in (("<=", figure.at_most), (">=", figure.at_least)) if bound is not None
    ]
    return " and ".join(parts)


def verdict(figure: Figure) -> str:
    """Say whether the limit was kept; nothing where there is none."""
    return {None: "", True: "ok", False: "OVER"}[figure.within_limits]


def table(figures: list[Figure]) -> str:
    """Lay the figures out as a Markdown table, which a terminal shows as well."""
    rows = [("what", "median", "p95", "unit", "limit", "", "runs")]
    rows += [
        (
            figure.name,
            f"{figure.value:.3g}" if figure.value < 100 else f"{figure.value:.0f}",
            "" if figure.p95 is None else f"{figure.p95:.3g}" if figure.p95 < 100 else f"{figure.p95:.0f}",
            figure.unit,
            limit_text(figure),
            verdict(figure),
            str(figure.samples),
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Say what the figures were measured on, without naming the machine."""
    return {
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "trio": trio.__version__,
    }


def replace_between_marks(text: str, figures: str) -> str:
    """Put *figures* between the two marks of *text*; ValueError if it has not exactly one of each."""
    if text.count(START_MARK) != 1 or text.count(END_MARK) != 1:
        raise ValueError(f"the file must have exactly one line {START_MARK!r} and one {END_MARK!r}")
    before, _, rest = text.partition(START_MARK)
    _, _, after = rest.partition(END_MARK)
    return f"{before}{START_MARK}\n{figures}\n{END_MARK}{after}"


async def measure(name: str) -> list[Figure]:
    """Run one benchmark."""
    module = importlib.import_module(f"{__package__}.bench_{name}")
    figures: list[Figure] = await module.measure()
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that were named, or all."""
    known = known_benchmarks()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(known)}; default: all of them")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks in FILE as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    if options.write is not None:
        replace_between_marks(options.write.read_text("utf-8"), "")  # a wrong file: say so before the long work
    results: dict[str, list[Figure]] = {}
    for name in options.names or known:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        # A run of its own for each: no benchmark inherits another's tasks.
        results[name] = trio.run(measure, name)
    figures = [figure for group in results.values() for figure in group]
    report = ", ".join(f"{key} {value}" for key, value in machine().items()) + "\n\n" + table(figures)
    if options.json:
        rows = {
            name: [{**attrs.asdict(figure), "within_limits": figure.within_limits} for figure in group]
            for name, group in results.items()
        }
        print(json.dumps({"machine": machine(), "figures": rows}, indent=2))
    else:
        print(report)
    if options.write is not None:
        options.write.write_text(replace_between_marks(options.write.read_text("utf-8"), report), "utf-8")
    return int(any(figure.within_limits is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
