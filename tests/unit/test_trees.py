"""Trees as records: what is read is written again, and what is not a tree writes nothing anywhere else."""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, strategies as st

from tests._leaks import open_fds
from trio_sandbox.guest.trees import (
    CHUNK,
    ENTRY_COST,
    HEADER,
    MAXIMUM_DEPTH,
    MAXIMUM_LENGTH,
    TreeError,
    TreeReader,
    TreeWriter,
    check_replaceable,
    extents,
    open_directory,
    remove,
)

Record = tuple[bytes, bytes]


def records(data: bytes) -> Iterator[Record]:
    while data:
        tag, length = HEADER.unpack_from(data)
        yield tag, data[HEADER.size : HEADER.size + length]
        data = data[HEADER.size + length :]


def read(path: Path) -> list[Record]:
    return list(records(b"".join(TreeReader(str(path)).batches())))


def write(parent: Path, sent: list[Record], *, max_bytes: int | None = None) -> TreeWriter:
    descriptor = open_directory(str(parent))
    writer = TreeWriter(descriptor, "new", max_bytes=max_bytes)
    try:
        for tag, payload in sent:
            writer.write(tag, payload)
    finally:
        writer.close()
        os.close(descriptor)
    return writer


def describe(path: Path) -> object:
    """Give all that is kept of a tree."""
    if path.is_symlink():
        return "link", os.readlink(path)
    mode = path.stat().st_mode & 0o7777
    if path.is_dir():
        return mode, {entry.name: describe(entry) for entry in path.iterdir()}
    return mode, path.read_bytes()


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
modes = st.sampled_from([0o644, 0o755, 0o600, 0o777])
files = st.tuples(modes, st.binary(max_size=64) | st.sampled_from([CHUNK - 1, CHUNK, 2 * CHUNK + 1]))
links = st.tuples(st.just("link"), names.map(lambda name: f"/{name}"))
trees = st.recursive(
    files | links,
    lambda children: st.tuples(st.sampled_from([0o700, 0o755, 0o555]), st.dictionaries(names, children, max_size=3)),
    max_leaves=8,
)


def build(path: Path, tree: Any) -> None:
    match tree:
        case ("link", str(target)):
            path.symlink_to(target)
        case (int(mode), bytes() | int() as data):
            path.write_bytes(bytes(data))
            path.chmod(mode)
        case (int(mode), children):
            path.mkdir()
            for name, child in cast("dict[str, Any]", children).items():
                build(path / name, child)
            path.chmod(mode)
        case _:
            raise AssertionError(tree)


@contextmanager
def directory() -> Generator[Path]:
    path = tempfile.mkdtemp()
    descriptor = open_directory(os.path.dirname(path))
    try:
        yield Path(path)
    finally:
        remove(descriptor, os.path.basename(path))
        os.close(descriptor)


@given(tree=trees.filter(lambda tree: tree[0] != "link"))
def test_what_is_read_is_written_again(tree: object) -> None:
    with directory() as parent:
        fds = open_fds()
        build(parent / "old", tree)
        sent = read(parent / "old")
        writer = write(parent, sent)
        assert writer.finished
        assert describe(parent / "new") == describe(parent / "old")
        assert open_fds() == fds


tags = st.sampled_from([b"d", b"u", b"f", b"c", b"l", b".", b"x"])
some_names = st.sampled_from(
    [b"a", b"b", b"..", b".", b"", b"/", b"/tmp/x", b"a/b", b"../canary", b"new", b"x" * 256, b"\xff", b"-rf", b"a\nb"]
)
some_modes = st.sampled_from([b"755", b"4755", b"-1", b"7_7", b""])
some_targets = st.sampled_from([b"..", b"/etc", b"../canary", b""])
payloads: st.SearchStrategy[bytes] = st.one_of(
    st.just(b""),
    st.binary(max_size=20),
    st.tuples(some_modes, some_names).map(b"\0".join),
    st.tuples(st.just(b"644"), some_names, st.binary(max_size=5)).map(b"\0".join),
    st.tuples(some_names, some_targets).map(b"\0".join),
)


