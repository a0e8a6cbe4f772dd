"""What a guest needs of the files of a container image: where it can start programs, as whom, and in which languages."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Final

from ..._errors import OciError
from .._stored import HIGHEST_ID, LONGEST_DIRECTORY, OLDEST_PYTHON, ImageSettings
from ._manifest import Configuration
from ._merge import LONGEST_NAME
from ._tar import Kind
from ._tree import Node, Tree, show

#: As programs are looked for where the image does not say.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS: Final = {"python": "python3", "javascript": "node", "shell": "bash"}
#: Those that runs can be in, if an image has their interpreters.
CONTAINER_LANGUAGES: Final = tuple(_PROGRAMS)
#: What a program that an image is for is called, where it is an interpreter of ours.
_MAIN: Final = {"python": "python", "python3": "python", "node": "javascript"}
#: Of a user or a group; some are too large, and none is so long that reading it takes a while.
_NUMBER: Final = re.compile(r"[0-9]{1,20}")
_PYTHON_NAME: Final = re.compile(rb"python(\d+)\.(\d+)")
#: Bytes of a database of users, or of /etc/environment.
_LONGEST: Final = 1 << 20
#: Directories that a guest mounts on, or writes to, before any program of the image runs.
_DIRECTORIES: Final = ((b"dev", 0o755), (b"etc", 0o755), (b"proc", 0o555), (b"run", 0o755), (b"sys", 0o555))


class Contents:
    """The files of an image, to be looked at and completed.

    Args:
      tree: What its layers come to.
      sources: The archives that they are in; what is added comes behind them.
      configuration: What the image says of itself.

    """

    def __init__(self, tree: Tree, sources: list[bytes | memoryview], configuration: Configuration) -> None:
        self._tree = tree
        self._sources = sources
        self._configuration = configuration

    def complete(self) -> ImageSettings:
        """Add what a guest needs; return how programs are started in it.

        Raises:
          OciError: if the image has not what it says that it is started with.

        """
        for name, mode in _DIRECTORIES:
            node = self._tree.root.children.get(name)
            if node is None or not node.is_directory:
                self._tree.root.children[name] = Node(Kind.DIRECTORY, mode, depth=1)
        self._tree.root.children.setdefault(b"tmp", Node(Kind.DIRECTORY, 0o1777, depth=1))
        self._add_variables(self._configuration.variables)
        user, group = self._find_user(self._configuration.user)
        directory = posixpath.normpath(posixpath.join("/", self._configuration.directory))
        self._make_directory(directory)
        return ImageSettings(
            user=user,
            group=group,
            directory=directory,
            command=self._configuration.command,
            labels=self._configuration.labels,
        )

    def find_languages(self) -> tuple[str, ...]:
        """Return the languages that there are interpreters of, the main one first."""
        found = [language for language, program in _PROGRAMS.items() if self._has(program)]
        words = [posixpath.basename(word) for word in self._configuration.command]
        main = next((_MAIN[word] for word in words if word in _MAIN), "")
        return tuple(sorted(found, key=lambda language: language != main))

    def _has(self, program: str) -> bool:
        path = self._configuration.variables.get("PATH", _PATH)
        for directory in path.split(":"):
            found = self._tree.find(posixpath.join("/", directory, program).encode())
            if found is None or found.node is None or found.node.kind is not Kind.FILE or not found.node.mode & 0o111:
                continue
            version = _PYTHON_NAME.fullmatch(found.name)
            return version is None or (int(version[1]), int(version[2])) >= OLDEST_PYTHON
        return False

    def _add_variables(self, variables: Mapping[str, str]) -> None:
        """Have programs get the image's variables, as they do those of `Image.env`."""
        if not variables:
            return
        path = b"/etc/environment"
        text = self._read(path)
        if text and not text.endswith(b"\n"):
            text += b"\n"
        text += b"".join(f"{name}={value}\n".encode() for name, value in variables.items())
        etc = self._tree.root.children[b"etc"]
        etc.children[b"environment"] = Node(
            Kind.FILE, 0o644, size=len(text), source=len(self._sources), extents=((0, len(text)),)
        )
        self._sources.append(text)

    def _find_user(self, wanted: str) -> tuple[int, int]:
        """Return the numbers of a user and a group that an image names, by its own databases."""
        name, _, group = wanted.partition(":")
        users = self._database(b"/etc/passwd", 7)
        uid, gid = 0, 0
        if name:
            entry = next((each for each in users if name in (each[0], each[2])), None)
            if entry is not None:
                uid, gid = int(entry[2]), int(entry[3]) if _NUMBER.fullmatch(entry[3]) else 0
            elif _NUMBER.fullmatch(name):
                uid = int(name)
            else:
                raise OciError(
                    f"the container image is to run as the user {name!r:.80}, whom its /etc/passwd does not have"
                )
        if group:
            groups = self._database(b"/etc/group", 4)
            entry = next((each for each in groups if group in (each[0], each[2])), None)
            if entry is not None:
                gid = int(entry[2])
            elif _NUMBER.fullmatch(group):
                gid = int(group)
            else:
                raise OciError(
                    f"the container image is to run as the group {group!r:.80}, which its /etc/group does not have"
                )
        if max(uid, gid) > HIGHEST_ID:
            raise OciError(f"the container image is to run as {wanted!r:.80}, which is no number of a user")
        return uid, gid

    def _database(self, path: bytes, width: int) -> list[list[str]]:
        lines = (line.split(":") for line in self._read(path).decode("utf-8", "replace").splitlines())
        return [fields for fields in lines if len(fields) == width and _NUMBER.fullmatch(fields[2])]

    def _read(self, path: bytes) -> bytes:
        """Return the beginning of a file; b"" if there is none, or it has holes."""
        node = self._tree.get(path)
        if node is None or node.kind is not Kind.FILE or node.extents != ((0, node.size),):
            return b""
        return bytes(self._sources[node.source][node.offset : node.offset + min(node.size, _LONGEST)])

    def _make_directory(self, path: str) -> None:
        name = path.encode()
        if len(name) > LONGEST_DIRECTORY:
            raise OciError(
                f"the container image is to start in a directory whose path has more than {LONGEST_DIRECTORY} bytes"
            )
        way = b""
        for part in self._tree.split(name):
            way += b"/" + part
            found = self._tree.find(way)
            child = None if found is None else found.node
            if found is not None and child is None:
                child = found.parent.children[found.name] = Node(Kind.DIRECTORY, depth=found.parent.depth + 1)
            if child is None or not child.is_directory or len(part) > LONGEST_NAME:
                raise OciError(f"the container image is to start in {show(name)}, which is no directory")
