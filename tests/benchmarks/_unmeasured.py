"""What a benchmark can't measure here."""

from __future__ import annotations


class UnmeasuredError(Exception):
    """This machine lacks something that the benchmark needs; the message says what."""
