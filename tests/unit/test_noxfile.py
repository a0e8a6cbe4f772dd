"""How the noxfile gets system packages: the one thing in it that changes somebody's machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import nox
import pytest
from nox.command import CommandFailed

from tests.documented import ROOT

PROGRAMS = """
from typing import NamedTuple
class Requirement(NamedTuple):
    name: str
    package: str
    purpose: str
def missing():
    import os
    return [] if os.path.exists({marker!r}) else [Requirement("qemu", "qemu-package", "runs"), Requirement("mke", "mke-package", "makes")]
"""


class SessionError(Exception):
    """What a session that gave up said."""


class FakeSession:
    """Records what a session is asked to do; *install* says what happens at an installation."""

    def __init__(self, installed: Path, *, works: bool = True, helps: bool = True) -> None:
        self.commands: list[tuple[str, ...]] = []
        self._installed = installed
        self._works = works
        self._helps = helps

    def log(self, message: str) -> None:
        pass

    def error(self, message: str) -> None:
        raise SessionError(message)

    def run(self, *arguments: str, external: bool, success_codes: tuple[int, ...] = (0,)) -> None:
        assert external
        self.commands.append(arguments)
        if not self._works:
            raise CommandFailed
        if "install" in arguments and self._helps:
            self._installed.touch()


@functools.cache
def load_noxfile() -> ModuleType:
    """Load it once: nox registers its sessions."""
    spec = importlib.util.spec_from_file_location("noxfile_under_test", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file whose existence means that everything is installed."""
    return tmp_path / "installed"


@pytest.fixture
def noxfile(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The noxfile, in a directory whose library says that two packages are missing; PATH is empty."""
    module = load_noxfile()
    (tmp_path / "trio_sandbox").mkdir()
    (tmp_path / "trio_sandbox" / "_programs.py").write_text(PROGRAMS.format(marker=str(marker)))
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return module


def add_program(tmp_path: Path, name: str) -> None:
    program = tmp_path / "bin" / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def install(noxfile: ModuleType, session: FakeSession) -> None:
    noxfile.install_system_packages(cast("nox.Session", session))


def be(monkeypatch: pytest.MonkeyPatch, user: int, *, terminal: bool = False) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)


def test_nothing_is_done_where_all_is_there(noxfile: ModuleType, marker: Path) -> None:
    marker.touch()
    session = FakeSession(marker)
    install(noxfile, session)
    assert session.commands == []


def test_root_installs_what_is_missing(
    noxfile: ModuleType, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_program(tmp_path, "apt-get")
    be(monkeypatch, 0)
    session = FakeSession(marker)
    install(noxfile, session)
    update, installation = session.commands
    assert update[:3] == ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get")
    assert update[-1] == "update"
    assert installation[-5:] == ("install", "-y", "--no-install-recommends", "mke-package", "qemu-package")


@pytest.mark.parametrize(("terminal", "prefix"), [(True, ("sudo", "env")), (False, ("sudo", "-n", "env"))])
def test_others_use_sudo_and_only_a_terminal_is_asked(
    noxfile: ModuleType,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    prefix: tuple[str, ...],
) -> None:
    add_program(tmp_path, "apt-get")
    add_program(tmp_path, "sudo")
    be(monkeypatch, 1000, terminal=terminal)
    session = FakeSession(marker)
    install(noxfile, session)
    assert all(command[: len(prefix)] == prefix for command in session.commands)


def test_without_sudo_the_command_is_in_the_message(
    noxfile: ModuleType, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_program(tmp_path, "apt-get")
    be(monkeypatch, 1000)
    with pytest.raises(
        SessionError, match=r"as root.*apt-get install --no-install-recommends mke-package qemu-package"
    ):
        install(noxfile, FakeSession(marker))


def test_without_apt_the_packages_are_in_the_message(noxfile: ModuleType, marker: Path) -> None:
    with pytest.raises(SessionError, match=r"qemu \(runs\), mke \(makes\).*no apt-get.*mke-package qemu-package"):
        install(noxfile, FakeSession(marker))


def test_a_failure_of_apt_says_what_to_do(
    noxfile: ModuleType, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_program(tmp_path, "apt-get")
    be(monkeypatch, 0)
    with pytest.raises(SessionError, match=r"could not install.*apt-get install"):
        install(noxfile, FakeSession(marker, works=False))


def test_packages_that_do_not_help_are_noticed(
    noxfile: ModuleType, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_program(tmp_path, "apt-get")
    be(monkeypatch, 0)
    with pytest.raises(SessionError, match="are installed, and yet qemu, mke can't be found"):
        install(noxfile, FakeSession(marker, helps=False))
