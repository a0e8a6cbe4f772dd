"""The users of the image, by its own database."""

from __future__ import annotations

import os
import stat

#: Where programs are looked for unless a process has a PATH of its own.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Nobody's user database is longer; a longer one is cut rather than read into memory.
_DATABASE_LIMIT = 1 << 20
_HIGHEST_ID = 2**32 - 2


class User:
    """Who a process runs as."""

    __slots__ = ("directory", "gid", "groups", "home", "more", "name", "shell", "uid")

    def __init__(self, uid: int, gid: int, name: str, home: str, shell: str) -> None:
        self.uid: int = uid
        self.gid: int = gid
        self.name: str = name
        self.home: str = home
        self.directory: str = home  # where what it runs starts
        self.shell: str = shell
        self.groups: list[int] = [gid]
        self.more: dict[str, str] = {}  # variables that the image adds

    def environment(self) -> dict[str, str]:
        """Return what a login would give it."""
        return {
            "HOME": self.home,
            "LANG": "C.UTF-8",
            "LOGNAME": self.name,
            "PATH": PATH,
            "SHELL": self.shell,
            "USER": self.name,
            **self.more,
        }


def read_environment(path: str = "/etc/environment") -> dict[str, str]:
    """Return the variables that the image adds to everybody's environment: lines NAME=VALUE, as PAM reads them."""
    variables: dict[str, str] = {}
    for line in _read_text(path).split("\n"):  # values may have what else ends a line to str.splitlines()
        name, has_value, value = line.strip().partition("=")
        if has_value and name and not name.startswith("#") and "\0" not in line:
            variables[name] = value
    return variables


def find_user(wanted: str | int) -> User | None:
    """Return the user with a name or number; a number need not be in the database, a name that is not gives None."""
    # Not by `pwd`: libc would load code that the image provides into this process.
    for fields in _read_database("/etc/passwd", 7, (2, 3)):
        if str(wanted) in (fields[0], fields[2]):
            user = User(int(fields[2]), int(fields[3]), fields[0], fields[5], fields[6])
            user.groups += [
                int(gid) for _, _, gid, names in _read_database("/etc/group", 4, (2,)) if user.name in names.split(",")
            ]
            return user
    if isinstance(wanted, str):
        return None
    return User(wanted, wanted, str(wanted), "/", "/bin/sh")


def _read_database(path: str, width: int, numbers: tuple[int, ...]) -> list[list[str]]:
    """Return the lines of a database that have so many fields, those at *numbers* being numbers of a user or a group."""
    lines = (line.split(":") for line in _read_text(path).splitlines())
    return [fields for fields in lines if len(fields) == width and all(_is_id(fields[number]) for number in numbers)]


def _is_id(text: str) -> bool:
    # Of a number that is very long even the reading fails.
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _HIGHEST_ID


def _read_text(path: str) -> str:
    """Return the beginning of a file of the image's; "" if it is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return os.fsdecode(file.read(_DATABASE_LIMIT) or b"")
    finally:
        os.close(descriptor)
