"""The command line's grammar: argparse, and nothing that does anything."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from .. import constants
from .._metadata import version
from . import _examples
from ._arguments import (
    MEASURES,
    address,
    count,
    counts,
    disk_mib,
    download,
    guest_directory,
    image_name,
    measures,
    memory_mib,
    network_rule,
    seconds,
    upload,
    variable,
)
from ._command_parser import CommandParser, Once
from ._status import BENCH_EXIT_STATUSES, EXIT_STATUSES, SHELL_EXIT_STATUSES


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of the whole command line."""
    parser = CommandParser(
        prog="trio-sandbox", description="Run untrusted code in throw-away virtual machines.", epilog=_examples.ALL
    )
    parser.add_argument("--version", action=_ShowVersion, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    _fill_run(
        commands.add_parser(
            "run",
            help="run a program in a fresh virtual machine",
            description="Run a program in a fresh virtual machine, to its end, with our standard input, output and error: "
            "as python3 FILE, node FILE or bash FILE would.",
            epilog=_examples.RUN + EXIT_STATUSES,
        )
    )
    _fill_shell(
        commands.add_parser(
            "shell",
            help="open a shell in a fresh virtual machine",
            description="Open a shell in a fresh virtual machine, for as long as the shell runs. "
            "Ctrl-] ends both from outside, whatever the guest does.",
            epilog=_examples.SHELL + SHELL_EXIT_STATUSES,
        )
    )
    _fill_mcp(
        commands.add_parser(
            "mcp",
            help="serve tools that work in sandboxes, to an AI model's program",
            description="Serve tools that work in a sandbox by the Model Context Protocol: to the program that has started this, "
            "on standard input and output, or by HTTP. Each session has a sandbox of its own. Needs the extra mcp.",
            epilog=_examples.MCP,
        )
    )
    _fill_bench(
        commands.add_parser(
            "bench",
            help="measure how fast sandboxes are on this machine",
            description="Measure how fast sandboxes are on this machine, and what they cost. It takes some minutes under "
            "software emulation; a busy machine gives figures of no use.",
            epilog=_examples.BENCH + BENCH_EXIT_STATUSES,
        )
    )
    _fill_doctor(
        commands.add_parser(
            "doctor",
            help="say what is there, what is missing and how to get it",
            description="Say what of this machine is there, what is missing and how to get it. "
            "Exit status 0: sandboxes can run; 1: something is missing.",
            epilog=_examples.DOCTOR,
        )
    )
    _fill_image(commands.add_parser("image", help="build, list and remove images", epilog=_examples.IMAGE))
    _fill_fleet(
        commands.add_parser(
            "fleet",
            help="list and drain the nodes of fleets",
            description="List and drain the nodes of the fleets on a Ray cluster. Needs the extra ray.",
            epilog=_examples.FLEET,
        )
    )
    _fill_template(commands.add_parser("template", help="list and remove saved machines", epilog=_examples.TEMPLATE))
    return parser


class _ShowVersion(argparse.Action):
    """What argparse has for this wants to know the version before anybody asks."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, help: str) -> None:  # noqa: A002 - argparse's
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        print(f"{parser.prog} {version()}")
        parser.exit()


def _fill_run(run: CommandParser) -> None:
    run.takes_program = True
    run.usage = "%(prog)s [OPTION ...] (FILE | - | -c CODE) [ARGUMENT ...]"
    run.add_argument(
        "-c",
        dest="code",
        action=Once,
        metavar="CODE",
        help="the code itself; what follows the options is its arguments",
    )
    run.add_argument(
        "--language",
        metavar="NAME",
        help="python, javascript or shell (default: what FILE's name or first line says, else what the image is for)",
    )
    run.add_argument(
        "-e",
        dest="environment",
        type=variable,
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set a variable of the program's environment; without a value: to the one it has here",
    )
    run.add_argument(
        "--upload",
        dest="uploads",
        type=upload,
        action="append",
        default=[],
        metavar="HOST[:GUEST]",
        help="copy a file or directory into the guest first",
    )
    run.add_argument(
        "--download",
        dest="downloads",
        type=download,
        action="append",
        default=[],
        metavar="GUEST[:HOST]",
        help="copy a file or directory back in the end",
    )
    run.add_argument(
        "--workspace",
        type=Path,
        metavar="DIR",
        help="run in a copy of this directory, in which FILE is, and bring back what the program changes there",
    )
    _add_packages(run, "that the program finds installed")
    run.add_argument(
        "-w",
        "--workdir",
        type=guest_directory,
        metavar="DIR",
        help="where the program starts in the guest, and is copied to (default: the home directory)",
    )
    _add_machine(run, image=None)
    _add_network(run)
    run.add_argument(
        "--timeout",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="stop the program after that long (default: never)",
    )
    run.add_argument(
        "--json", action="store_true", help="print one JSON object in the end, with what the program printed"
    )
    run.add_argument("--timings", action="store_true", help="say on standard error how long each step took")
    run.add_argument(
        "--trace", action="store_true", help="draw on standard error what was done when, and how long it took"
    )
    _add_quiet(run)
    _add_cache_dir(run)


def _fill_shell(shell: argparse.ArgumentParser) -> None:
    shell.add_argument(
        "argv", nargs="*", metavar="COMMAND", help="run this on the terminal instead (default: the user's shell)"
    )
    shell.add_argument("--user", metavar="NAME", help="who to be in the guest: a name or a number (default: 1000)")
    _add_packages(shell, "to have installed")
    _add_machine(shell)
    _add_network(shell)
    _add_quiet(shell)
    _add_cache_dir(shell)


def _fill_mcp(mcp: argparse.ArgumentParser) -> None:
    mcp.add_argument(
        "--http",
        type=address,
        metavar="[HOST:]PORT",
        help="serve HTTP at an address of this machine's own (default: standard input and output)",
    )
    mcp.add_argument(
        "--idle",
        type=seconds,
        default=900.0,
        metavar="SECONDS",
        help="close a sandbox that nobody has used for so long (default: %(default)g)",
    )
    mcp.add_argument(
        "--sandboxes",
        type=count,
        default=16,
        metavar="N",
        help="how many may be open at a time, by HTTP (default: %(default)s)",
    )
    _add_machine(mcp)
    _add_network(mcp)
    _add_quiet(mcp)
    _add_cache_dir(mcp)


def _fill_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--quick", action="store_true", help="take few samples")
    bench.add_argument(
        "--only",
        type=measures,
        default=MEASURES,
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

    build = actions.add_parser("build", help="build images now, not when they are first used")
    build.add_argument(
        "names", type=image_name, nargs="*", default=["python"], metavar="NAME", help="image names (default: python)"
    )
    _add_packages(build, "to build them with")
    _add_quiet(build)
    _add_cache_dir(build)

    export = actions.add_parser(
        "export", help="write an image, with all layers below it, to a file for another machine"
    )
    export.add_argument("name", type=image_name, metavar="NAME", help="image name, as list shows it")
    export.add_argument("file", type=Path, metavar="FILE", help="the new file")
    _add_cache_dir(export)

    importing = actions.add_parser("import", help="take an image from a file that export wrote; as safe as its maker")
    importing.add_argument("file", type=Path, metavar="FILE", help="the file")
    _add_quiet(importing)
    _add_cache_dir(importing)

    inspect = actions.add_parser("inspect", help="print all that is known of an image and what it stands on, as JSON")
    inspect.add_argument("name", type=image_name, metavar="NAME", help="image name")
    _add_cache_dir(inspect)

    listing = actions.add_parser("list", help="list what is in the cache")
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_cache_dir(listing)

    remove = actions.add_parser("rm", help="remove images from the cache, and the layers on them")
    remove.add_argument("names", type=image_name, nargs="+", metavar="NAME", help="image names or digests")
    _add_cache_dir(remove)

    prune = actions.add_parser("prune", help="remove what interrupted builds and older versions left")
    prune.add_argument(
        "--to",
        type=disk_mib,
        metavar="SIZE",
        help="then remove layers, those used longest ago first, until all images take no more: 512 or 512M for MiB, 20G for GiB. "
        "What an open sandbox, a template or a saved sandbox stands on stays",
    )
    _add_cache_dir(prune)


def _fill_fleet(fleet: argparse.ArgumentParser) -> None:
    fleet.add_argument(
        "--address", default="auto", metavar="HOST:PORT", help="of the Ray cluster (default: the one of this machine)"
    )
    actions = fleet.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="say what each node has, for each program that uses it")
    status.add_argument("--json", action="store_true", help="print JSON")
    drain = actions.add_parser(
        "drain", help="have a node open no more sandboxes, wait until it has none, and end our process there"
    )
    drain.add_argument("node", metavar="NODE", help="the node's name, as `status` says it")
    drain.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="end sandboxes that are left then (default: wait)"
    )


def _fill_template(template: argparse.ArgumentParser) -> None:
    actions = template.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="list the templates and the saved sandboxes in the cache")
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_cache_dir(listing)

    remove = actions.add_parser("rm", help="remove templates and saved sandboxes from the cache")
    remove.add_argument(
        "keys", nargs="+", metavar="KEY", help="names of saved sandboxes, or keys, or their first 6 characters or more"
    )
    _add_cache_dir(remove)

    prune = actions.add_parser(
        "prune",
        help="remove what is damaged, left by killed processes, of an image that is gone, or over the budget",
    )
    _add_cache_dir(prune)


def _add_machine(parser: argparse.ArgumentParser, *, image: str | None = "python", templates: bool = True) -> None:
    parser.add_argument(
        "--image",
        type=image_name,
        default=image,
        metavar="NAME",
        help=f"what is seen inside: python, node, data, or a container image such as docker://debian:12 (default: {image or 'one that has the language'})",
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
    parser.set_defaults(no_templates=False, network=[], proxy=None)
    if templates:
        parser.add_argument(
            "--no-templates", action="store_true", help="boot, and neither write nor use a saved machine"
        )
    parser.add_argument("--no-build", action="store_true", help="fail where the image is not built yet")


def _add_packages(parser: argparse.ArgumentParser, what_for: str) -> None:
    parser.add_argument(
        "--with",
        dest="packages",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help=f"a package {what_for}: of Python's, such as 'pandas>=2', or of npm's for JavaScript; more than once for more",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        action="append",
        type=network_rule,
        metavar="HOST[:PORT]",
        help="what may be reached: pypi.org, '*.pythonhosted.org', db.example.org:5432, or open for every public host; "
        "more than once for more (default: nothing)",
    )
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help="an HTTP proxy that connections go through; environment: that of the variable https_proxy (default: none)",
    )


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where images are kept (default: the user's cache directory)"
    )
