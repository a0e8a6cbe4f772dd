"""A package index of a test's own, on loopback, with wheels that it makes."""

from __future__ import annotations

import hashlib
import re
import threading
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def make_wheel(
    directory: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    tag: str = "py3-none-any",
    files: Mapping[str, str] | None = None,
) -> Path:
    """Make a wheel with a module of its name, which has ``VERSION`` and ``main()``, and a script that calls that."""
    information = f"{name}-{version}.dist-info"
    metadata = "".join(f"Requires-Dist: {each}\n" for each in requires)
    content = {
        f"{name}.py": f"VERSION = {version!r}\n\n\ndef main():\n    print({name!r}, VERSION)\n",
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{information}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
        **(files or {}),
    }
    wheel = directory / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
        record = "".join(f"{path},,\n" for path in (*content, f"{information}/RECORD"))
        archive.writestr(f"{information}/RECORD", record)
    return wheel


class Index:
    """The index of a directory of distributions."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url
        self.port = int(url.rpartition(":")[2].partition("/")[0])
        self.asked: list[str] = []
        """The paths that were asked for."""
        self.lies: dict[str, bytes] = {}
        """What is served in place of a file."""

    def page(self, project: str) -> str:
        """What there is of *project*, as PEP 503 has it."""
        links: list[str] = []
        for path in sorted(self.directory.iterdir()):
            if path.name.partition("-")[0].replace("_", "-") == project:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                links.append(f'<a href="/files/{path.name}#sha256={digest}">{path.name}</a>')
        return "".join(links)


@contextmanager
def serve_index(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Index]:
    """Serve the distributions in *directory* for the block, to uv as well, whose cache is empty."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            index.asked.append(self.path)
            if match := re.fullmatch(r"/simple/([\w-]+)/", self.path):
                body = index.page(match[1]).encode()
                kind = "text/html"
            else:
                path = directory / self.path.rpartition("/")[2]
                body = index.lies.get(path.name) or (path.read_bytes() if path.is_file() else b"")
                kind = "application/octet-stream"
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index = Index(directory, f"http://127.0.0.1:{server.server_address[1]}/simple")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        monkeypatch.setenv("UV_CACHE_DIR", str(directory.parent / "uv-cache"))
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
            monkeypatch.delenv(name, raising=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield index
        finally:
            server.shutdown()
            thread.join()
