"""A registry of npm packages of a test's own, on loopback, with archives that it makes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import attrs
import pytest


def make_archive(files: Mapping[str, str], *more: tarfile.TarInfo) -> bytes:
    """Make an archive of *files*, and of further members that have no content."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data := text.encode())
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return gzip.compress(packed.getvalue(), mtime=0)


def sha512(data: bytes) -> str:
    """Return a digest as npm writes it."""
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


@attrs.define
class Registry:
    """Packages, and who asked for what."""

    url: str
    packages: dict[str, dict[str, tuple[bytes, dict[str, object]]]] = attrs.field(
        factory=dict[str, dict[str, tuple[bytes, dict[str, object]]]]
    )
    """Archives, and what is said about them, by names and versions."""
    asked: list[str] = attrs.field(factory=list[str])
    """The paths that were asked for."""
    lies: dict[str, bytes] = attrs.field(factory=dict[str, bytes])
    """What is served in place of an archive, by ``name@version``."""

    def add(
        self,
        name: str,
        version: str,
        files: Mapping[str, str],
        *more: tarfile.TarInfo,
        dependencies: Mapping[str, str] | None = None,
        **fields: object,
    ) -> None:
        """Publish a package."""
        manifest = {"name": name, "version": version, "dependencies": dict(dependencies or {}), **fields}
        archive = make_archive({"package.json": json.dumps(manifest), **files}, *more)
        self.packages.setdefault(name, {})[version] = (archive, manifest)

    def answer(self, path: str) -> bytes | None:
        """Return what is at *path*."""
        self.asked.append(path)
        name, mark, version = path.rpartition("/-/")
        if mark:
            return self.lies.get(f"{name}@{version}") or self.packages[name][version][0]
        if path not in self.packages:
            return None
        versions = {
            version: {
                **manifest,
                "dist": {"tarball": f"{self.url}{path}/-/{version}", "integrity": f"sha512-{sha512(archive)}"},
            }
            for version, (archive, manifest) in self.packages[path].items()
        }
        return json.dumps({"name": path, "dist-tags": {"latest": list(versions)[-1]}, "versions": versions}).encode()


@contextmanager
def serve_registry(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Registry]:
    """Serve packages for the block, to npm as well, whose cache in *directory* is empty."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = registry.answer(unquote(self.path).removeprefix("/"))
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        registry = Registry(f"http://127.0.0.1:{server.server_address[1]}/")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("npm_config_registry", registry.url)
        monkeypatch.setenv("npm_config_cache", str(directory / "npm-cache"))
        monkeypatch.setenv("npm_config_userconfig", str(directory / "npmrc"))
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
