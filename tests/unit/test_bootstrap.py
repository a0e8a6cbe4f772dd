"""How the bootstrap gets nox, and system packages: the one thing here that changes somebody's machine."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import bootstrap


class Machine:
    """A Debian with nothing on PATH; records what is run on it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.fails = ""
        """The command that fails."""
        self._bin = tmp_path / "bin"
        self._bin.mkdir()
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PATH", str(self._bin))
        monkeypatch.setattr(subprocess, "run", self._run)
        self.be("debian")

    def _run(self, argv: list[object], **_: object) -> SimpleNamespace:
        self.commands.append(tuple(map(str, argv)))
        return SimpleNamespace(returncode=int(self.fails in self.commands[-1]))

    def be(self, system: str, user: int = 0, *, terminal: bool = False) -> None:
        self._monkeypatch.setattr(bootstrap, "system_names", lambda: {system})
        self._monkeypatch.setattr(os, "geteuid", lambda: user)
        self._monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)

    def add(self, *programs: str) -> None:
        for name in programs:
            (self._bin / name).write_text("#!/bin/sh\n")
            (self._bin / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_root_installs(machine: Machine) -> None:
    machine.add("apt-get")
    assert bootstrap.apt_install(["one", "two"]) == ""
    update, installation = machine.commands
    assert update[:3] == ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get")
    assert update[-1] == "update"
    assert installation[-5:] == ("install", "-y", "--no-install-recommends", "one", "two")


def test_sources_that_can_not_be_reached_are_no_failure(machine: Machine) -> None:
    machine.add("apt-get")
    machine.fails = "update"
    assert bootstrap.apt_install(["one"]) == ""


@pytest.mark.parametrize(("terminal", "prefix"), [(True, ("sudo", "env")), (False, ("sudo", "-n", "env"))])
def test_others_use_sudo_and_only_a_terminal_is_asked(
    machine: Machine, *, terminal: bool, prefix: tuple[str, ...]
) -> None:
    machine.add("apt-get", "sudo")
    machine.be("ubuntu", 1000, terminal=terminal)
    assert bootstrap.apt_install(["one"]) == ""
    assert all(command[: len(prefix)] == prefix for command in machine.commands)


def test_without_sudo_the_command_is_in_the_message(machine: Machine) -> None:
    machine.add("apt-get")
    machine.be("debian", 1000)
    assert "as root, then try again: apt-get install --no-install-recommends one two" in bootstrap.apt_install(
        ["one", "two"]
    )
    assert machine.commands == []


@pytest.mark.parametrize(("system", "programs"), [("debian", []), ("fedora", ["apt-get"]), ("", ["apt-get"])])
def test_where_apt_is_missing_or_not_the_system_s_the_packages_are_in_the_message(
    machine: Machine, system: str, programs: list[str]
) -> None:
    machine.add(*programs)
    machine.be(system)
    assert "where they are one two" in bootstrap.apt_install(["one", "two"])
    assert machine.commands == []


def test_a_failure_of_apt_says_what_to_do(machine: Machine) -> None:
    machine.add("apt-get")
    machine.fails = "install"
    assert "could not install" in bootstrap.apt_install(["one"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nNAME="Debian GNU/Linux"\nID=debian\n', {"debian"}),
        ('ID=ubuntu\nID_LIKE=debian\nUBUNTU_CODENAME="noble"\n', {"ubuntu", "debian"}),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", {"linuxmint", "ubuntu", "debian"}),
        ("ID=fedora\nVERSION_ID=42\n", {"fedora"}),
        ("NAME=Nothing\nMY_ID=debian\nrubbish\n", set[str]()),
    ],
)
def test_what_system_it_is(tmp_path: Path, text: str, names: set[str]) -> None:
    (tmp_path / "os-release").write_text(text)
    assert bootstrap.system_names(tmp_path / "os-release") == names
    assert bootstrap.system_names(tmp_path / "none") == set()


class Became(Exception):  # noqa: N818 - no error
    """What this process would have become."""


@pytest.fixture
def become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    (tmp_path / "trio_sandbox").mkdir()
    (tmp_path / "trio_sandbox" / "_programs.py").write_text("def unsupported_platform(): return ''\n")
    monkeypatch.setattr(bootstrap, "HERE", tmp_path)

    def execv(_: str, argv: list[str]) -> None:
        raise Became(*argv)

    def run(*arguments: str) -> list[str]:
        with pytest.raises(Became) as caught:
            bootstrap.main(arguments)
        return list(caught.value.args)

    monkeypatch.setattr(os, "execv", execv)
    return run


def test_nox_is_installed_once(
    machine: Machine, become: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def create(path: Path, **_: bool) -> None:
        made.append(path)

    monkeypatch.setattr(venv, "create", create)
    nox = str(tmp_path / ".nox/bootstrap/bin/nox")
    machine.fails = "--version"
    assert become("tests", "--", "-k", "x") == [nox, "-s", "tests", "--", "-k", "x"]
    assert made == [tmp_path / ".nox/bootstrap"]
    assert machine.commands[-1][1:] == ("-m", "pip", "install", "-q", bootstrap.NOX)
    machine.fails = ""
    assert become() == [nox, "--list"]
    assert len(made) == 1
    assert machine.commands[-1] == (nox, "--version")


def test_where_pip_can_not_be_installed_its_package_is(
    machine: Machine, become: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:

    def do_nothing(*_: object, **__: object) -> None:
        pass

    monkeypatch.setattr(venv, "create", do_nothing)
    monkeypatch.setattr("importlib.util.find_spec", do_nothing)
    machine.fails = "--version"
    with pytest.raises(SystemExit, match=r"venv and ensurepip are needed.*python3-venv"):
        bootstrap.main(["hello"])
    machine.add("apt-get")
    become("hello")
    assert any(command[-1] == "python3-venv" for command in machine.commands)


def test_another_platform_is_told_at_once(machine: Machine, become: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "trio_sandbox" / "_programs.py").write_text("def unsupported_platform(): return 'no Linux'\n")
    with pytest.raises(SystemExit, match="no Linux"):
        bootstrap.main(["hello"])
    assert machine.commands == []
