"""What of a directory of the guest's need not come: files that are in the state in which they were when both sides were the same.

The guest says which state a file is in (`guest/changes.py`). One that lies keeps its own changes from us, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Final, final
from weakref import ref

import attrs

from ..client import Machine
from ..guest.changes import EXCLUDED, SAME, STATE, STATE_LIMIT, STATES, pack, unpack_states
from ..guest.trees import TreeError, TreeWriter
from ._files import encode_request
from ._plan import Entry, Tree

#: Nanoseconds that a change in the guest may be under way after the kernel noted its time; more than a busy emulated disk takes.
_UNDER_WAY: Final = 10**9


@final
@attrs.frozen
class Base:
    """What a directory of the guest's and one of the host's were when they were last the same."""

    tree: Tree = attrs.field(factory=dict[str, Entry])
    states: Mapping[str, bytes] = attrs.field(factory=dict[str, bytes])
    """By path, the state of the guest's file then, if it will be another after each change."""
    machine: ref[Machine] | None = None
    """Where these hold. A machine restored from a saved state has programs that write to files as they did before."""

    def known(self, machine: Machine) -> Mapping[str, bytes]:
        """Return the states that hold in *machine*."""
        return self.states if self.machine is not None and self.machine() is machine else {}

    def with_states(self, tree: Tree, states: Mapping[str, bytes], machine: Machine) -> Base:
        """Return it with those of *states* that are of files which are in *tree* what they are here."""
        kept = {
            path: state for path, state in states.items() if path in self.tree and tree.get(path) == self.tree[path]
        }
        return Base(self.tree, kept, ref(machine))


def take_states(payload: bytes, states: dict[str, bytes], tree: Tree) -> None:
    """Add the states of a record that the guest sent to *states*.

    Raises:
      ValueError: if it has others than of files in *tree*.

    """
    for name, state in unpack_states(payload):
        path = os.fsdecode(name)
        entry = tree.get(path)
        if entry is None or entry.kind != "file" or not 0 < len(state) <= STATE_LIMIT:
            raise ValueError(f"no state of a file: {name[:80]!r} {state[:80]!r}")
        states[path] = state


@final
class ChangesWriter(TreeWriter):
    """Writes a tree that lacks files in known states, and keeps a list of them.

    Args:
      parent: As that of `TreeWriter`, like *name*, *max_bytes* and *mask*.
      name: As above.
      tree: What is known.
      known: The states that the guest was told.
      max_bytes: As above; a file that does not come counts in full.
      mask: As above.

    """

    def __init__(
        self, parent: int, name: str, tree: Tree, known: Container[str], *, max_bytes: int | None, mask: int
    ) -> None:
        super().__init__(parent, name, max_bytes=max_bytes, mask=mask)
        self._tree, self._known = tree, known
        self._names: list[str] = []
        self._last = ""
        self.same: set[str] = set()
        """Files that are in the state that was known."""
        self.states: dict[str, bytes] = {}
        """The states of files that came."""

    def write(self, tag: bytes, payload: bytes | memoryview) -> None:
        """Take one record. Errors as `TreeWriter.write`."""
        if tag == STATE:
            self._take_state(bytes(payload))
        elif tag == SAME:
            self._leave_out(bytes(payload))
        else:
            super().write(tag, payload)
            if tag in (b"f", b"d", b"l"):
                self._note(tag, bytes(payload))
            elif tag == b"u":
                self._names.pop()

    def _note(self, tag: bytes, payload: bytes) -> None:
        name = payload.split(b"\0", 2)[0 if tag == b"l" else 1]
        # The topmost has none, and may say one.
        path = self._path(name) if self._names else ""
        if path in self.same:
            raise TreeError(f"two entries of one name: {name[:80]!r}")
        if tag == b"d":
            self._names.append(f"{path}/" if path else "")
        self._last = path if tag == b"f" else ""

    def _path(self, name: bytes) -> str:
        return self._names[-1] + os.fsdecode(name)

    def _leave_out(self, payload: bytes) -> None:
        self._close_file()
        self._last = ""
        if not self._directories:
            raise TreeError("a file that is in no directory")
        name = self._new_name(payload)
        path = self._path(payload)
        if path not in self._known or path in self.same:
            raise TreeError(f"a file in a state that nobody knows: {payload[:80]!r}")
        try:
            os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            self._charge(self._tree[path].size)
            self.same.add(path)
        else:
            raise TreeError(f"two entries of one name: {payload[:80]!r}")

    def _take_state(self, payload: bytes) -> None:
        if not self._last or not 0 < len(payload) <= STATE_LIMIT:
            raise TreeError(f"a state that is of no file, or is none: {payload[:80]!r}")
        self.states[self._last] = payload
        self._last = ""


@final
class Changes:
    """What is to come of a directory of the guest's, and what came.

    Args:
      base: What is known.
      excluded: Names that are to be left out.

    """

    def __init__(self, base: Base, excluded: Collection[str]) -> None:
        self._base = base
        self._excluded = sorted(map(os.fsencode, excluded))
        self._known: dict[str, bytes] = {}
        self._machine: Machine | None = None
        self._writer: ChangesWriter | None = None

    def make_writer(self, parent: int, name: str, *, max_bytes: int | None, mask: int) -> TreeWriter:
        """Return what writes that which comes."""
        self._writer = ChangesWriter(parent, name, self._base.tree, self._known, max_bytes=max_bytes, mask=mask)
        return self._writer

    @staticmethod
    def request(remote: str) -> bytes:
        """Return the request for them. Errors as `encode_request`."""
        return encode_request("pull", remote, _UNDER_WAY)

    def knowledge(self, machine: Machine) -> Iterator[bytes]:
        """Yield what to tell the guest of *machine* behind the request."""
        self._machine = machine
        self._known.update(self._base.known(machine))
        yield from pack(EXCLUDED, self._excluded)
        yield from pack(STATES, (field for path, state in self._known.items() for field in (os.fsencode(path), state)))

    @property
    def same(self) -> Tree:
        """The files that did not come, as they were and are."""
        assert self._writer is not None
        return {path: self._base.tree[path] for path in self._writer.same}

    def now_known(self, base: Base, tree: Tree) -> Base:
        """Return *base* with the states that hold from now on, when the guest has *tree*."""
        assert self._writer is not None
        assert self._machine is not None
        states = {path: self._known[path] for path in self._writer.same}
        return base.with_states(tree, {**states, **self._writer.states}, self._machine)
