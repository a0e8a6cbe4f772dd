"""What ``--json`` prints. docs/reference/command-line.md says what the members mean, and a test compares it with what is printed."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class AddRow(Protocol):
    """Tells of one more thing: by a line for people, or by facts for programs."""

    def __call__(self, line: str, **facts: object) -> None: ...


def print_json(value: object) -> None:
    """Print one JSON document, which is ASCII."""
    print(json.dumps(value, indent=2), flush=True)


def print_facts(as_json: bool, line: str, **facts: object) -> None:
    """Print a line for people, or an object for programs."""
    if as_json:
        print_json(facts)
    else:
        print(line)


@contextmanager
def open_rows(as_json: bool) -> Generator[AddRow]:
    """Yield what to call with each thing that was done: it prints a line at once, or all are an array at the end.

    The array is printed after a failure, too: what was done before it is done.
    """
    rows: list[dict[str, object]] = []

    def add(line: str, **facts: object) -> None:
        if as_json:
            rows.append(facts)
        else:
            print(line, flush=True)

    try:
        yield add
    finally:
        if as_json:
            print_json(rows)
