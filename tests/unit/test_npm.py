"""Packages of Node.js: what can be asked for, which lock, what npm is told and says, and what comes out of an archive."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from tests._registry import make_archive
from trio_sandbox import Image, PackagesError
from trio_sandbox._image_steps import NpmStep
from trio_sandbox.image import _npm, _npm_tree
from trio_sandbox.image._choices import NPM_LOCK, PYLOCK, choice_name, is_choice
from trio_sandbox.image._npm_lock import NpmLock, NpmPackage, parse_npm_lock
from trio_sandbox.image._recipe import digest_of

SHA = "A" * 86 + "=="
ENTRY: dict[str, object] = {"version": "1.0.0", "integrity": f"sha512-{SHA}", "resolved": "https://example.org/x.tgz"}
WANTED = {"dependencies": {"x": "^1.0.0"}}


def lock(entries: Mapping[str, object] | None = None, /, **fields: object) -> str:
    """Give a lock of one package, with *fields* of its own, or of *entries*."""
    places = {"node_modules/x": {**ENTRY, **fields}} if entries is None else entries
    return json.dumps({"lockfileVersion": 3, "packages": {"": WANTED, **places}})


# --- What is asked for ---


@pytest.mark.parametrize(
    "text", ["zod", "typescript@5", "@types/node@^20", "x@>=1 <2 || 3", "x@latest", "JSONStream", "a.b"]
)
def test_what_is_a_requirement(text: str) -> None:
    assert Image("node").npm(text).steps == (NpmStep((text,)),)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " x",
            "-g",
            "--registry=x",
            "./x",
            "../x",
            "/x",
            "~/x",
            ".",
            "x/y",
            "x.tgz",
            "x@y.tar.gz",
            "x@./y",
            "x@.",
        ),
        *(
            "x@file:y",
            "x@npm:y@1",
            "github:x/y",
            "git+ssh://x",
            "https://example.org/x",
            "x@",
            "@x",
            "@/x",
            "x\n",
            "x@1\n",
        ),
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="a requirement of npm must be a package's name"):
        Image("node").npm(text)


def test_what_is_no_text() -> None:
    with pytest.raises(TypeError, match="a requirement must be str, not 5"):
        Image("node").npm(cast("str", 5))
    with pytest.raises(ValueError, match="`npm` needs a requirement"):
        Image("node").npm()


# --- Locks ---


def test_a_lock_is_read_and_written() -> None:
    found = parse_npm_lock(lock(bin={"x": "cli.js", "a/b": "cli.js"}))
    assert found.packages == (NpmPackage("node_modules/x", "x", "1.0.0", SHA, (("x", "cli.js"),)),)
    assert found.wanted == ("x",)
    assert parse_npm_lock(found.text) == found


def test_a_package_by_another_name() -> None:
    (package,) = parse_npm_lock(lock(name="@scope/y")).packages
    assert (package.place, str(package)) == ("node_modules/x", "@scope/y@1.0.0")


@pytest.mark.parametrize(
    ("fields", "there"),
    [
        ({"os": ["win32"]}, False),
        ({"os": ["!linux"]}, False),
        ({"os": ["!win32"]}, True),
        ({"os": ["linux", "darwin"], "cpu": ["x64"], "libc": ["glibc"]}, True),
        ({"cpu": ["arm64"]}, False),
        ({"libc": ["musl"]}, False),
        ({"cpu": "any"}, True),
    ],
)
def test_what_is_for_another_platform(fields: dict[str, object], there: bool) -> None:
    entries = {"node_modules/x": {**ENTRY, **fields, "optional": True}, "node_modules/x/node_modules/y": ENTRY}
    assert len(parse_npm_lock(lock(entries)).packages) == (2 if there else 0)
    if not there:
        with pytest.raises(PackagesError, match=r"x@1\.0\.0 is for (os|cpu|libc) .* only, and the image is"):
            parse_npm_lock(lock(**fields))


@pytest.mark.parametrize(("libc", "there"), [("glibc", "node_modules/for-glibc"), ("musl", "node_modules/for-musl")])
def test_packages_are_for_the_images_c_library(libc: str, there: str) -> None:
    entries = {f"node_modules/for-{each}": {**ENTRY, "libc": [each], "optional": True} for each in ("glibc", "musl")}
    assert [package.place for package in parse_npm_lock(lock(entries), libc).packages] == [there]


@pytest.mark.parametrize(
    "fields",
    [
        {"resolved": "git+ssh://git@example.org/x.git"},
        {"resolved": "file:../x"},
        {"resolved": "../x", "link": True},
        {"version": None},
    ],
)
def test_what_does_not_come_from_a_registry(fields: dict[str, object]) -> None:
    fields = {key: value for key, value in {**ENTRY, **fields}.items() if value is not None}
    with pytest.raises(PackagesError, match=r"x@.* does not come from a registry, .*inside a virtual machine"):
        parse_npm_lock(lock({"node_modules/x": fields}))


@pytest.mark.parametrize("digest", ["", "sha1-AAAA", f"sha512-{'A' * 87}", f"sha512-{'.' * 86}=="])
def test_a_package_without_a_digest_is_refused(digest: str) -> None:
    with pytest.raises(PackagesError, match=r"no SHA-512 digest of x@1\.0\.0"):
        parse_npm_lock(lock(integrity=digest))


@pytest.mark.parametrize(
    "place",
    [
        *("x", "node_modules/..", "node_modules/../x", "node_modules/x/..", "/node_modules/x", "node_modules/@x"),
        *("node_modules/x/y", "node_modules/-x", "node_modules/x\n", "/".join(["node_modules/x"] * 40)),
    ],
)
def test_a_place_that_is_none(place: str) -> None:
    with pytest.raises(PackagesError, match="it is no lock of npm's"):
        parse_npm_lock(lock({place: ENTRY}))


@pytest.mark.parametrize(
    "fields", [{"version": "-1"}, {"version": "1 --global"}, {"name": "--global"}, {"name": "../x"}]
)
def test_what_npm_could_take_for_something_else(fields: dict[str, object]) -> None:
    with pytest.raises(PackagesError, match="it is no lock of npm's"):
        parse_npm_lock(lock(**fields))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"packages": 1}', '{"packages": {"": {}, "node_modules/x": 1}}', "[" * 100_000]
)
def test_what_is_no_lock(text: str) -> None:
    with pytest.raises(PackagesError, match="it is no lock of npm's"):
        parse_npm_lock(text)


def test_a_stored_choice_says_which_kind_it_is() -> None:
    found = parse_npm_lock(lock())
    name = choice_name(NPM_LOCK, "a" * 64)
    stored = f"{digest_of(found.text)}\n{found.text}"
    assert is_choice(name, stored)
    assert not is_choice(name, f"{stored} ")
    assert not is_choice("../x", stored)
    with pytest.raises(PackagesError, match="not a lock of packages"):
        is_choice(choice_name(PYLOCK, "a" * 64), stored)


def package(place: str, version: str = "1.0.0") -> NpmPackage:
    return NpmPackage(f"node_modules/{place}", place.rpartition("node_modules/")[2], version, SHA)


def test_what_changes_is_installed() -> None:
    before = NpmLock("1", (package("a"), package("b"), package("b/node_modules/c")), ("a",))
    after = NpmLock("2", (package("a"), package("b", "2.0.0"), package("b/node_modules/c"), package("d")), ("a", "d"))
    assert after.change(None) == (after.packages, ())
    assert after.change(after) == ((), ())
    # What is in a directory that is cleared goes with it.
    assert after.change(before) == (after.packages[1:], ("node_modules/b",))
    asked_for = NpmLock("3", before.packages, ("a", "b"))
    assert asked_for.change(before) == ((package("b"),), ())  # for its programs


# --- npm ---


def test_npm_runs_nothing() -> None:
    for arguments in (
        _npm.choose_arguments(NpmStep(("zod",))),
        _npm.fetch_arguments([package("x")], Path("/there")),
    ):
        assert {"--ignore-scripts", "--git=/bin/false", "--global=false"} <= set(arguments[: arguments.index("--")])
    assert "--package-lock-only" in _npm.choose_arguments(NpmStep(("zod",)))
    assert _npm.fetch_arguments([package("x")], Path("/there"))[-2:] == ["--", "x@1.0.0"]


def test_of_our_environment_npm_gets_what_says_where_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "HOME": "/h",
        "NPM_CONFIG_CACHE": "cache",
        "npm_config_//example.org/:_authToken": "t",
        "NODE_EXTRA_CA_CERTS": "ca.pem",
        "npm_lifecycle_event": "test",
    }
    assert _npm.npm_environment(given) == {
        "HOME": "/h",
        "npm_config_cache": f"{tmp_path}/cache",
        "npm_config_//example.org/:_authToken": "t",
        "NODE_EXTRA_CA_CERTS": f"{tmp_path}/ca.pem",
    }


def test_another_registry_is_another_choice() -> None:
    given = {
        "NPM_CONFIG_REGISTRY": "https://a",
        "npm_config_@s:registry": "https://b",
        "npm_config_cache": "/c",
        "HOME": "/h",
    }
    assert _npm.npm_choice(given) == [("npm_config_@s:registry", "https://b"), ("npm_config_registry", "https://a")]


def test_npms_words_are_told() -> None:
    said = "npm ERR! code ETARGET\nnpm ERR! notarget No matching version found for x@9.\nnpm ERR! A complete log of this run\n"
    assert str(_npm.explain_npm(said)).endswith("npm says:\ncode ETARGET\nnotarget No matching version found for x@9.")
    assert "safe to try again" in str(_npm.explain_npm("npm error code ENOTCACHED\nnpm error request failed"))
    for code in ("ENOSPC", "EDQUOT"):
        assert "disk is full" in str(_npm.explain_npm(f"npm error code {code}"))


# --- Archives ---


def unpack(directory: Path, data: bytes, *programs: tuple[str, str]) -> Path:
    archive = directory / "archive"
    archive.write_bytes(data)
    there = NpmPackage("node_modules/x", "x", "1.0.0", SHA, programs)
    _npm_tree.unpack_npm([there], {SHA: archive}, ["x"], directory / "root")
    return directory / "root"


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_an_archive_is_unpacked(tmp_path: Path) -> None:
    root = unpack(
        tmp_path,
        make_archive({"a/b.js": "1", "cli.js": "2"}, entry("./package/./c"), entry("other/d")),
        ("x", "./cli.js"),
    )
    files = {path.relative_to(root / "node_modules/x").as_posix() for path in (root / "node_modules/x").rglob("*")}
    assert files == {"a", "a/b.js", "c", "cli.js", "d"}
    program = root / "usr/local/bin/x"
    assert (program.read_text(), program.stat().st_mode & 0o777) == ("2", 0o755)
    assert (root / "node_modules/.bin/x").read_text() == "2"
    assert (root / "node_modules/x/a/b.js").stat().st_mode & 0o777 == 0o644
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_dir()} == {0o755}


def test_one_that_is_not_compressed(tmp_path: Path) -> None:
    assert (unpack(tmp_path, gzip.decompress(make_archive({"a": "1"}))) / "node_modules/x/a").exists()


def test_nothing_comes_out_but_files(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [
        entry("package/link", tarfile.SYMTYPE, str(outside)),
        entry("package/link/evil"),
        entry("package/hard", tarfile.LNKTYPE, "/etc/passwd"),
        entry("package/fifo", tarfile.FIFOTYPE),
        entry("package/device", tarfile.CHRTYPE),
    ]
    root = unpack(
        tmp_path, make_archive({}, *members), ("up", "../../../../outside"), ("root", "/bin/sh"), ("none", "none")
    )
    assert {path.relative_to(root / "node_modules").as_posix() for path in (root / "node_modules").rglob("*")} == {
        "x",
        "x/link",
        "x/link/evil",
    }
    assert list(outside.iterdir()) == []
    assert list((root / "usr/local/bin").iterdir()) == []


def huge(size: int) -> bytes:
    """Give the header of attributes that are *size* bytes long, and zeros."""
    member = entry("package/x", tarfile.XHDTYPE)
    member.size = size
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**21))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_archive({}, entry("package/../../evil")), "can't be unpacked: .*leads out of the package"),
        (make_archive({}, entry("../evil")), "can't be unpacked: .*leads out of the package"),
        (make_archive({}, entry("package/" + "a" * 256)), "can't be unpacked: .*of more than 255 bytes"),
        (make_archive({}, entry("package/" + "a/" * 65 + "b")), "can't be unpacked: .*more than 64 directories"),
        (make_archive({}, entry("package/" + "a/" * 2**20)), "can't be unpacked: .*too long a name"),
        (huge(2**20 + 1), "can't be unpacked: .*too long a name"),
        (huge(2**40), "can't be unpacked: .*too long a name"),
        (make_archive({"a": "1", "a/b": "2"}), "can't be unpacked: .*two things in one place"),
        (make_archive({"a/b": "1", "a": "2"}), "can't be unpacked: .*two things in one place"),
        (make_archive({"a": "1" * 10_000})[:60], "can't be unpacked"),
        (b"\x1f\x8bgarbage", "can't be unpacked"),
        (b"", "can't be unpacked"),
        (b"no archive", "can't be unpacked"),
    ],
    ids=range(13),
)
def test_an_archive_that_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(PackagesError, match=rf"the archive of x@1\.0\.0 {message}"):
        unpack(tmp_path, data)
    assert sorted(os.listdir(tmp_path)) == ["archive", "root"]


def test_what_is_unpacked_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = entry("package/zeros")
        member.size = 2**21
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    monkeypatch.setattr(_npm_tree, "_MOST_BYTES", 2**20)
    with pytest.raises(PackagesError, match="GiB together"):
        unpack(tmp_path, packed.getvalue())
    monkeypatch.setattr(_npm_tree, "_MOST_BYTES", 2**30)
    monkeypatch.setattr(_npm_tree, "_MOST_ENTRIES", 2)
    with pytest.raises(PackagesError, match="2 files and directories together"):
        unpack(tmp_path / "root", make_archive({"a": "", "b": "", "c": ""}))
