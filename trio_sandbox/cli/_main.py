"""Where the command starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import _status
from ._descriptors import fill_closed_streams
from ._parser import build_parser
from ._report import complain_about

if TYPE_CHECKING:
    import argparse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line *arguments* (None: this process's own) and return the exit status.

    Wrong arguments raise `SystemExit` with status 2, as argparse does.
    """
    fill_closed_streams()
    if (
        reconfigure := getattr(sys.stdout, "reconfigure", None)
    ) is not None:  # a program that calls us may have something else there
        reconfigure(errors="backslashreplace")  # as standard error, for names that its encoding lacks
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        # Who started us may ignore it; we want to know how our children end.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = _status.SANDBOX_FAILURE
    try:
        try:
            status = _do(build_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()
    except* KeyboardInterrupt:
        status = _status.SIGNAL_BASE + signal.SIGINT
    except* BrokenPipeError:
        # As a program that does not handle SIGPIPE. What is still to be written must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        status = _status.SIGNAL_BASE + signal.SIGPIPE
    except* OSError as group:
        complain_about(group)
    return status


def _do(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    from .._errors import SandboxError

    status = _status.SANDBOX_FAILURE
    try:
        status = _find_command(options.command)(options)
    except* BrokenPipeError:
        raise
    except* (SandboxError, OSError) as group:
        # What is wrong with where we run. What can be wrong in a command's own work it says itself.
        complain_about(group)
    return status


def _find_command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return what does a command; the others are not imported, nor is anything for a mere --help."""
    match name:
        case "run":
            from ._run import run as command
        case "shell":
            from ._shell import shell as command
        case "bench":
            from ._bench import bench as command
        case "completion":
            from ._completion import completion as command
        case "doctor":
            from ._doctor import doctor as command
        case "fleet":
            from ._fleet import fleet as command
        case "image":
            from ._image import image as command
        case "kill":
            from ._ps import kill as command
        case "mcp":
            from ._mcp import mcp as command
        case "ps":
            from ._ps import ps as command
        case "template":
            from ._template import template as command
        case _:
            raise AssertionError(f"no command {name!r}")
    return command
