"""Container images fetched by skopeo, from everything that it knows; and merged as umoci merges them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from tests._oci import Member, archive, directory, member, write_layout
from trio_sandbox import ImageMissingError, MissingProgramError, OciError, Progress, UnknownImageError
from trio_sandbox._oci_reference import parse_oci
from trio_sandbox.cli._image import description
from trio_sandbox.image import BuiltImage, ImageStore
from trio_sandbox.image._containers import ensure_container
from trio_sandbox.image.oci import _skopeo
from trio_sandbox.image.oci._merge import Merger
from trio_sandbox.image.oci._tar import Kind, read_entries
from trio_sandbox.image.oci._tree import Node
from trio_sandbox.machines import Dependents

needs_skopeo = pytest.mark.skipif(
    shutil.which("skopeo") is None, reason="skopeo is not installed: apt-get install skopeo"
)
needs_umoci = pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed: apt-get install umoci")

LAYER = archive(member("a", b"content" * 1000))


async def fetch(store: Path, reference: str, *, build: bool = True, said: list[Progress] | None = None) -> BuiltImage:
    progress = [] if said is None else said
    return await ensure_container(
        ImageStore(store), parse_oci(reference), build=build, progress=progress.append, environment={}
    )


def skopeo(*arguments: str) -> None:
    subprocess.run(["skopeo", *arguments], check=True, capture_output=True)


# --- What skopeo fetches ---


@needs_skopeo
async def test_an_image_is_the_same_wherever_it_comes_from(tmp_path: Path) -> None:
    layout, store = tmp_path / "layout", tmp_path / "store"
    write_layout(layout, LAYER, config={"Cmd": ["/a"]})
    found = {(await fetch(store, f"oci:{layout}:latest")).name}
    skopeo("copy", f"oci:{layout}", f"oci-archive:{tmp_path}/app.tar:v1")
    found.add((await fetch(store, f"oci-archive:{tmp_path}/app.tar")).name)
    found.add((await fetch(store, f"oci-archive:{tmp_path}/app.tar:v1")).name)
    (name,) = found
    assert name.startswith("oci+")
    # Docker's archives have a manifest of their own, and the same layers.
    skopeo("copy", f"oci:{layout}", f"docker-archive:{tmp_path}/docker.tar:app:v2")
    docker = await fetch(store, f"docker-archive:{tmp_path}/docker.tar")
    assert docker.command == ("/a",)
    assert not list((store / "staging").iterdir())


def write_for_two_platforms(path: Path) -> None:
    """Write a layout of one image for two platforms, ours being the second."""
    entries: list[dict[str, object]] = []
    for architecture in ("arm64", "amd64"):
        write_layout(path / architecture, archive(member(architecture)), architecture=architecture)
        index = json.loads((path / architecture / "index.json").read_bytes())
        entries.append({**index["manifests"][0], "platform": {"os": "linux", "architecture": architecture}})
        shutil.copytree(path / architecture / "blobs", path / "blobs", dirs_exist_ok=True)
    text = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
    ).encode()
    digest = hashlib.sha256(text).hexdigest()
    (path / "blobs" / "sha256" / digest).write_bytes(text)
    described = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": f"sha256:{digest}",
        "size": len(text),
    }
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    shutil.copy(path / "amd64" / "oci-layout", path)


@needs_skopeo
async def test_of_several_platforms_ours_is_taken(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    write_for_two_platforms(layout)
    both = await fetch(tmp_path / "store", f"oci:{layout}")
    alone = await fetch(tmp_path / "store", f"oci:{layout}/amd64")
    assert both.name == alone.name
    with pytest.raises(OciError, match="it is for linux on arm64"):
        await fetch(tmp_path / "store", f"oci:{layout}/arm64")


@needs_skopeo
async def test_what_was_fetched_is_found_without_looking_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "layout", LAYER)
    reference = f"oci:{tmp_path}/layout"
    with pytest.raises(ImageMissingError, match="was not fetched yet"):
        await fetch(tmp_path / "store", reference, build=False)
    said: list[Progress] = []
    first = await fetch(tmp_path / "store", reference, said=said)
    assert {progress.stage for progress in said} == {f"image {reference}"}
    assert (said[0].message, said[-1].message) == ("fetching", "built")
    monkeypatch.setenv("PATH", "/nowhere")
    assert await fetch(tmp_path / "store", reference) == first
    monkeypatch.undo()
    # Other files, another image; the old one stays until somebody removes it.
    shutil.rmtree(tmp_path / "layout")
    write_layout(tmp_path / "layout", archive(member("b")))
    second = await fetch(tmp_path / "store", reference)
    assert second.name != first.name
    store = ImageStore(tmp_path / "store")
    assert {each.name for each in store.list()} == {first.name, second.name}
    await store.remove(second.name)
    await store.prune()
    assert [note.name for note in store.containers.iterdir()] == []
    assert (await fetch(tmp_path / "store", reference)).name == second.name


@needs_skopeo
async def test_two_at_once_fetch_it_once(tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", LAYER)
    said: list[Progress] = []
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(lambda: fetch(tmp_path / "store", f"oci:{tmp_path}/layout", said=said))
    messages = [progress.message for progress in said]
    assert messages.count("fetching") == 1
    assert "another process is fetching it" in messages


@needs_skopeo
async def test_cancelled_it_leaves_nothing(tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", LAYER)
    for message in ("fetching", "checking layer 1 of 1", "merging the layers", "converting to qcow2"):
        with trio.CancelScope() as scope:

            def cancel(progress: Progress, scope: trio.CancelScope = scope, message: str = message) -> None:
                if progress.message == message:
                    scope.cancel()

            await ensure_container(
                ImageStore(tmp_path / "store"),
                parse_oci(f"oci:{tmp_path}/layout"),
                build=True,
                progress=cancel,
                environment={},
            )
        assert scope.cancelled_caught
        assert not list((tmp_path / "store" / "staging").iterdir())
        assert not ImageStore(tmp_path / "store").list()
    assert (await fetch(tmp_path / "store", f"oci:{tmp_path}/layout")).languages == ()


@needs_skopeo
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "can't be read: .*: No such file"),
        ("empty", "No such file|can't be fetched"),
        ("arm", "it is for linux on arm64"),
    ],
)
async def test_what_is_no_image_of_ours_is_refused(tmp_path: Path, what: str, words: str) -> None:
    layout = tmp_path / "layout"
    if what == "empty":
        layout.mkdir()
    elif what == "arm":
        write_layout(layout, LAYER, architecture="arm64")
    with pytest.raises(OciError, match=words):
        await fetch(tmp_path / "store", f"oci:{layout}")
    assert not ImageStore(tmp_path / "store").list()


async def test_without_skopeo_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path / "layout", LAYER)
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "prlimit").symlink_to(shutil.which("prlimit") or "")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(MissingProgramError, match="apt-get install skopeo"):
        await fetch(tmp_path / "store", f"oci:{tmp_path}/layout")


@needs_skopeo
async def test_an_image_that_is_too_large_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path / "layout", archive(member("a", os.urandom(3 * 2**20))))
    monkeypatch.setattr(_skopeo, "MOST_BYTES", 2**20)
    with pytest.raises(OciError, match="is too large: a file of it, or all"):
        await fetch(tmp_path / "store", f"oci:{tmp_path}/layout")
    assert not list((tmp_path / "store" / "staging").iterdir())
    assert not ImageStore(tmp_path / "store").list()


@needs_skopeo
async def test_a_program_that_finds_the_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path / "layout", LAYER)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "skopeo").write_text(
        '#!/bin/sh\necho \'time="x" level=fatal msg="writing blob: write /x: disk quota exceeded"\' >&2; exit 1\n'
    )
    (programs / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(OciError, match="can't be fetched: the disk is full"):
        await fetch(tmp_path / "store", f"oci:{tmp_path}/layout")


# --- Registries ---


class Registry(ThreadingHTTPServer):
    """A registry of one image, `app:latest`, out of a layout; with faults."""

    def __init__(self, layout: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.blobs = layout / "blobs" / "sha256"
        (described,) = json.loads((layout / "index.json").read_bytes())["manifests"]
        self.manifest = described["digest"].partition(":")[2]
        self.fault = ""
        self.requests: list[str] = []

    @property
    def reference(self) -> str:
        return f"docker://127.0.0.1:{self.server_port}/app:latest"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        registry = self.server
        assert isinstance(registry, Registry)
        registry.requests.append(self.path)
        _, _, wanted = self.path.rpartition("/")
        if registry.fault == "unauthorized" or (registry.fault == "busy" and wanted):
            self.send_response(401 if registry.fault == "unauthorized" else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = registry.blobs / (registry.manifest if wanted == "latest" else wanted.removeprefix("sha256:"))
        if not path.is_file():
            self.send_response(200 if self.path == "/v2/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        is_layer = data.startswith(b"\x1f\x8b")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if "/manifests/" in self.path:
            self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
        self.end_headers()
        if registry.fault == "corrupted" and is_layer:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if registry.fault == "lies" and wanted != "latest" and not is_layer:
            data = data.replace(b"amd64", b"amd65")
        if self.command == "GET":
            self.wfile.write(data[:-10] if registry.fault == "truncated" and is_layer else data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Say nothing."""


