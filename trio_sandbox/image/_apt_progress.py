"""Progress out of what mmdebstrap, apt and dpkg print: no I/O here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

#: A round of apt begins when it says how many packages it is going to install.
_ROUND = re.compile(r"\d+ upgraded, (\d+) newly installed")
_STEPS = (
    (re.compile(r"Get:\d+ \S+ \S+ \S+ (\S+) \S+ \S+ \["), "downloading"),
    (re.compile(r"Unpacking ([^\s:]+)"), "unpacking"),
    (re.compile(r"Setting up ([^\s:]+)"), "setting up"),
)
#: What mmdebstrap says of itself, by how it begins, and what that means to people. The rest is for experts.
_MESSAGES = {
    "I: running apt-get update": "fetching the lists of packages",
    "I: extracting archives": "unpacking packages",
    "I: installing essential packages": "installing essential packages",
    "I: installing remaining packages": "installing packages",
    "I: running --": "putting the files together",
    "I: removing tempdir": "tidying up",
}
#: Longer lines say nothing that is looked for here.
_LONGEST_LINE = 4096


class AptProgress:
    """Takes output as it comes, and reports what is happening, with a fraction that never falls.

    Args:
      report: Called with a message and the fraction that is done, from 0 to 1.
      rounds: What share of the work is done when the first, second, ... round of apt begins and,
        last, when the last one ends. How many packages a round has is known only when it begins.
      steps: How often each package of a round is named: for downloading alone, or for unpacking and
        setting up as well.
    """

    def __init__(self, report: Callable[[str, float], object], *, rounds: Sequence[float], steps: int) -> None:
        self._report = report
        self._rounds = tuple(rounds)
        self._steps = steps
        self._buffer = b""
        self._round = -1
        self._expected = 0
        self._done = 0
        self._fraction = 0.0

    def feed(self, data: bytes) -> None:
        """Take the next piece of output, cut anywhere."""
        *lines, rest = (self._buffer + data).split(b"\n")
        self._buffer = rest[-_LONGEST_LINE:]
        for line in lines:
            self._take(line.decode(errors="replace").strip())

    def _take(self, line: str) -> None:
        if match := _ROUND.match(line):
            self._round = min(self._round + 1, len(self._rounds) - 2)
            self._expected, self._done = int(match[1]) * self._steps, 0
            return
        for pattern, verb in _STEPS:
            if match := pattern.match(line):
                self._done += 1
                self._tell(f"{verb} {match[1]}")
                return
        for beginning, message in _MESSAGES.items():
            if line.startswith(beginning):
                self._tell(message)
                return

    def _tell(self, message: str) -> None:
        if self._round >= 0 and self._expected:
            begin, end = self._rounds[self._round : self._round + 2]
            fraction = begin + (end - begin) * min(self._done / self._expected, 1.0)
            self._fraction = max(self._fraction, fraction)
        self._report(message, self._fraction)
