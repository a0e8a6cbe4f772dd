"""What is in files that their owners hold: what is written is read, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trio_sandbox.machines import _ledger, _roster
from trio_sandbox.machines._ledger import LedgerEntry
from trio_sandbox.machines._process_facts import MOST_PID
from trio_sandbox.machines._roster import SandboxRecord

numbers = st.integers(0, 2**63 - 1)
pids = st.integers(0, MOST_PID)
entries = st.builds(
    LedgerEntry,
    pid=numbers,
    memory_total=numbers,
    memory_reserved=numbers,
    disk=numbers,
    disk_total=numbers,
    disk_reserved=numbers,
)
records = st.builds(
    SandboxRecord,
    id=st.text("0123456789abcdef", min_size=12, max_size=12),
    owner=pids,
    descriptor=st.integers(0, 2**31 - 1),
    namespace=numbers,
    image=st.text(st.characters(codec="utf-8"), max_size=100),
    opened=st.floats(0, 2e11),
    memory_mib=numbers,
    vcpus=numbers,
    accelerator=st.sampled_from(("kvm", "tcg")),
    pid=pids,
    started=numbers,
)


def of_both(test: Callable[..., None]) -> Any:
    kinds = [pytest.param(_ledger, entries, id="ledger"), pytest.param(_roster, records, id="roster")]
    return pytest.mark.parametrize(("module", "values"), kinds)(test)


@of_both
@given(data=st.data())
def test_what_is_written_is_read(module: ModuleType, values: st.SearchStrategy[object], data: st.DataObject) -> None:
    value = data.draw(values)
    written = module.encode(value)
    assert len(written) == module.SIZE
    assert module.decode(written) == value


@of_both
@given(data=st.data())
def test_what_is_half_written_is_not_read(
    module: ModuleType, values: st.SearchStrategy[object], data: st.DataObject
) -> None:
    old, new = module.encode(data.draw(values)), module.encode(data.draw(values))
    cut = data.draw(st.integers(1, module.SIZE - 1))
    torn = new[:cut] + old[cut:]
    if torn in (old, new):
        return
    with pytest.raises(ValueError, match="damaged"):
        module.decode(torn)


@of_both
@given(data=st.data())
def test_nonsense_is_refused(module: ModuleType, values: st.SearchStrategy[object], data: st.DataObject) -> None:
    with pytest.raises(ValueError, match="damaged"):
        module.decode(data.draw(st.binary(max_size=2 * module.SIZE)))
