"""Unified diffs: what git makes of them, and their bounds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.sandbox import _unified
from trio_sandbox.sandbox._unified import DiffWriter, Version


def version(text: str | bytes | None, mode: str = "100644") -> Version | None:
    return None if text is None else Version(mode, text.encode() if isinstance(text, str) else text)


def applied(directory: Path, before: str | None, after: str | None, name: str = "a") -> str | None:
    """Have git apply the diff of a file; return what the file is then."""
    path = directory / name
    if before is not None:
        path.write_bytes(before.encode())
    text = DiffWriter().diff(name, version(before), version(after))
    if before != after:
        subprocess.run(["git", "apply", "-"], input=text.encode(), cwd=directory, check=True)
    return path.read_bytes().decode() if path.exists() else None


NUMBERS = [f"{number}\n" for number in range(100)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "new\n"),
        ("old\n", None),
        ("one", "two"),
        ("one\n", "one"),
        ("a\nb\nc\n", "a\nX\nc\n"),
        ("".join(NUMBERS), "".join([*NUMBERS[:10], "X\n", *NUMBERS[11:16], *NUMBERS[20:60], "Y\n", *NUMBERS[60:]])),
        ("".join(NUMBERS * 30), "".join(f"-{line}" for line in NUMBERS * 30)),
        ("\ta\r\nb\x0cc\n", "\ta\nb\x0cc\x1c\n"),
        ("ü\n", "ä\u2028ö\n"),
    ],
)
def test_git_applies_it(tmp_path: Path, before: str | None, after: str | None) -> None:
    assert applied(tmp_path, before, after) == after


@pytest.mark.parametrize("name", ["a b", 'quo"te', "back\\slash", "line\nend", "ü", "tab\t"])
def test_git_reads_the_names(tmp_path: Path, name: str) -> None:
    assert applied(tmp_path, "one\n", "two\n", name) == "two\n"
    assert DiffWriter().diff(name, version("a"), version("b")).isascii()


LINES = st.lists(st.sampled_from(["a\n", "b\n", "c\n", "\n"]), max_size=30).map("".join)


@given(LINES, LINES)
def test_it_says_all_that_changed(before: str, after: str) -> None:
    text = DiffWriter().diff("a", version(before), version(after))
    body = text.partition("+++ b/a\n")[2]
    # Each line of the new text is in it, or is one that was there, in order.
    added = [line[1:] for line in body.splitlines(keepends=True) if line.startswith("+")]
    removed = [line[1:] for line in body.splitlines(keepends=True) if line.startswith("-")]
    assert len(after) - len(before) == sum(map(len, added)) - sum(map(len, removed))
    assert (body == "") == (before == after)


def test_what_is_no_text_or_too_long_is_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"a\0b", b"\xff", None):
        text = DiffWriter().diff("a", version("a"), Version("100644", content))
        assert text == "diff --git a/a b/a\nBinary files a/a and b/a differ\n"
    assert DiffWriter().diff("a", version("a"), version("a", "100755")) == (
        "diff --git a/a b/a\nold mode 100644\nnew mode 100755\n"
    )
    monkeypatch.setattr(_unified, "_LONGEST_DIFF", 1000)
    writer = DiffWriter()
    assert "+new" in writer.diff("a", None, version("new\n"))
    assert writer.diff("b", None, version("new\n" * 1000)) == "Binary files a/b and b/b differ\n"
    assert "+new" in writer.diff("c", None, version("new\n"))


def test_text_that_is_made_to_take_long_is_shown_as_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "".join(f"{number}\n" for number in range(50_000))
    after = "".join(f"{number}\n" for number in reversed(range(50_000)))
    text = DiffWriter().diff("a", version(before), version(after))
    assert text.count("\n-") == text.count("\n+") == 50_000 + 1
    monkeypatch.setattr(_unified, "_PATIENCE", -1.0)
    compared: list[object] = []
    monkeypatch.setattr("difflib.SequenceMatcher", compared.append)
    assert "-b\n+c\n" in DiffWriter().diff("a", version("a\nb\n"), version("a\nc\n"))
    assert compared == []
