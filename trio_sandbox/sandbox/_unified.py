"""Unified diffs, as ``git diff`` writes them and ``git apply`` reads them, of what nobody trusts: bounded in size and in time. No I/O."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Final, final

import attrs

#: Bytes of a file whose lines are compared.
LONGEST_FILE: Final = 2**20
#: Characters of a whole diff, but for the names of what is not shown any more.
_LONGEST_DIFF: Final = 16 * 2**20
#: Lines that are compared one by one, and seconds for all files together: what takes longer is shown as replaced. The lines that two files
#: have in common at the beginning and at the end do not count.
_MOST_LINES: Final = 1000
_PATIENCE: Final = 10.0
_CONTEXT: Final = 3
_NO_NEWLINE: Final = "\\ No newline at end of file\n"
#: What git puts in quotes.
_UNUSUAL: Final = re.compile(rb"[^ !#-\[\]-~]")
_LINE: Final = re.compile("[^\n]*\n|[^\n]+")

Mode = str


@final
@attrs.frozen
class Version:
    """What a path is before or after."""

    mode: Mode
    """As git writes it: "100644", "100755", or "120000" for a link."""
    content: bytes | None
    """None: too long, so that it is not shown."""


@final
class DiffWriter:
    """Writes the diff of many paths. What is too much is told by its name only."""

    def __init__(self) -> None:
        self._left = _LONGEST_DIFF
        self._deadline = time.monotonic() + _PATIENCE

    def diff(self, path: str, before: Version | None, after: Version | None) -> str:
        """Return the diff of one path that was added (None before), removed (None after), or changed."""
        text = "".join(self._pieces(path, before, after))
        if len(text) > self._left:
            return _differs(path)
        self._left -= len(text)
        return text

    def _pieces(self, path: str, before: Version | None, after: Version | None) -> Iterator[str]:
        old, new = _quoted("a/", path), _quoted("b/", path)
        yield f"diff --git {old} {new}\n"
        if before is None and after is not None:
            yield f"new file mode {after.mode}\n"
        elif after is None and before is not None:
            yield f"deleted file mode {before.mode}\n"
        elif before is not None and after is not None and before.mode != after.mode:
            yield f"old mode {before.mode}\nnew mode {after.mode}\n"
        texts = [_text(version) for version in (before, after)]
        if texts[0] is None or texts[1] is None:
            yield _differs(path)
        elif texts[0] != texts[1]:
            yield f"--- {'/dev/null' if before is None else old}\n+++ {'/dev/null' if after is None else new}\n"
            yield from self._hunks(_LINE.findall(texts[0]), _LINE.findall(texts[1]))

    def _hunks(self, old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
        head = _common(old, new)
        tail = _common(old[head:][::-1], new[head:][::-1])
        middle = old[head : len(old) - tail], new[head : len(new) - tail]
        codes = [("replace", 0, len(middle[0]), 0, len(middle[1]))]
        if max(map(len, middle)) <= _MOST_LINES and time.monotonic() < self._deadline:
            codes = list(difflib.SequenceMatcher(None, *middle).get_opcodes())
        moved = [(code, a + head, b + head, c + head, d + head) for code, a, b, c, d in codes if code != "equal"]
        for group in _grouped(moved):
            yield from _hunk(group, old, new)


def _text(version: Version | None) -> str | None:
    """Return what can be shown line by line; None if it can't be."""
    if version is None:
        return ""
    if version.content is None or b"\0" in version.content:
        return None
    try:
        return version.content.decode()
    except UnicodeDecodeError:
        return None


def _differs(path: str) -> str:
    return f"Binary files {_quoted('a/', path)} and {_quoted('b/', path)} differ\n"


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    return next(
        (number for number, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )


_Code = tuple[str, int, int, int, int]


def _grouped(codes: Sequence[_Code]) -> Iterator[list[_Code]]:
    """Put changes into one hunk whose contexts would touch."""
    group: list[_Code] = []
    for code in codes:
        if group and code[1] - group[-1][2] > 2 * _CONTEXT:
            yield group
            group = []
        group.append(code)
    if group:
        yield group


def _hunk(group: Sequence[_Code], old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    (_, old_first, _, new_first, _), (_, _, old_last, _, new_last) = group[0], group[-1]
    before = min(_CONTEXT, old_first)
    after = min(_CONTEXT, len(old) - old_last)
    start, end = old_first - before, old_last + after
    yield f"@@ -{_span(start, end)} +{_span(new_first - before, new_last + after)} @@\n"
    position = start
    for _, a, b, c, d in group:
        yield from _lines(" ", old[position:a])
        yield from _lines("-", old[a:b])
        yield from _lines("+", new[c:d])
        position = b
    yield from _lines(" ", old[position:end])


def _span(start: int, end: int) -> str:
    length = end - start
    return f"{start + 1 if length else start},{length}"


def _lines(sign: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield sign + line if line.endswith("\n") else f"{sign}{line}\n{_NO_NEWLINE}"


def _quoted(prefix: str, path: str) -> str:
    """Return a path as git writes it: what is not plain ASCII as octal digits, in quotes."""
    data = prefix.encode() + path.encode("utf-8", "surrogateescape")
    if not _UNUSUAL.search(data):
        return data.decode()
    return '"' + _UNUSUAL.sub(lambda found: b"\\%03o" % found[0][0], data).decode() + '"'
