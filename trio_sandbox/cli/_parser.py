"""The command line's grammar: argparse, and nothing that does anything."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    patience,
    seconds,
    upload,
    variable,
)
from ._command_parser import CommandParser, Once
from ._options import add_cache_dir, add_json, add_machine, add_network, add_packages, add_quiet
from ._status import BENCH_EXIT_STATUSES, EXIT_STATUSES, SHELL_EXIT_STATUSES

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]  # pyright: ignore[reportPrivateUsage] - it has no other name


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
            description="Run a program to its end in a fresh virtual machine, as python3 FILE, node FILE or bash FILE would. "
            "It has this command's standard input, output and error.",
            epilog=_examples.RUN + EXIT_STATUSES,
        )
    )
    _fill_shell(
        commands.add_parser(
            "shell",
            help="open a shell in a fresh virtual machine",
            description="Open a shell in a fresh virtual machine. When the shell ends, the virtual machine is destroyed. "
            "Ctrl-] ends both from outside, whatever the guest does.",
            epilog=_examples.SHELL + SHELL_EXIT_STATUSES,
        )
    )
    _fill_mcp(
        commands.add_parser(
            "mcp",
            help="serve tools that work in sandboxes, to an AI model's program",
            description="Serve tools that work in a sandbox, by the Model Context Protocol: on standard input and output, to the "
            "program that has started this command, or by HTTP. Each session has a sandbox of its own. Needs the extra mcp.",
            epilog=_examples.MCP,
        )
    )
    add_json(
        commands.add_parser(
            "ps",
            help="list the sandboxes that run on this machine",
            description="List the sandboxes of this user that run on this machine, of any process. "
            "Exit status 0, or 1 if it can't find out.",
            epilog=_examples.PS,
        )
    )
    _fill_kill(
        commands.add_parser(
            "kill",
            help="end the virtual machines of sandboxes, of any process",
            description="End the virtual machines of sandboxes of this user, at once, and nothing else. In the program that has opened "
            "such a sandbox, requests under way raise OutcomeUnknownError, whose cause is a VmDiedError, and later ones SandboxClosedError. "
            "Exit status 0, or 1 if one was not ended.",
            epilog=_examples.KILL,
        )
    )
    _fill_bench(
        commands.add_parser(
            "bench",
            help="measure how fast sandboxes are on this machine",
            description="Measure how fast sandboxes are on this machine, and what they cost. It takes some minutes under "
            "software emulation; figures from a busy machine are useless.",
            epilog=_examples.BENCH + BENCH_EXIT_STATUSES,
        )
    )
    _fill_doctor(
        commands.add_parser(
            "doctor",
            help="say what is installed, what is missing and how to get it",
            description="Say what is installed on this machine, what is missing and how to get it. "
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
    _fill_template(
        commands.add_parser("template", help="list and remove templates and saved sandboxes", epilog=_examples.TEMPLATE)
    )
    _fill_completion(
        commands.add_parser(
            "completion",
            help="print the script for completion in your shell",
            description="Print the script that makes a shell complete this command line. Needs the extra cli.",
            epilog=_examples.COMPLETION,
        )
    )
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
        help="set a variable of the program's environment; without a value, copy yours",
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
        help="copy a file or directory back at the end",
    )
    run.add_argument(
        "--workspace",
        type=Path,
        metavar="DIR",
        help="run in a copy of this directory, which contains FILE, and bring back the program's changes",
    )
    add_packages(run, "that the program finds installed")
    run.add_argument(
        "-w",
        "--workdir",
        type=guest_directory,
        metavar="DIR",
        help="the directory in the guest that the program is copied to and starts in (default: the home directory)",
    )
    add_machine(run, image=None)
    add_network(run)
    run.add_argument(
        "--timeout",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="stop the program after that time (default: never)",
    )
    add_json(run, "print one JSON object at the end, with the program's output in it")
    run.add_argument("--timings", action="store_true", help="say on standard error how long each step took")
    run.add_argument("--trace", action="store_true", help="draw the steps and their times on standard error, as bars")
    add_quiet(run)
    add_cache_dir(run)


def _fill_shell(shell: argparse.ArgumentParser) -> None:
    shell.add_argument(
        "argv", nargs="*", metavar="COMMAND", help="run this on the terminal instead (default: the user's shell)"
    )
    shell.add_argument("--user", metavar="NAME", help="the user in the guest: a name or a number (default: 1000)")
    add_packages(shell, "to have installed")
    add_machine(shell)
    add_network(shell)
    add_quiet(shell)
    add_cache_dir(shell)


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
        help="close a sandbox that nobody has used for that time (default: %(default)g)",
    )
    mcp.add_argument(
        "--sandboxes",
        type=count,
        default=16,
        metavar="N",
        help="how many may be open at a time, by HTTP (default: %(default)s)",
    )
    add_machine(mcp)
    add_network(mcp)
    add_quiet(mcp)
    add_cache_dir(mcp)


def _fill_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--quick", action="store_true", help="take few samples")
    bench.add_argument(
        "--only",
        type=measures,
        default=MEASURES,
        metavar="NAMES",
        help=f"measure only these, with commas between them: {', '.join(MEASURES)}",
    )
    bench.add_argument(
        "-n",
        dest="counts",
        type=counts,
        metavar="N",
        help="how many sandboxes at once; several numbers with commas between them (default: 1,8,32; with --quick: 1)",
    )
    add_json(bench)
    add_machine(bench, templates=False)
    add_quiet(bench)
    add_cache_dir(bench)


def _fill_doctor(doctor: argparse.ArgumentParser) -> None:
    add_json(doctor)
    add_cache_dir(doctor)


def _fill_kill(kill: argparse.ArgumentParser) -> None:
    which = kill.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "ids", nargs="*", default=[], metavar="ID", help="the sandbox's id, as `trio-sandbox ps` shows it"
    )
    which.add_argument("--all", action="store_true", help="all that run on this machine for this user")
    add_json(kill)


def _fill_image(image: argparse.ArgumentParser) -> None:
    actions = image.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = _add_action(
        actions,
        "build",
        "build images now, not when they are first used",
        "trio-sandbox image build",
        "trio-sandbox image build python node",
        "trio-sandbox image build --with pandas",
    )
    build.add_argument(
        "names", type=image_name, nargs="*", default=["python"], metavar="NAME", help="image names (default: python)"
    )
    add_packages(build, "to build them with")
    add_json(build)
    add_quiet(build)
    add_cache_dir(build)

    export = _add_action(
        actions,
        "export",
        "write an image, with all layers below it, to a file for another machine",
        "trio-sandbox image export python python.tar",
    )
    export.add_argument("name", type=image_name, metavar="NAME", help="image name, as list shows it")
    export.add_argument("file", type=Path, metavar="FILE", help="the new file")
    add_json(export)
    add_cache_dir(export)

    importing = _add_action(
        actions,
        "import",
        "take an image from a file that export wrote; as safe as its maker",
        "trio-sandbox image import python.tar",
    )
    importing.add_argument("file", type=Path, metavar="FILE", help="the file")
    add_json(importing)
    add_quiet(importing)
    add_cache_dir(importing)

    inspect = _add_action(
        actions,
        "inspect",
        "print all that is known of an image and the layers below it, as JSON",
        "trio-sandbox image inspect python",
    )
    inspect.add_argument("name", type=image_name, metavar="NAME", help="image name")
    add_json(inspect, "print JSON, as it always does")
    add_cache_dir(inspect)

    listing = _add_action(
        actions, "list", "list what is in the cache", "trio-sandbox image list", "trio-sandbox image list --json"
    )
    add_json(listing)
    add_cache_dir(listing)

    remove = _add_action(
        actions, "rm", "remove images from the cache, and the layers on them", "trio-sandbox image rm node data"
    )
    remove.add_argument("names", type=image_name, nargs="+", metavar="NAME", help="image names or digests")
    add_json(remove)
    add_cache_dir(remove)

    prune = _add_action(
        actions,
        "prune",
        "remove what interrupted builds and older versions left",
        "trio-sandbox image prune",
        "trio-sandbox image prune --to 20G",
    )
    prune.add_argument(
        "--to",
        type=disk_mib,
        metavar="SIZE",
        help="then remove layers, those used longest ago first, until all images take no more: 512 or 512M for MiB, 20G for GiB. "
        "What an open sandbox, a template or a saved sandbox stands on stays",
    )
    add_json(prune)
    add_cache_dir(prune)


def _fill_fleet(fleet: argparse.ArgumentParser) -> None:
    fleet.add_argument(
        "--address", default="auto", metavar="HOST:PORT", help="the Ray cluster (default: the one of this machine)"
    )
    actions = fleet.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = _add_action(
        actions,
        "status",
        "say what each node has, for each program that uses it",
        "trio-sandbox fleet status",
        "trio-sandbox fleet --address head:6379 status --json",
    )
    add_json(status)
    drain = _add_action(
        actions,
        "drain",
        "have a node open no more sandboxes, wait until it has none, and end our process there",
        "trio-sandbox fleet drain worker-3f9a61c2 --timeout 600",
    )
    drain.add_argument("node", metavar="NODE", help="the node's name, as `status` shows it")
    drain.add_argument(
        "--timeout", type=patience, metavar="SECONDS", help="then end the sandboxes that are left (default: wait)"
    )
    add_json(drain)


def _fill_template(template: argparse.ArgumentParser) -> None:
    actions = template.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = _add_action(
        actions,
        "list",
        "list the templates and the saved sandboxes in the cache",
        "trio-sandbox template list",
        "trio-sandbox template list --json",
    )
    add_json(listing)
    add_cache_dir(listing)

    remove = _add_action(
        actions,
        "rm",
        "remove templates and saved sandboxes from the cache",
        "trio-sandbox template rm 3f9a61c2 my-session",
    )
    remove.add_argument(
        "keys", nargs="+", metavar="KEY", help="names of saved sandboxes, or keys, or their first 6 characters or more"
    )
    add_json(remove)
    add_cache_dir(remove)

    prune = _add_action(
        actions,
        "prune",
        "remove what is damaged, left by killed processes, of an image that is gone, or over the budget",
        "trio-sandbox template prune",
    )
    add_json(prune)
    add_cache_dir(prune)


def _fill_completion(completion: argparse.ArgumentParser) -> None:
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")


def _add_action(actions: Actions, name: str, purpose: str, *examples: str) -> argparse.ArgumentParser:
    """Add what stands behind a command, such as ``image``."""
    description = f"{purpose[0].upper()}{purpose[1:]}."
    epilog = "\n  ".join(["examples:", *examples])
    return actions.add_parser(name, help=purpose, description=description, epilog=epilog)
