"""Fuzz one parser, as a process of its own, since libFuzzer ends it: ``python -m tests.soak._fuzzer NAME SECONDS LIBFUZZER_ARGUMENT...``.

The last line that it prints to standard output before it ends, or dies, is JSON: how long the slowest input took.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def main(name: str, limit: float, arguments: list[str]) -> None:
    """Never return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["trio_sandbox"]):
        parsers = importlib.import_module("tests._parsers").PARSERS
    parser = parsers[name]
    slowest = 0.0

    def attempt(data: bytes) -> None:
        nonlocal slowest
        started = time.thread_time()
        try:
            parser.parse(data)
        except parser.errors:
            pass
        took = time.thread_time() - started
        if took > slowest:
            slowest = took
            print(json.dumps({"milliseconds": round(took * 1000, 1), "bytes": len(data)}), flush=True)
            if took > limit:
                raise TimeoutError(f"{took:.3f} s for {len(data)} bytes")

    atheris.Setup([sys.argv[0], *arguments], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
