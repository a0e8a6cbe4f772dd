"""What other machines are given of this one's package indexes, and what they are made of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import machines

LISTING = """\
:env:.find-links='/opt/one'
:env:.disable-pip-version-check='1'
global.cert='/etc/ssl/certs/ca-certificates.crt'
global.extra-index-url='file:///opt/two/simple https://host.invalid/simple'
global.find-links='/opt/one /opt/three'
"""


def test_settings_of_pip_are_merged() -> None:
    assert machines.merge_settings(LISTING) == {
        "find-links": "/opt/one /opt/three",
        "disable-pip-version-check": "1",
        "cert": "/etc/ssl/certs/ca-certificates.crt",
        "extra-index-url": "file:///opt/two/simple https://host.invalid/simple",
    }
    assert machines.merge_settings("") == {}


def test_directories_that_pip_takes_packages_from_are_shown(tmp_path: Path) -> None:
    for name in ("links", "index/simple"):
        (tmp_path / name).mkdir(parents=True)
    settings = {
        "index-url": "https://host.invalid/simple",
        "extra-index-url": f"file://{tmp_path}/index/simple",
        "find-links": f"{tmp_path}/links {tmp_path}/none",
    }
    assert machines.local_indexes(settings) == [f"{tmp_path}/index", f"{tmp_path}/links"]


def test_only_what_package_clients_need_is_taken_from_the_environment() -> None:
    environment = {"https_proxy": "a", "NO_PROXY": "b", "SSL_CERT_FILE": "c", "PIP_INDEX_URL": "d", "SECRET": "e"}
    assert machines.variables(environment) == {"https_proxy": "a", "NO_PROXY": "b", "SSL_CERT_FILE": "c"}


def test_files_are_readable_for_everybody(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    machines.write(tmp_path / "etc" / "apt" / "conf", "text")
    assert (tmp_path / "etc" / "apt" / "conf").read_text() == "text"
    modes = [
        path.stat().st_mode & 0o777 for path in (tmp_path / "etc", tmp_path / "etc/apt", tmp_path / "etc/apt/conf")
    ]
    assert modes == [0o755, 0o755, 0o644]
    machines.copy(Path("relative"), tmp_path)
    machines.copy(Path("/no/such/file"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["etc"]


def test_a_tree_of_another_recipe_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def run(argv: list[object], **_: object) -> None:
        made.append(Path(str(argv[-1])))
        made[-1].mkdir()

    monkeypatch.setattr(machines, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(machines, "mirrors", list[str])
    (leftover := tmp_path / "cache" / "run-1" / "upper").mkdir(parents=True)
    with machines.lock_cache():
        assert not leftover.parent.exists()
        first = machines.make_tree("trixie")
    assert machines.make_tree("trixie") == first
    other = machines.make_tree("bookworm")
    monkeypatch.setattr(machines, "PACKAGES", ("python3",))
    second = machines.make_tree("trixie")
    assert len(made) == 3
    assert sorted((tmp_path / "cache").iterdir()) == sorted([second, other, tmp_path / "cache" / "lock"])


def test_who_may_not_mount_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in machines.missing_rights()
