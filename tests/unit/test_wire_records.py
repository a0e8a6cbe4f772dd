"""Cutting a stream into records."""

from __future__ import annotations

from contextlib import suppress
from itertools import groupby, pairwise

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.wire import JSON, STDERR, STDOUT, RecordDecoder, WireError, encode_record


def test_the_bytes_of_a_record() -> None:
    assert encode_record(STDOUT, b"hi") == b"O\0\0\0\2hi"
    assert encode_record(JSON, memoryview(b"{}")) == b"J\0\0\0\2{}"
    assert encode_record(STDERR, bytearray()) == b"E\0\0\0\0"


def all_records(decoder: RecordDecoder) -> list[tuple[bytes, bytes]]:
    return list(iter(decoder.next_record, None))


@given(
    st.lists(st.tuples(st.sampled_from([JSON, STDOUT, STDERR, b"\0"]), st.binary(max_size=40)), max_size=10),
    st.lists(st.integers(0, 500), max_size=12),
)
def test_records_come_out_as_they_went_in(records: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    data = b"".join(encode_record(*record) for record in records)
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    decoder = RecordDecoder()
    received: list[tuple[bytes, bytes]] = []
    for a, b in pairwise(places):
        decoder.feed(data[a:b])
        received += all_records(decoder)
    assert received == records
    assert decoder.is_empty


@given(
    st.lists(st.tuples(st.sampled_from([JSON, STDOUT, STDERR]), st.binary(max_size=20)), max_size=100),
    st.lists(st.integers(0, 1000), max_size=5),
)
def test_joined_records_say_the_same_and_no_more_than_the_limit(
    records: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(encode_record(*record) for record in records)
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    decoder = RecordDecoder(limit=50, joined=STDOUT + STDERR)
    received: list[tuple[bytes, bytes]] = []
    for a, b in pairwise(places):
        decoder.feed(data[a:b])
        received += all_records(decoder)
    assert decoder.is_empty
    assert all(len(payload) <= 50 for _, payload in received)
    assert [record for record in received if record[0] == JSON] == [record for record in records if record[0] == JSON]
    assert merged(received) == merged(records)


def merged(records: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return what is said in turns of one tag each."""
    return [
        (tag, b"".join(payload for _, payload in turn)) for tag, turn in groupby(records, key=lambda record: record[0])
    ]


@given(st.binary(max_size=60), st.lists(st.integers(0, 100), max_size=5))
def test_arbitrary_bytes_give_records_or_a_violation(data: bytes, cuts: list[int]) -> None:
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    decoder = RecordDecoder(limit=20)
    records: list[tuple[bytes, bytes]] = []
    with suppress(WireError):
        for a, b in pairwise(places):
            decoder.feed(data[a:b])
            records += all_records(decoder)
    joined = b"".join(encode_record(*record) for record in records)
    assert data.startswith(joined)


def test_the_limit_is_checked_before_the_payload_has_come() -> None:
    decoder = RecordDecoder(limit=10)
    decoder.feed(encode_record(JSON, bytes(10)))
    assert all_records(decoder) == [(JSON, bytes(10))]
    decoder.feed(b"O\0\0\0\x0b")
    with pytest.raises(WireError, match="record of 11 bytes; at most 10 are allowed"):
        decoder.next_record()


def test_a_record_that_is_not_whole_leaves_the_decoder_not_empty() -> None:
    decoder = RecordDecoder()
    decoder.feed(b"O\0\0\0\2h")
    assert decoder.next_record() is None
    assert not decoder.is_empty
