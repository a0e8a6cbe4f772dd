"""What an image adds to everybody's environment in the guest: /etc/environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_sandbox.guest.spawner.users import User, read_environment


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("", {}),
        ("A=b\nPATH=/opt/bin:/bin\n", {"A": "b", "PATH": "/opt/bin:/bin"}),
        ("# A=b\n\n  B = c=d \nA\n=x\n", {"B ": " c=d"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=b\0c\n", {}),
        ("A=b\u2028c\x0bd\x1ce\r\nB=\u2029x\n", {"A": "b\u2028c\x0bd\x1ce", "B": "\u2029x"}),
    ],
)
def test_variables_are_lines(tmp_path: Path, text: str, variables: dict[str, str]) -> None:
    (tmp_path / "environment").write_bytes(text.encode())
    assert read_environment(str(tmp_path / "environment")) == variables


def test_what_is_no_file_says_nothing(tmp_path: Path) -> None:
    assert read_environment(str(tmp_path / "none")) == {}
    assert read_environment(str(tmp_path)) == {}
    os.mkfifo(tmp_path / "fifo")
    assert read_environment(str(tmp_path / "fifo")) == {}


def test_a_login_has_them(tmp_path: Path) -> None:
    user = User(1000, 1000, "user", "/home/user", "/bin/bash")
    before = user.environment()
    user.more = {"A": "b", "LANG": "de_DE.UTF-8"}
    assert user.environment() == {**before, "A": "b", "LANG": "de_DE.UTF-8"}
