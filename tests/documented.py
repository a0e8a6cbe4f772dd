"""The code blocks of the README and of the documentation, for the tests that check and run them."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]

#: Between these two lines of a page stands what a program has measured and written there.
START_MARK = "<!-- figures: start -->"
END_MARK = "<!-- figures: end -->"

_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w+)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """The line of its first line of text, from 1."""
    language: str
    text: str

    @property
    def name(self) -> str:
        """How to call it in a test's report."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def expected_output(self) -> str | None:
        """Give what the comments behind `print` say that it prints; None where nothing is said.

        ``print(x)  # text`` expects a line, and a comment on a line of its own after the code
        expects a line as well. ``...`` in it stands for anything.
        """
        said: list[str] = []
        lines = self.text.splitlines()
        last_code = max((n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")), default=-1)
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type != tokenize.COMMENT:
                continue
            row = token.start[0] - 1
            if lines[row].lstrip().startswith("print(") or (row > last_code and lines[row].startswith("# ")):
                said.append(token.string.removeprefix("#").strip())
        return "\n".join(said) + "\n" if said else None


def pages() -> list[Path]:
    """Give every page that users read."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[Block]:
    """Give the blocks of one language, page by page."""
    return [
        Block(page, text.count("\n", 0, match.start("text")) + 1, language, match["text"])
        for page in pages()
        if "_build" not in page.parts
        for text in [page.read_text("utf-8")]
        for match in _FENCE.finditer(text)
        if match["language"] == language
    ]


def replace_between_marks(text: str, figures: str) -> str:
    """Put *figures* between the two marks of *text*; ValueError if it has not exactly one of each."""
    if text.count(START_MARK) != 1 or text.count(END_MARK) != 1:
        raise ValueError(f"the file must have exactly one line {START_MARK!r} and one {END_MARK!r}")
    before, _, rest = text.partition(START_MARK)
    _, _, after = rest.partition(END_MARK)
    return f"{before}{START_MARK}\n{figures}\n{END_MARK}{after}"
