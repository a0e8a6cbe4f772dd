"""Whatever a guest, QEMU or a disk says, it is taken or refused by a documented error; nothing else comes of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from tests._parsers import PARSERS, Parser, odd_variants


def attempt(parser: Parser, data: bytes) -> str:
    """Return the error, or ""."""
    try:
        parser.parse(data)
    except parser.errors as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize("name", PARSERS)
def test_the_examples_are_taken(name: str) -> None:
    for example in PARSERS[name].examples:
        told = attempt(PARSERS[name], example)
        # The files of these are not what they were.
        assert told == "" or "changed since" in told


@pytest.mark.parametrize(
    "name", [name for name in PARSERS if any(map(list, map(odd_variants, PARSERS[name].examples)))]
)
def test_odd_values_in_every_place_of_json(name: str) -> None:
    for example in PARSERS[name].examples:
        for data in odd_variants(example):
            # A message is never as long as what it is about.
            assert len(attempt(PARSERS[name], data)) < 2000


def mutated(example: bytes, seed: int) -> bytes:
    """Give *example* with some bytes changed, left out, put in, twice, or from elsewhere in it."""
    drawn = random.Random(seed)
    data = bytearray(example)
    for _ in range(drawn.randint(1, 4)):
        start = drawn.randrange(len(data) + 1)
        end = min(len(data), start + drawn.choice((0, 1, 1, 2, 4, 20)))
        data[start:end] = drawn.choice(
            (
                b"",
                drawn.randbytes(end - start or 1),
                bytes([drawn.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22))]) * drawn.choice((1, 2, 4, 8)),
                data[start:end] * 3,
                data[drawn.randrange(len(data) + 1) :][:20],
            )
        )
    return bytes(data)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_examples_and_any_bytes(name: str, data: st.DataObject) -> None:
    parser = PARSERS[name]
    seeds = st.integers(0, 2**32)
    damaged = st.builds(mutated, st.sampled_from(parser.examples), seeds)
    assert len(attempt(parser, data.draw(damaged | damaged | st.binary(max_size=200)))) < 2000
