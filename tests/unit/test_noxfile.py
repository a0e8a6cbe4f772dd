"""How the noxfile gets system packages; how apt does it is `bootstrap`'s."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import cast

import nox
import pytest

from tests.documented import ROOT

PROGRAMS = """
from typing import NamedTuple
class Requirement(NamedTuple):
    name: str
    package: str
    purpose: str
    ordinary_user_only: bool = False
REQUIREMENTS = [Requirement("qemu", "qemu-package", "runs"), Requirement("newuidmap", "uid-package", "builds", True)]
def missing(requirements, *, root):
    import os
    return [] if os.path.exists({marker!r}) else [r for r in requirements if not (root and r.ordinary_user_only)]
def unsupported_platform():
    return {platform!r}
"""

BOOTSTRAP = """
from pathlib import Path
def apt_install(packages):
    if {helps!r}:
        Path({marker!r}).touch()
    Path({log!r}).write_text(" ".join(packages))
    return {problem!r}
"""


class SessionError(Exception):
    """What a session that gave up said."""


class FakeSession:
    """A session that does nothing but give up."""

    def log(self, message: str) -> None:
        pass

    def error(self, message: str) -> None:
        raise SessionError(message)


@functools.cache
def load_noxfile() -> ModuleType:
    """Load it once: nox registers its sessions."""
    spec = importlib.util.spec_from_file_location("noxfile_under_test", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Site:
    """The noxfile, in a directory whose library says that packages are missing."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed = directory / "installed"
        self._directory = directory
        self._noxfile = load_noxfile()
        (directory / "trio_sandbox").mkdir()
        monkeypatch.setattr(self._noxfile, "HERE", directory)

    def install(
        self, *more: tuple[str, str, str], platform: str = "", problem: str = "", helps: bool = True
    ) -> list[str]:
        """Install; return the packages that apt was asked for."""
        marker, log = str(self.installed), self._directory / "log"
        programs = PROGRAMS.format(marker=marker, platform=platform)
        (self._directory / "trio_sandbox" / "_programs.py").write_text(programs)
        bootstrap = BOOTSTRAP.format(marker=marker, helps=helps, log=str(log), problem=problem)
        (self._directory / "bootstrap.py").write_text(bootstrap)
        self._noxfile.install_system_packages(cast("nox.Session", FakeSession()), *more)
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_nothing_is_done_where_all_is_there(site: Site) -> None:
    site.installed.touch()
    assert site.install() == []


def test_what_is_missing_is_installed_for_ordinary_users_too(site: Site) -> None:
    """Root does without some; but the next to come may be an ordinary user, who can't install anything."""
    assert site.install() == ["qemu-package", "uid-package"]


def test_what_a_session_needs_besides_is_installed(site: Site) -> None:
    assert site.install(("box", "box-package", "is in")) == ["box-package", "qemu-package", "uid-package"]


def test_what_apt_could_not_do_is_said(site: Site) -> None:
    with pytest.raises(SessionError, match=r"qemu \(runs\), newuidmap \(builds\)\. Do it yourself"):
        site.install(problem="Do it yourself")


def test_packages_that_do_not_help_are_noticed(site: Site) -> None:
    with pytest.raises(SessionError, match="are installed, and yet qemu, newuidmap can't be found"):
        site.install(helps=False)


def test_another_platform_is_told_at_once(site: Site) -> None:
    with pytest.raises(SessionError, match="this is Darwin on arm64"):
        site.install(platform="this is Darwin on arm64")


def test_the_library_s_own_files_are_what_they_are_taken_for() -> None:
    import bootstrap
    from trio_sandbox import _programs

    needed = [_programs.Requirement(*requirement) for requirement in load_noxfile().TESTS_NEED]
    assert {requirement.package for requirement in needed} == {
        "build-essential",
        "busybox-static",
        "git",
        "golang-go",
        "musl-tools",
        "nodejs",
        "npm",
        "skopeo",
        "umoci",
        "zstd",
    }
    assert "uidmap" in {requirement.package for requirement in _programs.REQUIREMENTS}
    assert callable(bootstrap.apt_install)
    assert isinstance(_programs.unsupported_platform(), str)


def test_a_mirrors_addresses_do_not_get_into_a_lock() -> None:
    public_addresses = load_noxfile().public_addresses
    mirrored = 'wheels = [{ url = "https://mirror.example/pypi/packages/ab/cd/x-1.whl", size = 1 }]'
    public = 'wheels = [{ url = "https://files.pythonhosted.org/packages/ab/cd/x-1.whl", size = 1 }]'
    assert public_addresses(mirrored) == public_addresses(public) == public
