"""Tests that skip themselves: each says why, and where."""

from __future__ import annotations

import pytest

SKIPPING = {
    "asynchronous": "async def test_skips():\n    pytest.skip('not today')",
    "in a block": "async def test_skips():\n    with trio.fail_after(5):\n        pytest.skip('not today')",
    "in a nursery": "async def test_skips(nursery):\n    async with trio.open_nursery():\n        pytest.skip('not today')",
    "synchronous": "def test_skips():\n    pytest.skip('not today')",
}


@pytest.mark.parametrize("name", SKIPPING)
def test_the_reason_and_the_place_are_kept(pytester: pytest.Pytester, name: str) -> None:
    pytester.makeconftest("from tests.conftest import pytest_pyfunc_call")
    pytester.makeini("[pytest]\ntrio_mode = true")
    text = SKIPPING[name]
    path = pytester.makepyfile(f"import pytest, trio\n{text}")
    result = pytester.runpytest_inprocess("-rs")
    line = 2 + text[: text.index("pytest.skip")].count("\n")
    result.stdout.fnmatch_lines([f"SKIPPED*{path.name}:{line}: not today"])


@pytest.mark.parametrize("how", ["pytest.fail('broken')", "raise ValueError('broken')"])
def test_what_fails_is_no_skip(pytester: pytest.Pytester, how: str) -> None:
    pytester.makeconftest("from tests.conftest import pytest_pyfunc_call")
    pytester.makeini("[pytest]\ntrio_mode = true")
    pytester.makepyfile(f"import pytest\nasync def test_fails():\n    {how}")
    pytester.runpytest_inprocess().assert_outcomes(failed=1)
