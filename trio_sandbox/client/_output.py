"""The end of what a run or a process printed, kept for whoever asks what it said when it did not go well."""

from __future__ import annotations

from typing import Literal, final

import trio

from .._quote import quote_lines
from .._results import RunOutput, RunTimings, decode
from ..constants import OUTPUT_TAIL_BYTES

Outcome = Literal["unsent", "running", "ended", "stopped", "refused", "broken"]

#: Characters of each output in a note.
_NOTE_LIMIT = 2000


@final
class Tail:
    """The last `constants.OUTPUT_TAIL_BYTES` of a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes | bytearray) -> None:
        """Take what comes next."""
        self._data += data[-OUTPUT_TAIL_BYTES:]
        if len(self._data) > 2 * OUTPUT_TAIL_BYTES:  # seldom, and never for what is short
            del self._data[:-OUTPUT_TAIL_BYTES]

    def __bytes__(self) -> bytes:
        return bytes(self._data[-OUTPUT_TAIL_BYTES:])


@final
class RunTrace:
    """What is known of one run, from the request to its end; the run itself writes it, and nobody else."""

    def __init__(self, language: str, asked_at: float | None = None) -> None:
        self.language = language
        self.asked_at = asked_at
        """When the run was asked for, on Trio's clock; None: when it was sent."""
        self.sent_at: float | None = None
        """When the guest was sent it; None: not yet."""
        self.first_output_at: float | None = None
        """When the first of what it printed or showed was there; None: not yet."""
        self.outcome: Outcome = "unsent"
        self.exit_code: int | None = None
        self.stdout: Tail = Tail()
        self.stderr: Tail = Tail()

    def end(self, outcome: Outcome) -> None:
        """Say what became of it, unless that is known already."""
        if self.outcome in ("unsent", "running"):
            self.outcome = outcome

    def note_output(self) -> None:
        """Note that it has printed or shown something."""
        if self.first_output_at is None:
            self.first_output_at = trio.current_time()

    def timings(self, sent_at: float, ended_at: float) -> RunTimings:
        """Return when it was sent, and the rest of what happened, counted from when it was asked for."""
        asked_at = sent_at if self.asked_at is None else self.asked_at
        return RunTimings(
            sent=sent_at - asked_at,
            first_output=None if self.first_output_at is None else self.first_output_at - asked_at,
            ended=ended_at - asked_at,
        )

    def output(self) -> RunOutput:
        """Return it as it is now."""
        return RunOutput(
            language=self.language,
            outcome=self.outcome,
            exit_code=self.exit_code,
            stdout_bytes=bytes(self.stdout),
            stderr_bytes=bytes(self.stderr),
        )

    def add_note(self, error: Exception) -> None:
        """Have *error* say what the run had printed."""
        for name, tail in (("stdout", self.stdout), ("stderr", self.stderr)):
            if text := decode(bytes(tail)):
                error.add_note(f"the end of what the run printed to {name}:\n{quote_lines(text, _NOTE_LIMIT)}")
