"""The failure table of the documentation is the one that is tested."""

from __future__ import annotations

import pytest

from tests.failures import ACCIDENTS, ATTACKS, ENDS, LANGUAGES, PAGE, Row, page_with_tables


def test_the_page_shows_what_is_tested() -> None:
    page = PAGE.read_text("utf-8")
    assert page_with_tables(page) == page, "run python -m tests.failures"


@pytest.mark.parametrize("row", [*ACCIDENTS, *ENDS], ids=lambda row: row.what)
def test_every_language_has_every_accident(row: Row) -> None:
    assert row.cases
    assert row.like or row.cases.keys() == LANGUAGES.keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_like_another_is_few(language: str) -> None:
    assert len([row for row in ACCIDENTS if language not in row.cases]) < 9


def test_what_is_done_on_purpose_is_known_for_every_language() -> None:
    for language in LANGUAGES:
        assert len([row for row in ATTACKS if language not in row.cases]) < 2
