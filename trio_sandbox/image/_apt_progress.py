"""Progress out of what mmdebstrap, apt and dpkg print."""

from __future__ import annotations

import re
from collections.abc import Callable

#: How much of the work each part is: downloading, unpacking, setting up. They add up to 1.
_INDEX, _DOWNLOAD, _UNPACK = 0.1, 0.35, 0.25
_SETUP = 1 - _INDEX - _DOWNLOAD - _UNPACK

_COUNT = re.compile(r"\d+ upgraded, (\d+) newly installed")
_GET = re.compile(r"Get:\d+ \S+ \S+ \S+ (\S+) \S+ \S+ ")
_UNPACKING = re.compile(r"Unpacking ([^\s:]+)")
_SETTING_UP = re.compile(r"Setting up ([^\s:]+)")


class AptProgress:
    """Takes output as it comes, and reports what is happening, with a fraction that never falls."""

    def __init__(self, report: Callable[[str, float | None], object]) -> None:
        self._report = report
        self._buffer = b""
        self._expected = 0
        self._done = {"download": 0, "unpack": 0, "setup": 0}
        self._fraction = 0.0

    def feed(self, data: bytes) -> None:
        """Take the next piece of output."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace").strip())

    def _line(self, line: str) -> None:
        if line.startswith("I: "):
            self._report(line[3:].rstrip("."), self._fraction)
        elif match := _COUNT.match(line):
            self._expected += int(match[1])
        elif match := _GET.match(line):
            self._step("download", f"downloading {match[1]}")
        elif match := _UNPACKING.match(line):
            self._step("unpack", f"unpacking {match[1]}")
        elif match := _SETTING_UP.match(line):
            self._step("setup", f"setting up {match[1]}")

    def _step(self, part: str, message: str) -> None:
        self._done[part] += 1
        total = max(self._expected, 1)
        fraction = _INDEX + sum(
            weight * min(self._done[name] / total, 1)
            for name, weight in (("download", _DOWNLOAD), ("unpack", _UNPACK), ("setup", _SETUP))
        )
        self._fraction = max(self._fraction, min(fraction, 1.0))
        self._report(message, self._fraction)
