"""What an image adds to everybody's environment in the guest: /etc/environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_sandbox.guest.spawner import users
from trio_sandbox.guest.spawner.users import User, find_user, read_environment


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


def test_a_damaged_database_of_users_names_nobody_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/etc/passwd": "app:x:1500:staff::/app:/bin/sh\n"
        f"long:x:{'9' * 5000}:1::/:\nhigh:x:4294967295:1::/:\nminus:x:-1:1::/:\nsup:x:\u00b2:1::/:\n"
        "good:x:1501:1502::/good:/bin/sh\nshort:x:1\n",
        "/etc/group": f"one:x:{'9' * 5000}:good\ntwo:x:1503:good\nthree:x:x:good\n",
    }
    monkeypatch.setattr(users, "_read_text", files.__getitem__)
    for name in ("app", "long", "high", "minus", "sup", "short", "none"):
        assert find_user(name) is None
    user = find_user(1500)
    assert user is not None
    assert (user.uid, user.gid, user.home) == (1500, 1500, "/")
    good = find_user("good")
    assert good is not None
    assert (good.uid, good.gid, good.groups) == (1501, 1502, [1502, 1503])
