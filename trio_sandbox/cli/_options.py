"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import constants
from ._arguments import image_name, memory_mib, network_rule


def add_json(parser: argparse.ArgumentParser, what: str = "print JSON") -> None:
    """Whether it prints for programs."""
    parser.add_argument("--json", action="store_true", help=what)


def add_machine(parser: argparse.ArgumentParser, *, image: str | None = "python", templates: bool = True) -> None:
    """What the machine is, and what runs it."""
    parser.add_argument(
        "--image",
        type=image_name,
        default=image,
        metavar="NAME",
        help=f"the image: python, node, data, or a container image such as docker://debian:12 (default: {image or 'one that has the language'})",
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
        parser.add_argument("--no-templates", action="store_true", help="boot, and neither write nor use a template")
    parser.add_argument("--no-build", action="store_true", help="fail if the image is not built yet")


def add_packages(parser: argparse.ArgumentParser, what_for: str) -> None:
    """What is installed first; *what_for* says for whom."""
    parser.add_argument(
        "--with",
        dest="packages",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help=f"a package {what_for}: from Python's index, such as 'pandas>=2', or from npm for JavaScript; may be repeated",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """What the guest may reach."""
    parser.add_argument(
        "--network",
        action="append",
        type=network_rule,
        metavar="HOST[:PORT]",
        help="what the guest may reach: pypi.org, '*.pythonhosted.org', db.example.org:5432, or open for every public host; "
        "may be repeated (default: nothing)",
    )
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help="an HTTP proxy that connections go through; environment: the one in the variable https_proxy (default: none)",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Whether progress is shown."""
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """Where images are."""
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where images are kept (default: the user's cache directory)"
    )
