"""The numbers of our standard input, output and error, which are never other files'."""

from __future__ import annotations

import os
import sys


def fill_closed_streams() -> None:
    """Make ``/dev/null`` of what we were started without, before any other file gets its number.

    Without this, what a guest prints would go into whatever file we happen to open first.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            # What Python found closed, it left out, and print() to a standard error of None goes to standard output.
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