@given(sent=st.lists(st.tuples(tags, payloads), max_size=12))
@example(sent=[(b"d", b"755\0"), (b"l", b"a\0../canary"), (b"d", b"755\0a"), (b"f", b"644\0x\0y")])
@example(sent=[(b"d", b"755\0"), (b"l", b"a\0../canary/file"), (b"f", b"644\0a\0overwritten")])
@example(sent=[(b"d", b"755\0"), (b"u", b""), (b"f", b"644\0canary\0x")])
@example(sent=[(b"d", b"755\0"), (b"u", b""), (b"u", b""), (b"f", b"644\0canary\0x")])
def test_nothing_else_is_ever_touched(sent: list[Record]) -> None:
    with directory() as outer:
        parent = outer / "parent"
        parent.mkdir()
        fds = open_fds()
        canary = parent / "canary"
        canary.mkdir()
        (canary / "file").write_text("as it was")
        before = describe(canary), os.listdir(outer)
        try:
            write(parent, sent)
        except TreeError:
            pass
        except OSError as exc:
            if exc.errno != errno.EILSEQ:  # a file system may refuse a name
                raise
        assert (describe(canary), os.listdir(outer)) == before
        assert set(os.listdir(parent)) <= {"canary", "new"}
        if (parent / "new").exists():
            assert (parent / "new").is_dir() or (parent / "new").stat().st_mode & 0o7000 == 0
        assert open_fds() == fds


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([(b"c", b"data")], "no file"),
        ([(b"u", b"")], "can't stand here"),
        ([(b".", b"")], "can't stand here"),
        ([(b"l", b"a\0target")], "can't stand here"),
        ([(b"f", b"644\0only")], "too few fields"),
        ([(b"d", b"4755\0")], "not a mode"),
        ([(b"d", b"9\0")], "not a mode"),
        ([(b"d", b"755\0"), (b"f", b"644\0..\0x")], "not a name"),
        ([(b"d", b"755\0"), (b"f", b"644\0/etc/passwd\0x")], "not a name"),
        ([(b"d", b"755\0"), (b"d", b"755\0a/b")], "not a name"),
        ([(b"d", b"755\0"), (b"d", b"755\0")], "not a name"),
        ([(b"d", b"755\0"), (b"f", b"644\0a\0"), (b"f", b"644\0a\0")], "one name"),
        ([(b"d", b"755\0"), (b"l", b"a\0/etc"), (b"d", b"755\0a")], "one name"),
        ([(b"d", b"755\0"), (b"l", b"a\0/etc/passwd"), (b"f", b"644\0a\0x")], "one name"),
        ([(b"d", b"755\0"), (b"l", b"a\0")], "target"),
        ([(b"d", b"755\0"), (b"l", b"a\0x\0y")], "target"),
        ([(b"d", b"755\0"), (b".", b"")], "can't stand here"),
        ([(b"d", b"755\0"), (b"u", b""), (b"d", b"755\0")], "more than one"),
        ([(b"f", b"644\0\0x"), (b".", b""), (b".", b"")], "can't stand here"),
        ([(b"f", b"644\0\0x"), (b".", b""), (b"f", b"644\0\0x")], "more than one"),
        ([(b"d", b"755\0a")] * (MAXIMUM_DEPTH + 1), "nested deeper"),
        ([(b"p", b"644\0pipe")], "can't stand here"),
    ],
)
def test_what_is_no_tree(tmp_path: Path, sent: list[Record], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        write(tmp_path, sent)


def test_what_stands_there_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "new").symlink_to("file")
    with pytest.raises(TreeError, match="one name"):
        write(tmp_path, [(b"f", b"644\0\0overwritten"), (b".", b"")])
    assert (tmp_path / "file").read_text() == "as it was"


def test_permission_bits_are_kept_and_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("#!/bin/sh")
    (tmp_path / "old").chmod(0o6754)
    write(tmp_path, read(tmp_path / "old"))
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o754


def test_a_limit_counts_content_and_entries(tmp_path: Path) -> None:
    sent = [(b"d", b"755\0"), (b"f", b"644\0a\0" + b"x" * 100), (b"c", b"y" * 100), (b"u", b""), (b".", b"")]
    write(tmp_path, sent, max_bytes=2 * ENTRY_COST + 200)
    descriptor = open_directory(str(tmp_path))
    remove(descriptor, "new")
    os.close(descriptor)
    with pytest.raises(OSError, match="were allowed") as caught:
        write(tmp_path, sent, max_bytes=2 * ENTRY_COST + 199)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("inside", [False, True])
def test_special_files_are_refused_and_not_opened(tmp_path: Path, kind: str, inside: bool) -> None:
    special = tmp_path / "special"
    if kind == "fifo":
        os.mkfifo(special)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(special))
    else:
        special = Path("/dev/null")
        if inside:
            pytest.skip("a device file takes privileges")
    with pytest.raises(OSError, match="neither a file nor") as caught:
        read(tmp_path if inside else special)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.filename == str(special)


def test_errors_name_what_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "nothing")
    assert caught.value.filename == str(tmp_path / "nothing")
    deep = tmp_path
    for _ in range(MAXIMUM_DEPTH):
        deep /= "d"
        deep.mkdir()
    fds = open_fds()
    with pytest.raises(OSError, match="nested deeper") as deep_error:
        read(tmp_path)
    assert deep_error.value.filename == str(deep)
    assert open_fds() == fds


def test_a_link_is_followed_where_reading_starts_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "up").symlink_to("..")
    (tmp_path / "start").symlink_to("tree")
    assert read(tmp_path / "start") == [(b"d", b"755\0"), (b"l", b"up\0.."), (b"u", b""), (b".", b"")]


