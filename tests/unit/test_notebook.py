"""What a notebook shows of a result: text and pictures, and nothing that a guest could run in the page."""

from __future__ import annotations

import base64
import html.parser
from typing import Any

import pytest

from tests.unit.test_results import result
from trio_sandbox import Display

PNG = b"\x89PNG\r\n\x1a\nrest"
#: What a guest may try, wherever it can put text.
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


class Tags(html.parser.HTMLParser):
    """Collects the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(**fields: Any) -> Tags:
    page = Tags()
    page.feed(result(**{"exit_code": 0, **fields})._repr_mimebundle_()["text/html"])
    page.close()
    return page


def test_text_value_errors_and_the_exit_code_are_shown() -> None:
    page = shown(stdout_bytes=b"one\ttwo\n", value="42", stderr_bytes=b"Traceback", exit_code=3, state_kept=False)
    assert [tag for tag, _ in page.tags] == ["pre", "pre", "pre", "p", "em", "p", "em"]
    for text in ("one\ttwo", "42", "Traceback", "exit code 3", "the interpreter has ended"):
        assert text in page.text


def test_an_empty_result_says_so() -> None:
    assert "nothing was printed" in shown().text


@pytest.mark.parametrize(
    "fields",
    [
        {"stdout_bytes": HOSTILE.encode()},
        {"stderr_bytes": HOSTILE.encode()},
        {"value": HOSTILE},
        *(
            {"displays": (Display(mime, HOSTILE.encode()),)}
            for mime in ("text/html", "image/svg+xml", "text/plain", "image/png")
        ),
        {"displays": (Display(HOSTILE, b"x"),)},
        {"displays": (Display("application/javascript", HOSTILE.encode()),)},
    ],
)
def test_nothing_of_the_guests_is_markup(fields: dict[str, Any]) -> None:
    page = shown(**fields)
    assert {tag for tag, _ in page.tags} <= {"pre", "p", "em"}
    assert all(set(attributes) <= {"style"} for _, attributes in page.tags)
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_pictures_are_shown_each_object_once() -> None:
    displays = (
        Display("text/html", b"<b>x</b>", 0),
        Display("image/png", PNG, 0),
        Display("text/plain", b"<Figure>", 0),
        Display("text/html", b"<table>", 1),
        Display("text/plain", b"a table", 1),
    )
    page = shown(displays=displays)
    assert [tag for tag, _ in page.tags] == ["img", "pre"]
    assert page.tags[0][1]["src"] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert page.text.strip() == "a table"
    bundle = result(displays=displays)._repr_mimebundle_()
    assert bundle["image/png"] == base64.b64encode(PNG).decode()
    assert bundle["text/plain"].startswith("RunResult(")


def test_what_is_no_picture_is_not_shown_as_one() -> None:
    page = shown(displays=(Display("image/png", b"<svg onload=alert(1)>"),))
    assert [tag for tag, _ in page.tags] == ["p", "em"]
    assert "image/png" not in result(displays=(Display("image/png", b"no"),))._repr_mimebundle_()


def test_a_cell_is_bounded() -> None:
    bundle = result(
        stdout_bytes=b"x" * 2**22 + b"end",
        stderr_bytes=b"\x1b" * 2**21,
        displays=tuple(Display("image/png", PNG + bytes(2**20), item) for item in range(30))
        + tuple(Display("text/plain", b"<" * 2**19, item) for item in range(30, 40)),
    )._repr_mimebundle_()
    assert sum(map(len, bundle.values())) < 25 * 2**20
    assert "xend" in bundle["text/html"]
    assert "more shown: see RunResult.displays" in bundle["text/html"]
