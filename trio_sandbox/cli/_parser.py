"""The command line's grammar: argparse, and nothing that does anything."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from .. import __version__, constants
from ..bench import MEASURES
from ._status import BENCH_EXIT_STATUSES, EXIT_STATUSES, SHELL_EXIT_STATUSES

_MEMORY = re.compile(r"(\d+)(M|MiB|G|GiB)?", re.IGNORECASE)


def memory_mib(text: str) -> int:
    """Read an amount of memory: ``512`` and ``512M`` are MiB, ``2G`` is GiB."""
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 512 or 512M (MiB), or 2G (GiB)")
    unit = (match[2] or "M")[0].upper()
    return int(match[1]) * {"M": 1, "G": 1024}[unit]


def seconds(text: str) -> float:
    """Read a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:  # NaN is not above 0 either
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Read positive numbers with commas between them."""
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} are not positive numbers with commas between them")
    return tuple(dict.fromkeys(map(int, words)))


def measures(text: str) -> tuple[str, ...]:
    """Read names of what can be measured, with commas between them."""
    names = tuple(text.split(","))
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} can't be measured; there are: {', '.join(MEASURES)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="trio-sandbox", description="Run untrusted code in throw-away virtual machines.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _fill_run(
        commands.add_parser(
            "run",
            help="run code in a fresh virtual machine",
            description="Run code in a fresh virtual machine, and show what it prints while it prints it.",
            epilog=EXIT_STATUSES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    _fill_shell(
        commands.add_parser(
            "shell",
            help="open a shell in a fresh virtual machine",
            description="Open a shell in a fresh virtual machine, for as long as the shell runs. "
            "Ctrl-] ends both from outside, whatever the guest does.",
            epilog=SHELL_EXIT_STATUSES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    _fill_bench(
        commands.add_parser(
            "bench",
            help="measure how fast sandboxes are on this machine",
            description="Measure how fast sandboxes are on this machine, and what they cost. It takes some minutes under "
            "software emulation; a busy machine gives figures of no use.",
            epilog=BENCH_EXIT_STATUSES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    _fill_doctor(
        commands.add_parser(
            "doctor",
            help="say what is there, what is missing and how to get it",
            description="Say what of this machine is there, what is missing and how to get it. "
            "Exit status 0: sandboxes can run; 1: something is missing.",
            allow_abbrev=False,
        )
    )
    _fill_image(commands.add_parser("image", help="build, list and remove images", allow_abbrev=False))
    _fill_template(commands.add_parser("template", help="list and remove saved machines", allow_abbrev=False))
    return parser


def _fill_run(run: argparse.ArgumentParser) -> None:
    source = run.add_mutually_exclusive_group()
    source.add_argument("-c", dest="code", metavar="CODE", help="the code itself")
    source.add_argument("file", nargs="?", metavar="FILE", help="a file of code; - (as without FILE): standard input")
    run.add_argument(
        "--language",
        metavar="NAME",
        help="python, javascript or shell (default: what the image is for)",
    )
    _add_machine(run)
    run.add_argument(
        "--timeout",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="stop the code after that long (default: never)",
    )
    run.add_argument("--timings", action="store_true", help="say on standard error how long each step took")
    _add_quiet(run)
    _add_cache_dir(run)


def _fill_shell(shell: argparse.ArgumentParser) -> None:
    shell.add_argument(
        "argv", nargs="*", metavar="COMMAND", help="run this on the terminal instead (default: the user's shell)"
    )
    shell.add_argument("--user", metavar="NAME", help="who to be in the guest: a name or a number (default: 1000)")
    _add_machine(shell)
    _add_quiet(shell)
    _add_cache_dir(shell)


def _fill_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--quick", action="store_true", help="take few samples")
    bench.add_argument(
        "--only",
        type=measures,
        default=tuple(MEASURES),
        metavar="NAMES",
        help=f"measure these only, with commas between them: {', '.join(MEASURES)}",
    )
    bench.add_argument(
        "-n",
        dest="counts",
        type=counts,
        metavar="N",
        help="how many sandboxes at once; several numbers with commas between them (default: 1,8,32; with --quick: 1)",
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    _add_machine(bench, templates=False)
    _add_quiet(bench)
    _add_cache_dir(bench)


def _fill_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_cache_dir(doctor)


def _fill_image(image: argparse.ArgumentParser) -> None:
    actions = image.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="build images now, not when they are first used", allow_abbrev=False)
    build.add_argument("names", nargs="*", default=["python"], metavar="NAME", help="image names (default: python)")
    _add_quiet(build)
    _add_cache_dir(build)

    listing = actions.add_parser("list", help="list what is in the cache", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_cache_dir(listing)

    remove = actions.add_parser("rm", help="remove images from the cache", allow_abbrev=False)
    remove.add_argument("names", nargs="+", metavar="NAME", help="image names or digests")
    _add_cache_dir(remove)

    prune = actions.add_parser(
        "prune", help="remove what interrupted builds and older versions left", allow_abbrev=False
    )
    _add_cache_dir(prune)


def _fill_template(template: argparse.ArgumentParser) -> None:
    actions = template.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser(
        "list", help="list the templates and the saved sandboxes in the cache", allow_abbrev=False
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_cache_dir(listing)

    remove = actions.add_parser("rm", help="remove templates and saved sandboxes from the cache", allow_abbrev=False)
    remove.add_argument(
        "keys", nargs="+", metavar="KEY", help="names of saved sandboxes, or keys, or their first 6 characters or more"
    )
    _add_cache_dir(remove)

    prune = actions.add_parser(
        "prune",
        help="remove what is damaged, left by killed processes, of an image that is gone, or over the budget",
        allow_abbrev=False,
    )
    _add_cache_dir(prune)


def _add_machine(parser: argparse.ArgumentParser, *, templates: bool = True) -> None:
    parser.add_argument(
        "--image", default="python", metavar="NAME", help="what is seen inside: python or node (default: %(default)s)"
    )
    parser.add_argument(
        "--memory",
        type=memory_mib,
        default=constants.DEFAULT_MEMORY_MIB,
        metavar="MIB",
        help=f"RAM: 512 or 512M for MiB, 2G for GiB (default: %(default)s; at least {constants.MINIMUM_MEMORY_MIB})",
    )
    parser.add_argument("--vcpus", type=int, default=1, metavar="N", help="virtual CPUs (default: %(default)s)")
    parser.add_argument(
        "--accelerator",
        choices=("auto", "kvm", "tcg"),
        default="auto",
        help="what runs the guest (default: %(default)s)",
    )
    parser.add_argument(
        "--require-hardware",
        action="store_true",
        help="refuse software emulation, which QEMU does not count as a security boundary",
    )
    parser.set_defaults(no_templates=False)
    if templates:
        parser.add_argument(
            "--no-templates", action="store_true", help="boot, and neither write nor use a saved machine"
        )
    parser.add_argument("--no-build", action="store_true", help="fail where the image is not built yet")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where images are kept (default: the user's cache directory)"
    )
