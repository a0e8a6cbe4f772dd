"""Where the command starts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import _bench, _doctor, _image, _run, _shell, _status, _template
from ._parser import build_parser

if TYPE_CHECKING:
    import argparse

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run.run,
    "shell": _shell.shell,
    "bench": _bench.bench,
    "doctor": _doctor.doctor,
    "image": _image.image,
    "template": _template.template,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line *arguments* (None: this process's own) and return the exit status.

    Wrong arguments raise `SystemExit` with status 2, as argparse does.
    """
    options = build_parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return _status.SIGNAL_BASE + signal.SIGINT
