"""The languages: each is known wherever the host has something of its own to say of it."""

from __future__ import annotations

import typing
from collections.abc import Iterable

import pytest

from tests import failures
from trio_sandbox.cli import _program
from trio_sandbox.guest.agent.languages import LANGUAGES
from trio_sandbox.guest.helpers.dialects import DIALECTS
from trio_sandbox.image import IMAGES
from trio_sandbox.integrations.mcp._tools import Tools
from trio_sandbox.machines import _warm_up


def of_the_tool() -> set[str]:
    """Give the languages that the tool `run_code` takes."""
    named, _nothing = typing.get_args(typing.get_type_hints(Tools.run_code)["language"])
    return set(typing.get_args(named))


#: By place: the languages that it knows.
KNOWN: dict[str, Iterable[str]] = {
    "guest/agent/languages.py": LANGUAGES,
    "image/_recipes.py": {language for image in IMAGES.values() for language in image.languages},
    "machines/_warm_up.py: _TRIVIAL_RUNS": _warm_up._TRIVIAL_RUNS,
    "cli/_program.py: _EXTENSIONS": _program._EXTENSIONS.values(),
    "cli/_program.py: _FIRST_LINES": (language for _, language in _program._FIRST_LINES),
    "cli/_program.py: _INTERPRETERS": _program._INTERPRETERS,
    "integrations/mcp/_tools.py: Tools.run_code": of_the_tool(),
    "tests/failures.py": failures.LANGUAGES,
}


@pytest.mark.parametrize("place", KNOWN)
def test_each_language_is_known(place: str) -> None:
    assert set(KNOWN[place]) == set(LANGUAGES)


def test_each_is_spoken_to_in_a_dialect_that_there_is() -> None:
    assert {language.dialect for language in LANGUAGES.values()} - {None} == set(DIALECTS)