def test_files_whose_size_is_not_known_are_read_to_their_end() -> None:
    sent = read(Path("/proc/self/status"))
    assert b"VmRSS" in b"".join(payload for _, payload in sent)


def test_a_file_that_grows_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * (3 * CHUNK))
    reader = TreeReader(str(path))
    with open(path, "ab") as log:
        for _ in reader.batches():
            log.write(b"y" * CHUNK)
            log.flush()
    assert reader.size <= 4 * CHUNK


def test_removing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "closed").mkdir(parents=True)
    (tree / "closed" / "file").write_text("")
    (tree / "closed").chmod(0)
    (tree / "out").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    descriptor = open_directory(str(tmp_path))
    remove(descriptor, "tree")
    remove(descriptor, "tree")
    check_replaceable(descriptor, "tree")
    with pytest.raises(OSError, match="not empty"):
        check_replaceable(descriptor, "kept")
    os.close(descriptor)
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["file"]


# --- Holes ---

MIB = 2**20
#: Lengths, and where content is, by what they show.
SPARSE: dict[str, tuple[int, dict[int, bytes]]] = {
    "nothing but a hole": (64 * MIB, {}),
    "content at the start": (64 * MIB, {0: b"x" * 5000}),
    "content in the middle": (64 * MIB, {10 * MIB: b"y" * 300_000}),
    "content at the end": (64 * MIB, {64 * MIB - 3: b"end"}),
    "content in many places": (64 * MIB, {number * MIB: bytes([number + 1]) * 4096 for number in range(60)}),
    "longer than any disk": (2**40, {2**39: b"far"}),
}


def make_sparse(path: Path, length: int, content: dict[int, bytes]) -> None:
    with open(path, "wb") as file:
        for position, data in content.items():
            file.seek(position)
            file.write(data)
        file.truncate(length)


@pytest.mark.parametrize("name", SPARSE)
def test_holes_stay_holes(tmp_path: Path, name: str) -> None:
    length, content = SPARSE[name]
    (tmp_path / "tree").mkdir()
    make_sparse(tmp_path / "tree" / "sparse", length, content)
    (tmp_path / "tree" / "z after it").write_text("more")
    reader = TreeReader(str(tmp_path / "tree"))
    sent = list(records(b"".join(reader.batches())))
    assert sum(len(payload) for _, payload in sent) < 2 * MIB
    assert reader.size < sum(map(len, content.values())) + 2 * 4096 * max(1, len(content))
    writer = write(tmp_path, sent)
    assert (writer.files, writer.size) == (reader.files, reader.size)
    copy = tmp_path / "new" / "sparse"
    assert copy.stat().st_size == length
    assert copy.stat().st_blocks * 512 <= (tmp_path / "tree" / "sparse").stat().st_blocks * 512 + 65536
    with open(copy, "rb") as file:
        for position, data in content.items():
            file.seek(position)
            assert file.read(len(data)) == data
    assert (tmp_path / "new" / "z after it").read_text() == "more"


def test_a_file_system_that_knows_no_holes_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sparse(tmp_path / "sparse", MIB, {0: b"x"})

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "no")

    with open(tmp_path / "sparse", "rb") as file:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(extents(file.fileno(), MIB)) == [(0, MIB)]


HOLE = struct.Struct(">Q").pack


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([(b"h", HOLE(1))], "can't be here"),
        ([(b"d", b"755\0x"), (b"h", HOLE(1))], "can't be here"),
        ([(b"f", b"644\0x\0"), (b"h", b"1")], "can't be here"),
        ([(b"f", b"644\0x\0"), (b"h", HOLE(0))], "a hole of nothing"),
    ],
)
def test_what_is_no_hole(tmp_path: Path, sent: list[Record], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        write(tmp_path, sent)


@pytest.mark.parametrize("holes", [[2**64 - 1], [2**63], [MAXIMUM_LENGTH + 1], [MAXIMUM_LENGTH, 1]])
def test_a_file_can_not_be_longer_than_any_disk_allows(tmp_path: Path, holes: list[int]) -> None:
    with pytest.raises(OSError, match=r"holes included, is too long") as caught:
        write(tmp_path, [(b"f", b"644\0x\0"), *((b"h", HOLE(size)) for size in holes)])
    assert caught.value.errno == errno.EFBIG


def test_a_limit_counts_holes_and_not_their_length(tmp_path: Path) -> None:
    sent = [(b"f", b"644\0x\0"), (b"h", HOLE(2**30)), (b"c", b"1234"), (b"h", HOLE(2**30)), (b".", b"")]
    needed = 3 * ENTRY_COST + 4
    assert write(tmp_path, sent, max_bytes=needed).finished
    assert (tmp_path / "new").stat().st_size == 2**31 + 4
    (tmp_path / "new").unlink()
    with pytest.raises(OSError, match=f"{needed - 1} bytes") as caught:
        write(tmp_path, sent, max_bytes=needed - 1)
    assert caught.value.errno == errno.EFBIG
