"""Records of sandboxes: what is written is read, and nothing else is."""

from __future__ import annotations

from typing import Any

import attrs
import hypothesis.strategies as st
import pytest

from trio_sandbox.machines._held_files import encode_record
from trio_sandbox.machines._process_facts import MOST_PID
from trio_sandbox.machines._roster import FORMAT, SIZE, SandboxRecord, decode, encode

numbers = st.integers(0, 2**63 - 1)
pids = st.integers(0, MOST_PID)
PLAIN = SandboxRecord(
    id="0123456789ab",
    owner=1,
    descriptor=3,
    namespace=4,
    image="python",
    opened=5,
    memory_mib=256,
    vcpus=1,
    accelerator="kvm",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, f"format is {FORMAT + 1}"),
        ({"id": "../../x"}, "'id'"),
        ({"id": "0123456789abc"}, "'id'"),
        ({"id": "0123456789AB"}, "'id'"),
        ({"id": 12345678}, "'id'"),
        ({"owner": MOST_PID + 1}, "'owner'"),
        ({"owner": -1}, "'owner'"),
        ({"pid": 2**62}, "'pid'"),
        ({"descriptor": 2**31}, "'descriptor'"),
        ({"opened": 1e300}, "'opened'"),
        ({"opened": "yesterday"}, "'opened'"),
        ({"memory_mib": True}, "'memory_mib'"),
        ({"image": None}, "'image'"),
    ],
)
def test_what_can_not_be_is_refused(change: dict[str, Any], words: str) -> None:
    data = encode_record({"format": FORMAT, **attrs.asdict(PLAIN), **change}, SIZE)
    with pytest.raises(ValueError, match=words):
        decode(data)


def test_what_is_too_long_is_not_written() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode(attrs.evolve(PLAIN, image="x" * SIZE))
