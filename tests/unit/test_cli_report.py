"""What reaches a terminal of the words of others."""

from __future__ import annotations

import sys

import pytest

from trio_sandbox import SandboxError
from trio_sandbox.cli._report import complain, complain_about, printable

#: Controls of both sets, and what changes the order or the look of what follows without being seen.
UNSEEN = [
    *map(chr, [*range(9), 11, *range(12, 32), *range(127, 160)]),
    *"\xad\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2060\u2066\u2069\ufeff\ufff9\U000e0041\ud800",
]


@pytest.mark.parametrize("character", UNSEEN, ids=lambda character: f"U+{ord(character):04X}")
def test_what_is_not_seen_is_escaped(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown.isprintable()
    assert shown.isascii()
    assert shown.startswith("a\\")


def test_what_is_seen_is_left_as_it_is() -> None:
    text = "naïve 日本語 \N{PARTY POPPER} \\x1b"
    assert printable(text) == text


def test_a_guests_line_does_not_look_like_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    error = SandboxError("the guest said: no\ntrio-sandbox: image python removed\r\n  because: a\rb\x85c\u2028d")
    error.__cause__ = OSError("x\n  because: y")
    complain_about(error)
    assert capsys.readouterr().err.splitlines() == [
        "trio-sandbox: the guest said: no",
        "      trio-sandbox: image python removed",
        "        because: a\\rb\\x85c\\u2028d",
        "  because: x",
        "        because: y",
    ]


def test_where_nobody_reads_standard_error_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        complain("x")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