@contextmanager
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Registry]:
    write_layout(tmp_path / "layout", LAYER)
    registry = Registry(tmp_path / "layout")
    thread = threading.Thread(target=registry.serve_forever)
    thread.start()
    try:
        configuration = tmp_path / ".config" / "containers" / "registries.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(f'[[registry]]\nlocation = "127.0.0.1:{registry.server_port}"\ninsecure = true\n')
        monkeypatch.setenv("HOME", str(tmp_path))
        yield registry
    finally:
        registry.shutdown()
        thread.join()
        registry.server_close()


@needs_skopeo
async def test_a_tag_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, monkeypatch) as registry:
        first = await fetch(tmp_path / "store", registry.reference)
        asked = len(registry.requests)
        assert asked
        assert await fetch(tmp_path / "store", registry.reference) == first
        assert len(registry.requests) == asked
        exact = registry.reference.replace(":latest", f"@sha256:{registry.manifest}")
        assert (await fetch(tmp_path / "store", exact)).name == first.name
        # Each name is the image's, whichever it was fetched by.
        store = ImageStore(tmp_path / "store")
        assert json.loads(description(store, Dependents(tmp_path / "store"), exact))[0]["name"] == first.name
        assert await store.remove(exact) > 0
        asked = len(registry.requests)
        assert (await fetch(tmp_path / "store", registry.reference)).name == first.name
        assert len(registry.requests) > asked
        assert await store.remove(registry.reference) > 0
        with pytest.raises(UnknownImageError):
            await store.remove(exact)


