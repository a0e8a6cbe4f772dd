"""What hosts say of themselves, and what they reckon from what others say."""

from __future__ import annotations

import json
import zlib

import hypothesis.strategies as st
import pytest

from trio_sandbox.machines._ledger import FORMAT, SIZE, decode, reckon

numbers = st.integers(0, 2**63 - 1)


def with_checksum(value: object, size: int = SIZE) -> bytes:
    body = json.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body.ljust(size - 10))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "an object was expected"),
        (None, "an object was expected"),
        (
            {"format": FORMAT + 1, "pid": 1},
            f"format is {FORMAT + 1}, and this version of trio-sandbox reads {FORMAT} only",
        ),
        ({"format": FORMAT - 1, "pid": 1}, f"format is {FORMAT - 1}"),
        ({"format": FORMAT, "pid": 1}, "memory_total"),
        ({"format": FORMAT, "pid": True}, "pid"),
        ({"format": FORMAT, "pid": 1.5}, "pid"),
        ({"format": FORMAT, "pid": -1}, "pid"),
        ({"format": FORMAT, "pid": 2**63}, "pid"),
        ({"format": FORMAT, "pid": "1"}, "pid"),
    ],
)
def test_what_another_version_or_nobody_of_ours_wrote_is_refused(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(with_checksum(value))


def test_deep_nesting_is_refused() -> None:
    body = b"[" * (SIZE - 10)
    with pytest.raises(ValueError, match=r"Expecting|damaged"):
        decode(b"%08x %s\n" % (zlib.crc32(body), body))


@pytest.mark.parametrize(
    ("measured", "reserved", "totals", "reckoned"),
    [
        (18, 0, [], 18),  # nobody else
        (18, 9, [18], 18),  # another has given out half, and nothing of that is used yet
        (9, 9, [18], 18),  # all of it is used, and can't be measured any more
        (9, 10, [18], 18),
        (9, 0, [18], 9),  # what is missing some other program has
        (9, 3, [18], 12),  # of that at most 3 are the other's
        (18, 0, [9], 18),  # there is more now
        (5, 100, [18, 20], 20),
        (0, 0, [], 0),
    ],
)
def test_what_a_new_host_reckons_with(measured: int, reserved: int, totals: list[int], reckoned: int) -> None:
    assert reckon(measured, reserved, totals) == reckoned
