"""How a notebook shows the result of a run.

All of it is a guest's, whom nobody trusts, and a notebook's page can do what its user can. So there is nothing in it but text,
escaped, and pictures of kinds that a browser only draws. HTML, SVG and JavaScript that the guest shows are text here.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from ._display import Display
from ._quote import escape

#: Kinds of pictures that are shown as such, and what their files begin with.
_PICTURES: Final = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF8",
}
#: Forms of an object that are shown as text, the best first.
_TEXTS: Final = ("text/plain", "text/markdown", "text/latex", "application/json", "text/html", "image/svg+xml")
#: Bounds on one result's cell: a notebook's file keeps it.
_TEXT_LIMIT: Final = 100_000
_PICTURE_LIMIT: Final = 8 * 2**20
_OBJECTS: Final = 50


class Result(Protocol):
    """What is shown of a `RunResult`."""

    @property
    def exit_code(self) -> int: ...
    @property
    def ok(self) -> bool: ...
    @property
    def oom(self) -> bool: ...
    @property
    def state_kept(self) -> bool: ...
    @property
    def value(self) -> str | None: ...
    @property
    def displays(self) -> tuple[Display, ...]: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


def mime_bundle(result: Result) -> dict[str, str]:
    """Return what a notebook shows of *result*, by MIME type."""
    bundle: dict[str, str] = {"text/plain": repr(result), "text/html": "\n".join(_parts(result))}
    first = next((each for each in result.displays if is_picture(each) and each.mime == "image/png"), None)
    if first is not None and len(first.data) <= _PICTURE_LIMIT:
        bundle["image/png"] = base64.b64encode(first.data).decode()  # where a page has no HTML
    return bundle


def is_picture(display: Display) -> bool:
    """Whether it is of a kind that a browser only draws, and begins as such."""
    start = _PICTURES.get(display.mime)
    return start is not None and display.data.startswith(start)


def _parts(result: Result) -> Iterator[str]:
    """Give the pieces of HTML, in the order in which a terminal would show them."""
    if result.stdout:
        yield _pre(result.stdout)
    yield from _objects(result.displays)
    if result.value is not None:
        yield _pre(result.value)
    if result.stderr:
        yield _pre(result.stderr, "color: #b00020")
    if not result.ok:
        yield _note(f"exit code {result.exit_code}" + (" (out of memory)" if result.oom else ""))
    if not result.state_kept:
        yield _note("the interpreter has ended: the next run finds none of its variables")
    if result.ok and not (result.stdout or result.displays or result.stderr or result.value is not None):
        yield _note("done, nothing was printed")


def _objects(displays: Sequence[Display]) -> Iterator[str]:
    """Give what was shown, each object in one of its forms."""
    room = _PICTURE_LIMIT
    left_out = 0
    for number, (_, group) in enumerate(itertools.groupby(displays, key=lambda display: display.item)):
        forms = list(group)
        picture = next((form for form in forms if is_picture(form)), None)
        if number >= _OBJECTS or (picture is not None and len(picture.data) > room):
            left_out += 1
        elif picture is not None:
            room -= len(picture.data)
            data = base64.b64encode(picture.data).decode()
            yield f'<img src="data:{picture.mime};base64,{data}" alt="shown by the run" style="max-width: 100%">'
        else:
            yield _text_of(forms)
    if left_out:
        yield _note(f"{left_out} more shown: see RunResult.displays")


def readable_form(forms: Sequence[Display]) -> Display | None:
    """Return the form of an object that is best read as text, if it has one."""
    by_mime = {form.mime: form for form in forms}
    return next((by_mime[mime] for mime in _TEXTS if mime in by_mime), None)


def _text_of(forms: Sequence[Display]) -> str:
    best = readable_form(forms)
    if best is not None:
        return _pre(best.text)
    return _note(", ".join(f"{form.mime[:100]}, {len(form.data)} bytes" for form in forms[:5]))


def _pre(text: str, style: str = "") -> str:
    cut = "[...]" if len(text) > _TEXT_LIMIT else ""
    lines = text[-_TEXT_LIMIT:].replace("\r\n", "\n").removesuffix("\n").split("\n")
    safe = "\n".join("\t".join(map(escape, line.split("\t"))) for line in lines)
    return f'<pre style="{style}">{html.escape(cut + safe)}</pre>'


def _note(text: str) -> str:
    return f"<p><em>{html.escape(escape(text))}</em></p>"
