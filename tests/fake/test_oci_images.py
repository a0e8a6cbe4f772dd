"""Container images: file systems that others find sound, and the store's entries, made of layouts of our own."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest

from tests._oci import Member, archive, directory, member, write_fetched
from trio_sandbox import Image, ImageBuildError, OciError
from trio_sandbox.image import ImageStore
from trio_sandbox.image.oci import OciRecipe, _recipe
from trio_sandbox.image.oci._ext4 import UNIT, write_file_system
from trio_sandbox.image.oci._merge import Merger
from trio_sandbox.image.oci._tar import read_entries
from trio_sandbox.image.oci._tree import TreeError
from trio_sandbox.qemu._process import require_program

USERS = b"root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/app:/bin/sh\n"


def debugfs(disk: Path, *commands: str) -> str:
    script = "".join(f"{command}\n" for command in commands).encode()
    result = subprocess.run(
        [require_program("debugfs"), "-f", "-", disk], input=script, capture_output=True, check=True
    )
    return result.stdout.decode("utf-8", "replace")


def check(disk: Path) -> None:
    result = subprocess.run([require_program("e2fsck"), "-fn", disk], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def make_disk(path: Path, *layers: Iterable[Member], size: int = 2 * UNIT) -> Path:
    merger = Merger()
    sources = [archive(*layer) for layer in layers]
    for source in sources:
        merger.add_layer(read_entries(source))
    with path.open("xb") as file:
        write_file_system(
            file.fileno(), size, merger.tree.root, sources, uuid=bytes(range(16)), check_cancelled=lambda: None
        )
    return path


def test_a_file_system_has_all_of_a_tree(tmp_path: Path) -> None:
    capability = "\x01\0\0\x02\0\x20" + "\0" * 14
    headers = {"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.colour": "blue"}
    disk = make_disk(
        tmp_path / "disk",
        [
            directory("", mode=0o750, uid=3),
            member("bin/tool", b"x" * 5000, mode=0o4755, uid=70_000, gid=80_000, mtime=2**33),
            member("bin/other", "bin/tool", kind="link"),
            member("cap", "1", pax_headers=headers),
            member("short", "bin/tool", kind="symlink"),
            member("long", "y" * 300, kind="symlink"),
            member("null", kind="character", devmajor=1, devminor=3),
            member("disk", kind="block", devmajor=259, devminor=70_000),
            member("pipe", kind="fifo"),
            member("line\nend", "2"),
            member("z" * 255, "3"),
            *(member(f"many/{'n' * 200}{number}", "") for number in range(300)),
        ],
    )
    check(disk)
    tool = debugfs(disk, "stat /bin/tool", "stat /bin/other")
    assert tool.count("Mode:  04755") == tool.count("User: 70000   Group: 80000") == tool.count("Links: 2") == 2
    assert "mtime: 0x00000000:00000002" in tool
    assert 'user.colour (4) = "blue"' in (cap := debugfs(disk, "stat /cap"))
    assert "security.capability (20) = 01 00 00 02 00 20 00" in cap
    links = debugfs(disk, "stat /short", "stat /long")
    assert 'Fast link dest: "bin/tool"' in links
    assert "Size: 300" in links
    devices = debugfs(disk, "stat /null", "stat /disk", "stat /pipe", "stat /")
    assert "01:03" in devices
    assert "259:70000" in devices
    assert "Type: FIFO" in devices
    assert "Mode:  0750" in devices
    assert debugfs(disk, "ls -p /many").count("/100644/") == 300
    assert "line" in debugfs(disk, "ls -p /")
    subprocess.run(
        [require_program("debugfs"), "-R", f"dump /bin/tool {tmp_path}/tool", disk], check=True, capture_output=True
    )
    assert (tmp_path / "tool").read_bytes() == b"x" * 5000


def test_holes_stay_holes_and_large_files_have_trees_of_extents(tmp_path: Path) -> None:
    parts = [(number * 12_288 + 100, 5000) for number in range(2000)]
    content = os.urandom(5000 * len(parts))
    size = parts[-1][0] + 50_000
    headers = {
        "GNU.sparse.size": str(size),
        "GNU.sparse.map": ",".join(f"{start},{length}" for start, length in parts),
    }
    disk = make_disk(
        tmp_path / "disk",
        [
            member("sparse", content, pax_headers=headers),
            member("hole", pax_headers={"GNU.sparse.size": "999999999", "GNU.sparse.map": "5,0"}),
        ],
    )
    check(disk)
    subprocess.run(
        [require_program("debugfs"), "-R", f"dump /sparse {tmp_path}/sparse", disk], check=True, capture_output=True
    )
    wanted = bytearray(size)
    for number, (start, length) in enumerate(parts):
        wanted[start : start + length] = content[5000 * number : 5000 * (number + 1)]
    assert (tmp_path / "sparse").read_bytes() == wanted
    assert "Size: 999999999" in (hole := debugfs(disk, "stat /hole"))
    assert "Blockcount: 0" in hole


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match="does not fit"):
        make_disk(tmp_path / "disk", [member(str(number), bytes(2**20)) for number in range(130)], size=UNIT)
    with pytest.raises(TreeError, match="no device"):
        make_disk(tmp_path / "other", [member("a", kind="block", devmajor=2**20, devminor=3)])


# --- Entries of the store ---


async def build(tmp_path: Path, *layers: bytes, **fields: object) -> tuple[Path, dict[str, object]]:
    """Build an image of layers; return its disk, raw, and what its manifest says."""
    tmp_path.mkdir(exist_ok=True)
    fetched = tmp_path / "fetched"
    manifest = write_fetched(fetched, *layers, **fields).partition(":")[2]
    store = ImageStore(tmp_path / "cache")
    built = await store.ensure_container(OciRecipe(manifest=manifest, reference="oci:test", directory=fetched))
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", built.path, raw], check=True)  # noqa: ASYNC221
    return raw, dict(built.manifest.details)


async def test_an_image_becomes_a_disk_with_what_guests_need(tmp_path: Path) -> None:
    lower = archive(
        member("etc/passwd", USERS),
        member("usr/bin/python3.12", mode=0o755),
        member("usr/bin/python3", "python3.12", kind="symlink"),
        member("bin", "usr/bin", kind="symlink"),
        member("etc/environment", "KEPT=1"),
        member("opt/node", mode=0o755),
        member("run", "/nowhere", kind="symlink"),
    )
    upper = archive(member("usr/bin/bash", mode=0o755), member("usr/bin/.wh.python3"))
    config = {
        "Env": ["PATH=/opt:/usr/bin", "A=b=c", "TWO=a\nb"],
        "User": "app",
        "WorkingDir": "/srv/app",
        "Entrypoint": ["/entry"],
        "Cmd": ["node", "x"],
        "Labels": {"a": "b"},
    }
    raw, details = await build(tmp_path, lower, upper, config=config)
    check(raw)
    assert details["languages"] == ["javascript", "shell"]
    settings = {
        "user": 1234,
        "group": 1235,
        "directory": "/srv/app",
        "command": ["/entry", "node", "x"],
        "labels": {"a": "b"},
    }
    assert details["settings"] == settings
    assert "KEPT=1\nPATH=/opt:/usr/bin\nA=b=c\n" in debugfs(raw, "cat /etc/environment")
    names = debugfs(raw, "ls -p /")
    for name in ("dev", "proc", "run", "sys", "tmp", "srv"):
        assert f"/{name}/" in names


async def test_a_second_build_finds_the_first(tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    manifest = write_fetched(fetched, archive(member("a"))).partition(":")[2]
    store = ImageStore(tmp_path / "cache")
    recipe = OciRecipe(manifest=manifest, reference="oci:/test", directory=fetched)
    built = await store.ensure_container(recipe)
    again = await store.ensure_container(OciRecipe(manifest=manifest, reference="oci:/test"), build=False)
    assert again == built
    assert (await store.ensure(built.name)).settings == built.settings
    (stored,) = store.list()
    assert (stored.name, stored.step, stored.current) == (built.name, "oci:/test", True)
    await store.prune()
    assert built.path.exists()
    assert await store.remove("oci:/test") > 0
    assert not store.list()


async def test_users_whose_numbers_are_none_are_nobody(tmp_path: Path) -> None:
    """Reading a number of many digits fails in another way than reading what is no number."""
    users = f"app:x:{'9' * 5000}:1::/:\nother:x:1500:{'9' * 5000}::/:\n"
    layer = archive(member("etc/passwd", users))
    with pytest.raises(OciError, match="user 'app', whom its /etc/passwd does not have"):
        await build(tmp_path, layer, config={"User": "app"})
    _, details = await build(tmp_path / "other", layer, config={"User": "other"})
    assert cast("dict[str, object]", details["settings"])["group"] == 0


async def test_the_most_that_an_image_may_say_of_itself_is_read_again(tmp_path: Path) -> None:
    config = {
        "Cmd": ["\x01" * 60_000, *[""] * 300],
        "Labels": {f"{number:04}": "\x01" * 60 for number in range(2000)},
        "Env": [f"V{number}={'x' * 1000}" for number in range(250)],
    }
    _, details = await build(tmp_path, LAYER, config=config)
    labels = cast("dict[str, dict[str, str]]", details["settings"])["labels"]
    assert list(labels) == [f"{number:04}" for number in range(len(labels))]
    assert 700 < len(labels) < 2000


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout


LAYER = archive(member("a", b"content" * 1000))


@pytest.mark.parametrize(
    "packed",
    [
        LAYER,
        gzip.compress(LAYER[:5000]) + gzip.compress(LAYER[5000:]),
        b"".join(gzip.compress(LAYER[start : start + 10]) for start in range(0, len(LAYER), 10)),
        gzip.compress(LAYER) + bytes(100),
        gzip.compress(LAYER) + bytes(3 * 2**20),
        zstd(LAYER),
    ],
    ids=["plain", "parts", "many parts", "padded", "padded a lot", "zstd"],
)
async def test_layers_may_be_stored_in_several_ways(tmp_path: Path, packed: bytes) -> None:
    raw, _ = await build(tmp_path, LAYER, packed=[packed])
    assert "Size: 7000" in debugfs(raw, "stat /a")


ZEROS = bytes(1 << 26)


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(ZEROS), zstd(ZEROS)],
)
async def test_layers_that_unpack_to_too_much_are_refused(
    tmp_path: Path, packed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recipe, "MOST_BYTES", 1 << 24)
    with pytest.raises(OciError, match="too large"):
        await build(tmp_path, ZEROS, packed=[packed])
    assert not list((tmp_path / "cache" / "staging").iterdir())
    assert not ImageStore(tmp_path / "cache").list()


async def test_as_many_parts_as_there_can_be_are_read_once(tmp_path: Path) -> None:
    """Each is of 20 bytes, and empty: if for each of them what follows was copied, this would take minutes."""
    empty = gzip.compress(b"", mtime=0)
    raw, _ = await build(tmp_path, LAYER, packed=[empty * 400_000 + gzip.compress(LAYER)])
    assert "Size: 7000" in debugfs(raw, "stat /a")


@pytest.mark.parametrize("layers", [0, 1])
async def test_an_image_may_have_nothing_in_it(tmp_path: Path, layers: int) -> None:
    raw, details = await build(tmp_path, *[archive()] * layers)
    check(raw)
    assert details["languages"] == []


async def test_a_full_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program says it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "zstd").write_text(
        "#!/bin/sh\necho 'zstd: error 70 : Write error : cannot write block : No space left on device' >&2; exit 70\n"
    )
    (programs / "zstd").chmod(0o755)
    packed = zstd(LAYER)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(ImageBuildError, match=r"the disk of .* is full; free some") as caught:
        await build(tmp_path, LAYER, packed=[packed])
    assert not isinstance(caught.value, OciError)
    assert not list((tmp_path / "cache" / "staging").iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"diff_ids": ["sha256:" + "0" * 64]}, "unpacked, should have the digest sha256:0000"),
        ({"diff_ids": []}, "0 by its configuration"),
        ({"architecture": "arm64"}, "it is for linux on arm64, and guests are linux on amd64"),
        ({"packed": [gzip.compress(LAYER)[:-20]]}, "ends too early"),
        ({"packed": [gzip.compress(LAYER)[:100] + b"x" * 50]}, "damaged"),
        ({"packed": [b"no archive at all" * 100], "diff_ids": None}, "should have the digest"),
        ({"config": {"User": "nobody-there"}}, "user 'nobody-there', whom its /etc/passwd does not have"),
        ({"config": {"User": "0:nobody-there"}}, "group 'nobody-there'"),
        ({"config": {"User": "99999999999"}}, "no number of a user"),
        ({"config": {"User": "9" * 5000}}, "whom its /etc/passwd does not have"),
        ({"config": {"User": "0:" + "9" * 5000}}, "which its /etc/group does not have"),
        ({"config": {"User": "\u00b2"}}, "whom its /etc/passwd does not have"),
        ({"config": {"WorkingDir": "/a/b"}}, "which is no directory"),
        ({"config": {"Env": "A"}}, "a list was expected"),
        ({"config": {"Cmd": ["a\0b"]}}, "a text was expected"),
        ({"config": ["a"]}, "an object was expected"),
        ({"config": {"Cmd": [""] * 100_000}}, "command is longer than any program takes"),
        ({"config": {"Entrypoint": ["\u00e9" * 40_000]}}, "command is longer than any program takes"),
        ({"config": {"Env": [f"VARIABLE_{number}=" for number in range(20_000)]}}, "variables are longer"),
    ],
)
async def test_images_that_are_not_what_they_say_are_refused(
    tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(OciError, match=words):
        await build(tmp_path, LAYER, **fields)


@pytest.mark.parametrize("name", ["manifest.json", "config", "layer"])
async def test_a_registry_that_lies_is_found_out(tmp_path: Path, name: str) -> None:
    fetched = tmp_path / "fetched"
    manifest = write_fetched(fetched, LAYER).partition(":")[2]
    said = json.loads((fetched / "manifest.json").read_bytes())
    blob = {"config": said["config"], "layer": said["layers"][0]}.get(name)
    path = fetched / (name if blob is None else blob["digest"].partition(":")[2])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"sha256", b"sha512") if blob is None else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OciError):
        await ImageStore(tmp_path / "cache").ensure_container(
            OciRecipe(manifest=manifest, reference="oci:/test", directory=fetched)
        )


def test_an_image_of_a_container_is_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = Image.oci("oci-archive:app.tar:v1")
    assert image == Image(f"oci-archive:{tmp_path}/app.tar:v1")
    assert repr(image.env({"A": "b"})) == f"Image.oci('oci-archive:{tmp_path}/app.tar:v1').env({{'A': 'b'}})"
    assert Image.oci("docker://debian:12-slim").name == "docker://debian:12-slim"
    for wrong in (
        "debian",
        "docker:debian",
        "docker://",
        "docker://a b",
        "docker-daemon:x",
        "oci:",
        "docker://user:p@host/x",
    ):
        with pytest.raises(ValueError, match=r"container image|registry|no path"):
            Image.oci(wrong)
    with pytest.raises(TypeError, match="must be str"):
        Image.oci(3)  # type: ignore[arg-type]
