"""A repository of Debian packages of a test's own."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path


def make_deb(directory: Path) -> None:
    """Write a repository with one package, ``greeting``, for a line ``deb [trusted=yes] http://HOST/ ./``."""
    root = directory.parent / "deb"
    for path, text, mode in (
        (
            "DEBIAN/control",
            "Package: greeting\nVersion: 1.0\nArchitecture: all\nMaintainer: somebody <a@b.test>\n",
            0o644,
        ),
        ("usr/bin/greeting", "#!/bin/sh\necho installed by apt\n", 0o755),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}Description: says so\n" if path == "DEBIAN/control" else text)
        (root / path).chmod(mode)
    for below in filter(Path.is_dir, (root, *root.rglob("*"))):
        below.chmod(0o755)
    package = directory / "greeting.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, package], check=True, stdout=subprocess.DEVNULL)
    data = package.read_bytes()
    control = (root / "DEBIAN/control").read_text()
    (directory / "Packages").write_text(
        f"{control}Filename: ./greeting.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    )
