"""Values in the place of placeholders, and back."""

from __future__ import annotations

import base64
import itertools

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.network._substitution import ResponseFilter, make_placeholder, substitute

PLACEHOLDER, VALUE = b"trio-sandbox-0123456789abcdef012", b"ghp_the-real-value"
VALUES = {PLACEHOLDER: VALUE}


def test_a_placeholder_is_as_long_as_its_value_and_random() -> None:
    assert len(make_placeholder("x" * 40)) == 40
    assert len(make_placeholder("x" * 4096)) == 4096
    assert len(make_placeholder("short")) == 32
    assert make_placeholder("x" * 40) != make_placeholder("x" * 40)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"Bearer " + PLACEHOLDER, b"Bearer " + VALUE),
        (PLACEHOLDER + b"," + PLACEHOLDER, VALUE + b"," + VALUE),
        (b"Basic " + base64.b64encode(b"me:" + PLACEHOLDER), b"Basic " + base64.b64encode(b"me:" + VALUE)),
        (b"bAsIc   " + base64.b64encode(PLACEHOLDER + b":"), b"bAsIc   " + base64.b64encode(VALUE + b":")),
        (b"Basic " + base64.b64encode(b"me:other"), b"Basic " + base64.b64encode(b"me:other")),
        (b"Basic %%%%", b"Basic %%%%"),
        (b"Basic abc", b"Basic abc"),
        (b"", b""),
        (PLACEHOLDER[:-1], PLACEHOLDER[:-1]),
    ],
)
def test_substitution_in_headers(before: bytes, after: bytes) -> None:
    headers, _ = substitute([(b"X", b"y"), (b"Authorization", before)], VALUES)
    assert headers == [(b"X", b"y"), (b"Authorization", after)]


def test_names_of_headers_are_left_and_values_are_not_looked_at_again() -> None:
    other = b"trio-sandbox-ffffffffffffffffff0"
    headers, _ = substitute([(PLACEHOLDER, b"x"), (b"a", PLACEHOLDER)], {PLACEHOLDER: other, other: b"never"})
    assert headers == [(PLACEHOLDER, b"x"), (b"a", other)]


def test_credentials_that_were_made_are_hidden_as_well() -> None:
    sent = base64.b64encode(b"me:" + PLACEHOLDER)
    made = base64.b64encode(b"me:" + VALUE)
    _, hidden = substitute([(b"Authorization", b"Basic " + sent)], VALUES)
    assert hidden == {VALUE: PLACEHOLDER, made: sent}
    assert made not in ResponseFilter(hidden).text(b"you sent " + made + b" and " + VALUE)


def test_the_filter_keeps_lengths() -> None:
    assert ResponseFilter({b"secret": b"trio"}).text(b"a secret!") == b"a trio**!"
    assert ResponseFilter({b"secret": b"placeholder"}).text(b"a secret!") == b"a placeh!"


def test_of_two_secrets_the_longer_counts_though_it_ends_later() -> None:
    both = {b"abcd": b"1111", b"abcdefgh": b"22222222"}
    for cut in range(1, 8):
        filtering = ResponseFilter(both)
        assert filtering.feed(b"abcdefgh"[:cut]) + filtering.feed(b"abcdefgh"[cut:]) + filtering.finish() == b"22222222"
    filtering = ResponseFilter(both)
    assert filtering.feed(b"abcdef") + filtering.finish() == b"1111ef"


def test_only_what_may_begin_a_secret_waits() -> None:
    filtering = ResponseFilter({b"abcd": b"1111"})
    assert filtering.feed(b"data: xyz\n\n") == b"data: xyz\n\n"
    assert filtering.feed(b"xab") == b"x"
    assert filtering.feed(b"y") == b"aby"


@given(
    st.lists(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=3),
    st.text("abc", max_size=60),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_pieces_make_no_difference(secrets: list[str], text: str, cuts: list[int]) -> None:
    hidden = {secret.encode(): b"*" for secret in secrets}
    data = text.encode()
    filtering = ResponseFilter(hidden)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [filtering.feed(data[start:end]) for start, end in itertools.pairwise(edges)]
    assert b"".join([*pieces, filtering.finish()]) == ResponseFilter(hidden).text(data)
    assert len(b"".join([*pieces])) <= len(data)


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 400))
def test_a_value_is_never_let_through(before: bytes, after: bytes, cut: int) -> None:
    filtering = ResponseFilter({VALUE: PLACEHOLDER})
    data = before + VALUE + after
    result = filtering.feed(data[:cut]) + filtering.feed(data[cut:]) + filtering.finish()
    assert VALUE not in result
    assert len(result) == len(data)
