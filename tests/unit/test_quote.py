"""A guest's text in ours: bounded, and nothing in it that a terminal obeys."""

from __future__ import annotations

from hypothesis import given, strategies as st

from trio_sandbox._quote import quote_guest, quote_lines, quote_tail

anything = st.text(st.characters(), max_size=200)


@given(anything, st.integers(min_value=10, max_value=100))
def test_a_quote_is_printable_and_bounded(text: str, limit: int) -> None:
    for quoted in (quote_guest(text, limit), quote_tail(text, limit)):
        assert quoted.isprintable()
        assert len(quoted) <= limit


@given(anything, st.integers(min_value=10, max_value=100))
def test_lines_are_printable_and_none_is_without_its_bar(text: str, limit: int) -> None:
    lines = quote_lines(text, limit).split("\n")
    for line in lines if lines != [""] else []:
        assert line.startswith("| ")
        assert line.replace("\t", "").isprintable()


def test_what_is_printable_stays_and_what_is_not_is_spelled_out() -> None:
    assert quote_guest("étage 1\n") == r"étage 1\n"
    assert quote_guest("\x1b]0;x\x07\r\u202e\u200b\ud800") == r"\x1b]0;x\x07\r\u202e\u200b\ud800"
    assert quote_lines("a\tb\r\n\x1b[2Jc\rd\n") == "| a\tb\n| \\x1b[2Jc\\rd"


def test_the_end_is_kept_where_it_matters_and_the_beginning_elsewhere() -> None:
    text = "first" + "x" * 100 + "last"
    assert quote_guest(text, 20) == "first" + "x" * 10 + "[...]"
    assert quote_tail(text, 20) == "[...]" + "x" * 11 + "last"
    assert quote_lines("one\ntwo\nthree\n", 9) == "| [...]wo\n| three"
    assert quote_lines("") == ""