@needs_skopeo
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("corrupted", "can't be fetched(.|\n)*skopeo says"),
        ("truncated", "can't be fetched(.|\n)*skopeo says"),
        ("lies", "can't be fetched(.|\n)*skopeo says"),
        ("unauthorized", "skopeo login"),
        ("busy", "can't be fetched"),
    ],
)
async def test_a_registry_with_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str) -> None:
    with serve(tmp_path, monkeypatch) as registry:
        registry.fault = fault
        with pytest.raises(OciError, match=words):
            await fetch(tmp_path / "store", registry.reference)
        assert not list((tmp_path / "store" / "staging").iterdir())
        registry.fault = ""
        assert (await fetch(tmp_path / "store", registry.reference)).name.startswith("oci+")


# --- umoci ---


def describe_tree(root: Node) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    first: dict[Node, str] = {}
    rest = [(b"", root)]
    while rest:
        path, node = rest.pop()
        for name, child in sorted(node.children.items()):
            where = (path + b"/" + name).decode("utf-8", "surrogateescape")
            if child.is_directory:
                rest.append((path + b"/" + name, child))
            mode = 0 if child.kind is Kind.SYMLINK else child.mode
            found[where] = (child.kind.name, mode, os.fsdecode(child.target), child.size, child.mtime // 10**9)
            first.setdefault(child, where)
    return found


def describe_directory(root: Path) -> dict[str, tuple[object, ...]]:
    kinds = {stat.S_IFREG: "FILE", stat.S_IFDIR: "DIRECTORY", stat.S_IFLNK: "SYMLINK", stat.S_IFIFO: "FIFO"}
    found: dict[str, tuple[object, ...]] = {}
    for path, names, files in os.walk(root):
        for name in (*names, *files):
            where = os.path.join(path, name)
            status = os.lstat(where)
            kind = kinds[stat.S_IFMT(status.st_mode)]
            target = os.readlink(where) if kind == "SYMLINK" else ""
            size = status.st_size if kind == "FILE" else 0
            mode = 0 if kind == "SYMLINK" else stat.S_IMODE(status.st_mode)
            found[where[len(str(root)) :]] = (kind, mode, target, size, int(status.st_mtime))
    return found


@needs_umoci
def test_layers_come_to_what_umoci_makes_of_them(tmp_path: Path) -> None:
    layers: list[Iterable[Member]] = [
        [
            directory("usr", mtime=5),
            directory("usr/lib", mtime=6),
            member("lib", "usr/lib", kind="symlink", mtime=7),
            member("usr/lib/one", "1" * 10, mtime=8, mode=0o640),
            member("usr/lib/two", "2", mtime=9),
            member("etc/deep/file", "3", mtime=10),
            member("etc/linked", "etc/deep/file", kind="link"),
            member("pipe", kind="fifo", mode=0o600, mtime=11),
            directory("opaque", mtime=12),
            member("opaque/old", mtime=13),
            directory("gone", mtime=14),
            member("gone/file", mtime=15),
            member("changes", "file", mtime=16),
        ],
        [
            directory("opaque", mtime=17),
            member("opaque/.wh..wh..opq"),
            member("opaque/new", "new", mtime=18),
            member(".wh.gone"),
            directory("usr/lib", mtime=19, mode=0o700),
            member("usr/lib/.wh.two"),
            member("lib/three", "through a link", mtime=20),
            member("etc/other", "etc/linked", kind="link"),
            member("changes", "/etc", kind="symlink", mtime=21),
        ],
        [
            directory("gone", mtime=22),
            member("gone/again", "x" * 5000, mtime=23),
            member(f"{'n' * 200}/{'m' * 200}", "long", mtime=24),
            member("odd\nname \u00e9", "odd", mtime=25),
        ],
    ]
    archives = [archive(*layer) for layer in layers]
    write_layout(tmp_path / "layout", *archives)
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    arguments = ["umoci", "unpack", *rootless, "--image", f"{tmp_path}/layout:latest", f"{tmp_path}/bundle"]
    subprocess.run(arguments, check=True, capture_output=True)
    merger = Merger()
    for data in archives:
        merger.add_layer(read_entries(data))
    ours, theirs = describe_tree(merger.tree.root), describe_directory(tmp_path / "bundle" / "rootfs")
    # Directories that no layer describes have the time at which umoci made them.
    implied = {path for path, description in ours.items() if description[0] == "DIRECTORY" and description[4] == 0}
    for path in implied:
        assert ours.pop(path)[:3] == theirs.pop(path)[:3]
    assert ours == theirs
    status = os.stat(tmp_path / "bundle" / "rootfs" / "etc" / "other")
    assert status.st_nlink == 3
    assert merger.tree.get(b"etc/other") is merger.tree.get(b"etc/deep/file")
