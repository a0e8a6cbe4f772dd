"""``trio-sandbox bench``: this machine's own numbers."""

from __future__ import annotations

import argparse

import attrs
import trio

from .._config import Timeouts
from ..bench import OpenHost, Plan, measure
from ..host import open_host
from . import _status
from ._configs import host_config, sandbox_config
from ._progress import open_progress
from ._report import complain
from ._signals import end_on_signal

#: Seconds to boot: thirty-two at once on two cores under emulation take minutes, and that is to be measured.
_BOOT = 1800.0


#: How many sandboxes at once, unless told otherwise.
COUNTS = (1, 8, 32)
QUICK_COUNTS = (1,)


def bench(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    try:
        plan = Plan(
            measures=options.only,
            counts=options.counts or (QUICK_COUNTS if options.quick else COUNTS),
            quick=options.quick,
            image=options.image,
            sandbox=sandbox_config(options),
            host=attrs.evolve(host_config(options), timeouts=Timeouts(boot=_BOOT)),
        )
    except ValueError as exc:
        complain(str(exc))
        return _status.USAGE
    return trio.run(end_on_signal, lambda: run_bench(plan, quiet=options.quiet, as_json=options.json))


async def run_bench(plan: Plan, *, quiet: bool, as_json: bool, open_host: OpenHost = open_host) -> int:
    """Measure and print the report; return the exit status."""
    with open_progress(quiet=quiet) as show:
        report = await measure(plan, progress=show, open_host=open_host)
    print(report.as_json() if as_json else report.as_text(), flush=True)
    return _status.SANDBOX_FAILURE if report.failed else 0
