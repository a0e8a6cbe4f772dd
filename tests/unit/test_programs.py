"""The list of what we need of the operating system."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trio_sandbox import HostConfig, SandboxError, _programs, open_host
from trio_sandbox._programs import REQUIREMENTS, Requirement, find_program, missing


def test_a_program_is_found_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a-program"
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("a-program") is None  # not executable
    program.chmod(0o755)
    assert find_program("a-program") == str(program)


def test_administrators_programs_are_found_without_their_directories_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbin" / "mke9fs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(_programs, "SYSTEM_DIRECTORIES", (str(program.parent),))
    assert find_program("mke9fs") == str(program)


def test_missing_names_what_is_not_there(tmp_path: Path) -> None:
    there = tmp_path / "file"
    there.touch()
    present = Requirement(str(there), "some-package", "is there")
    absent = Requirement("no-such-program-anywhere", "other-package", "is not there")
    assert missing([present, absent]) == [absent]


def test_root_does_without_what_only_ordinary_users_need() -> None:
    absent = Requirement("no-such-program-anywhere", "package", "maps ids", ordinary_user_only=True)
    assert missing([absent], root=True) == []
    assert missing([absent], root=False) == [absent]


def test_the_list_can_be_read_before_anything_is_installed() -> None:
    path = _programs.__file__
    names = [requirement.name for requirement in runpy.run_path(path)["REQUIREMENTS"]]
    assert names == [requirement.name for requirement in REQUIREMENTS]
    # -S: no site-packages, so that an import of a dependency would fail.
    script = f"import runpy; runpy.run_path({path!r})['missing']()"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True)


@pytest.mark.parametrize(
    ("system", "machine", "supported"),
    [("Linux", "x86_64", True), ("Linux", "aarch64", False), ("Darwin", "arm64", False), ("Darwin", "x86_64", False)],
)
async def test_another_platform_is_told_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, *, supported: bool
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    said = _programs.unsupported_platform()
    assert (said == "") == supported
    if supported:
        return
    assert f"this is {system} on {machine}" in said
    with pytest.raises(SandboxError, match=f"runs on Linux on x86_64, and this is {system} on {machine}"):
        async with open_host(HostConfig(cache_dir=tmp_path)):
            pytest.fail("opened")
    assert list(tmp_path.iterdir()) == []
