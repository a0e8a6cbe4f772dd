"""Layers of container images: archives read, and merged into one tree."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable

import pytest
from hypothesis import given, settings, strategies as st

from tests._oci import Member, archive, directory, member
from trio_sandbox.image.oci._merge import Limits, MergeError, Merger
from trio_sandbox.image.oci._tar import Kind, TarError, read_entries
from trio_sandbox.image.oci._tree import Node, Tree

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def merge(*layers: bytes | Iterable[Member], limits: Limits | None = None) -> Tree:
    merger = Merger(limits)
    for layer in layers:
        merger.add_layer(read_entries(layer if isinstance(layer, bytes) else archive(*layer)))
    return merger.tree


def paths(tree: Tree) -> set[str]:
    """Give all that is in the tree; directories with a slash, links with what they lead to."""
    found: set[str] = set()
    rest: list[tuple[bytes, Node]] = [(b"", tree.root)]
    while rest:
        path, node = rest.pop()
        for name, child in node.children.items():
            end = b"/" if child.is_directory else b" -> " + child.target if child.kind is Kind.SYMLINK else b""
            found.add((path + name + end).decode())
            if child.is_directory:
                rest.append((path + name + b"/", child))
    return found


def node(tree: Tree, path: str) -> Node:
    found = tree.get(path.encode())
    assert found is not None
    return found


# --- Archives ---


@pytest.mark.parametrize("style", FORMATS)
def test_what_python_writes_is_read(style: int) -> None:
    long = "" if style == tarfile.USTAR_FORMAT else "x" * 180 + "/"
    data = archive(
        directory("etc", mode=0o2750, uid=12, gid=34, mtime=1_000_000_000),
        member(f"{long}etc/file", b"content" * 100, mode=0o4711, uid=2_000_000, mtime=86400),
        member("etc/link", f"{long}etc/file", kind="symlink"),
        member("etc/other", f"{long}etc/file", kind="link"),
        member("dev/disk", kind="block", devmajor=259, devminor=3),
        member("dev/null", kind="character", devmajor=1, devminor=3),
        member("run/pipe", kind="fifo", mode=0o600),
        style=style,
    )
    first, file, symlink, link, disk, null, pipe = read_entries(data)
    assert (first.path, first.kind, first.mode, first.uid, first.gid) == (b"etc/", Kind.DIRECTORY, 0o2750, 12, 34)
    assert first.mtime == 10**18
    assert (file.path, file.mode, file.uid) == (f"{long}etc/file".encode(), 0o4711, 2_000_000)
    assert data[file.offset : file.offset + file.size] == b"content" * 100
    assert file.extents == ((0, 700),)
    assert (symlink.kind, symlink.target) == (Kind.SYMLINK, f"{long}etc/file".encode())
    assert (link.kind, link.target, link.size) == (Kind.HARD_LINK, f"{long}etc/file".encode(), 0)
    assert (disk.kind, disk.device) == (Kind.BLOCK_DEVICE, (259, 3))
    assert (null.kind, null.device) == (Kind.CHARACTER_DEVICE, (1, 3))
    assert (pipe.kind, pipe.mode) == (Kind.FIFO, 0o600)


def test_attributes_and_times_of_pax_are_read() -> None:
    headers = {"SCHILY.xattr.security.capability": "\x01\x00\n=\udcff", "mtime": "-12.5", "SCHILY.xattr.user.a": "b"}
    (entry,) = read_entries(archive(member("a", pax_headers=headers)))
    assert dict(entry.xattrs) == {b"security.capability": b"\x01\x00\n=\xff", b"user.a": b"b"}
    assert entry.mtime == -12_500_000_000


def sparse_files() -> dict[str, bytes]:
    """Give one file of 10,000 bytes with content at 1000 (ten bytes) and 5000 (five), in each of the ways in which it is written."""
    content = b"0123456789abcde"

    def pax(headers: dict[str, str], data: bytes) -> bytes:
        return archive(member("GNUSparseFile.0/f", data, pax_headers=headers))

    old = bytearray(archive(member("f", content), style=tarfile.GNU_FORMAT))
    numbers = (1000, 10, 5000, 5)
    old[386 : 386 + 48] = b"".join(b"%011o\0" % number for number in numbers)
    old[483:495] = b"%011o\0" % 10_000
    old[156:157] = b"S"
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old[:512])
    text = b"2\n1000\n10\n5000\n5\n".ljust(512, b"\0")
    named = {"GNU.sparse.name": "f"}
    return {
        "old": bytes(old),
        "0.1": pax({**named, "GNU.sparse.size": "10000", "GNU.sparse.map": "1000,10,5000,5"}, content),
        "1.0": pax(
            {**named, "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10000"}, text + content
        ),
    }


@pytest.mark.parametrize("name", sparse_files())
def test_sparse_files_keep_their_holes(name: str) -> None:
    data = sparse_files()[name]
    (entry,) = read_entries(data)
    assert (entry.path, entry.size, entry.extents) == (b"f", 10_000, ((1000, 10), (5000, 5)))
    assert data[entry.offset : entry.offset + 15] == b"0123456789abcde"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # and Python agrees
        (info,) = tar.getmembers()
        file = tar.extractfile(info)
        assert file is not None
        assert file.read()[1000:1010] == b"0123456789"


def test_the_old_map_of_a_sparse_file_goes_on_in_blocks_of_its_own() -> None:
    content = b"x" * 30
    header = bytearray(archive(member("f", content), style=tarfile.GNU_FORMAT)[:512])
    entries = [b"%011o\0%011o\0" % (1000 * number, 1) for number in range(30)]
    header[386:482] = b"".join(entries[:4])
    header[482:483] = b"\1"
    header[483:495] = b"%011o\0" % 30_000
    header[156:157] = b"S"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = b"".join(entries[4:25]) + b"\1" + bytes(7) + b"".join(entries[25:]).ljust(512, b"\0")
    (entry,) = read_entries(bytes(header) + blocks + content.ljust(512, b"\0"))
    assert entry.extents == tuple((1000 * number, 1) for number in range(30))
    assert entry.offset == 3 * 512


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (archive(member("a", b"b" * 1000))[:700], "ends within a file"),
        (archive(member("a"))[:300], "ends within a header"),
        (b"\1" * 512, "is no number|checksum"),
        (archive(member("a"), member("b"))[:512] + b"x" * 512, "is no number|checksum"),
        (archive(member("x" * 200))[:1024], "ends before the entry"),
        (archive(member("a", pax_headers={"size": "-1"})), "is no number"),
        (archive(member("a", pax_headers={"b": "c", "dd": "e"})).replace(b" dd=e", b"_dd=e"), "is no number"),
        (archive(member("a", pax_headers={"uid": str(2**32)})), "no number of a user"),
        (archive(member("a", pax_headers={"comment": "x" * (1 << 20)})), "extensions of"),
        (archive(member("a", pax_headers={f"SCHILY.xattr.user.{n}": "x" for n in range(200)})), "extended attributes"),
        (
            archive(member("a", b"1234", pax_headers={"GNU.sparse.size": "9", "GNU.sparse.map": "4,2,2,2"})),
            "not in order",
        ),
        (archive(member("a", b"1", pax_headers={"GNU.sparse.size": "9", "GNU.sparse.map": "0,2"})), "not what the"),
    ],
)
def test_damaged_archives_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(TarError, match=words):
        list(read_entries(data))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_that_are_about_no_entry_have_an_end(kind: bytes) -> None:
    """Sixteen million of them are one small file, once compressed."""
    info, _ = member("a")
    info.type = kind
    header = info.tobuf(tarfile.USTAR_FORMAT)
    entry = archive(member("b"))[:512]
    with pytest.raises(TarError, match="more headers that are about entries than entries"):
        list(read_entries(header * 10_100 + entry))
    # As other programs write them: a few before each.
    assert len(list(read_entries((header * 4 + entry) * 3000))) == 3000


def test_kinds_that_nobody_knows_are_refused() -> None:
    info, _ = member("a")
    info.type = b"Z"
    with pytest.raises(TarError, match="kind b'Z'"):
        list(read_entries(archive((info, b""))))


# --- Layers ---


def test_layers_are_put_on_top_of_each_other() -> None:
    tree = merge(
        [directory("a", mode=0o700), member("a/one", "1"), member("a/two", "2")],
        [directory("a", mode=0o755, uid=7), member("a/two", "other", mode=0o600), member("b/c/three", "3")],
    )
    assert paths(tree) == {"a/", "a/one", "a/two", "b/", "b/c/", "b/c/three"}
    assert (node(tree, "a").mode, node(tree, "a").uid) == (0o755, 7)
    assert (node(tree, "a/two").mode, node(tree, "a/two").source, node(tree, "a/one").source) == (0o600, 1, 0)
    assert node(tree, "b").mode == 0o755


@pytest.mark.parametrize("last", [True, False])
def test_what_takes_away_is_about_lower_layers_only(last: bool) -> None:
    marks = [member("d/.wh..wh..opq"), member("e/.wh.gone"), member("e/.wh.again"), member("e/.wh.never")]
    added = [directory("d"), member("d/new"), member("d/sub/new"), member("e/again", "new")]
    tree = merge(
        [member("d/old"), member("d/sub/old"), member("e/gone/deep"), member("e/again/deep"), member("e/kept")],
        [*added, *marks] if last else [*marks, *added],
    )
    assert paths(tree) == {"d/", "d/new", "d/sub/", "d/sub/new", "e/", "e/again", "e/kept"}


def chosen(kind: int, one: str, two: str) -> Member:
    """Return an entry that adds something, or takes something away."""
    return (
        directory(f"{one}/{two}"),
        member(f"{one}/{two}/file"),
        member(f"{one}/.wh.{two}"),
        member(f"{one}/.wh..wh..opq"),
        member(f".wh.{one}"),
    )[kind]


MEMBERS = st.builds(chosen, st.integers(0, 4), st.sampled_from("abc"), st.sampled_from("abc"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(MEMBERS, max_size=8), max_size=4), st.randoms(use_true_random=False))
def test_the_order_in_a_layer_does_not_matter(layers: list[list[Member]], drawn: random.Random) -> None:
    shuffled = [drawn.sample(layer, len(layer)) for layer in layers]
    assert paths(merge(*layers)) == paths(merge(*shuffled))


def test_hard_links_across_layers_are_one_file() -> None:
    tree = merge(
        [member("a", "content", uid=5)],
        [member("d/b", "a", kind="link"), member("d/c", "/d/b", kind="link")],
        [member(".wh.a")],
    )
    assert paths(tree) == {"d/", "d/b", "d/c"}
    assert node(tree, "d/b") is node(tree, "d/c")
    assert node(tree, "d/b").uid == 5
    changed = merge([member("a", "1"), member("b", "a", kind="link")], [member("a", "22")])
    assert (node(changed, "a").size, node(changed, "b").size) == (2, 1)


def test_types_change() -> None:
    tree = merge(
        [member("a/deep"), member("b"), member("c", "b", kind="symlink"), member("d/e")],
        [member("a"), directory("b"), member("b/x"), directory("c"), member("d", "/b", kind="symlink")],
    )
    assert paths(tree) == {"a", "b/", "b/x", "c/", "d -> /b"}


def test_the_same_name_twice_is_the_last_one() -> None:
    tree = merge([member("a", "1", mode=0o600), member("./a", "22", mode=0o640), member("/a", "333")])
    assert (paths(tree), node(tree, "a").size) == ({"a"}, 3)


def test_links_on_the_way_lead_nowhere_out_of_the_root() -> None:
    tree = merge(
        [
            directory("usr/lib"),
            member("lib", "usr/lib", kind="symlink"),
            member("out", "../../../etc", kind="symlink"),
            member("etc/passwd", "inside"),
            member("absolute", "/", kind="symlink"),
        ],
        [member("lib/new"), member("out/shadow", "inside"), member("absolute/top")],
    )
    assert paths(tree) >= {"usr/lib/new", "etc/shadow", "top", "lib -> usr/lib"}
    assert "lib/new" not in paths(tree)


def test_what_takes_away_does_not_go_through_links() -> None:
    lower = [member("usr/lib/kept"), member("lib", "usr/lib", kind="symlink"), member("d", "/", kind="symlink")]
    tree = merge(lower, [member("lib/.wh.kept"), member("lib/.wh..wh..opq"), member("d/.wh..wh..opq")])
    assert paths(tree) == {"usr/", "usr/lib/", "usr/lib/kept", "lib -> usr/lib", "d -> /"}


def test_notes_of_other_programs_are_left_out() -> None:
    headers = {"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.system.posix_acl_access": "x"}
    tree = merge([member(".wh..wh.plnk/1.2"), member(".wh..wh.aufs"), member("a", pax_headers=headers)])
    assert "a" in paths(tree)
    assert node(tree, "a").xattrs == ()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member("../../etc/passwd")], "leads out of its directory"),
        ([member("a/../b")], "leads out of its directory"),
        ([member("a", "../../etc/passwd", kind="link")], "leads out of its directory"),
        ([member("a", "nothing", kind="link")], "which is no file there"),
        ([directory("d"), member("a", "d", kind="link")], "which is no file there"),
        ([member("a"), member("a/b")], "is no directory, and there is a file in it"),
        ([member("a", "nowhere", kind="symlink"), member("a/b")], "a link that leads to no directory"),
        ([member("a", "b", kind="symlink"), member("b", "a", kind="symlink"), member("a/c")], "more than 40"),
        ([member("x" * 256)], "a name has more than 255 bytes"),
        ([member("d/.wh.")], "takes nothing away"),
        ([member("d/.wh...")], "takes nothing away"),
        ([member("./", "x", kind="symlink")], "the root is no directory"),
        ([member("a", "x" * 4096, kind="symlink")], "a link that leads nowhere"),
        ([member("a", pax_headers={"SCHILY.xattr.user.a": "x" * 5000})], "more extended attributes"),
    ],
)
def test_what_is_no_layer_is_refused(members: list[Member], words: str) -> None:
    with pytest.raises(MergeError, match=words):
        merge(members)


@pytest.mark.parametrize(
    ("layers", "limits", "words"),
    [
        ([[member(str(n)) for n in range(20)]], Limits(entries=10), "more than 10 files"),
        ([[member("/".join("abcdefghijkl"))]], Limits(entries=10), "more than 10 files"),
        ([[member("a")]] * 4, Limits(layers=3), "more than 3 layers"),
        ([[member("a/" * 20 + "b")]], Limits(depth=10), "more than 10 deep"),
        ([[member("a/" * 20 + "b")]], Limits(path_bytes=30), "a path has 41 bytes"),
        ([[member("a", "1234")]], Limits(file_bytes=3), "4 bytes; 3 are allowed"),
        ([[member("a/b/c")]] * 10, Limits(steps=30), "too many parts"),
        ([[member("a" * 200)]] * 6, Limits(description_bytes=1000), "take more than"),
        ([[member("a", "b" * 200, kind="symlink")]] * 6, Limits(description_bytes=1000), "take more than"),
        (
            [[member("a", pax_headers={"SCHILY.xattr.user.a": "x" * 200})]] * 6,
            Limits(description_bytes=1000),
            "take more",
        ),
        (
            [
                [
                    member(
                        "a",
                        "1234567",
                        pax_headers={"GNU.sparse.size": "99", "GNU.sparse.map": "0,1,2,1,4,1,6,1,8,1,10,1,12,1"},
                    )
                ]
            ]
            * 2,
            Limits(description_bytes=1000),
            "sparse files take more than",
        ),
    ],
)
def test_more_than_may_be_is_refused(layers: list[list[Member]], limits: Limits, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        merge(*layers, limits=limits)


def test_links_make_nothing_deeper_than_it_may_be() -> None:
    members = [directory("d0/" + "x/" * 9)]
    for number in range(8):
        members.append(member(f"l{number}", f"{'l' + str(number - 1) if number else 'd0'}/" + "x/" * 9, kind="symlink"))
        members.append(directory(f"l{number}/" + "x/" * 9))
    with pytest.raises(MergeError, match="more than 50 deep"):
        merge(members, limits=Limits(depth=50))
