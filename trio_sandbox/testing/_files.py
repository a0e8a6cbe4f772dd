"""The file helper of a scripted guest; `guest.helpers.file_helper` has the protocol."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Container
from typing import Final, final

from ..wire import RecordStream
from ._tree import HOME, Node, ScriptedFiles, failure, new_directory, new_file, new_link

_HOLE: Final = struct.Struct(">Q")
#: Bytes of content in one record, and names.
_PIECE: Final = 2**15
_NAMES: Final = 500


@final
class FileSession:
    """One conversation about files.

    Args:
      records: With whom.
      files: What it is about.
      before: Called with each request ("get /home/user/a.txt") before it is done; an `OSError` of it is the answer.

    """

    def __init__(self, records: RecordStream, files: ScriptedFiles, before: Callable[[str], object]) -> None:
        self._records = records
        self._files = files
        self._before = before
        self._open: Node | None = None
        self._position = 0
        self._appends = False

    async def serve(self) -> None:
        """Answer until the host has had enough."""
        while (record := await self._records.receive()) is not None:
            tag, payload = record
            operation, *fields = map(os.fsdecode, payload.split(b"\0")) if tag == b"Q" else ("", "")
            try:
                if tag == b"W":
                    await self._write(payload)
                elif operation not in _OPERATIONS:
                    raise failure(errno.EOPNOTSUPP, fields[0])
                else:
                    self._before(self._describe(operation, fields))
                    await _OPERATIONS[operation](self, *fields)
            except OSError as exc:
                names = [os.fsencode(str(name or "")) for name in (exc.filename or (fields or [""])[0], exc.filename2)]
                await self._records.send(b"X", b"\0".join([b"%d" % (exc.errno or errno.EIO), *names]))
                if operation in ("put", "upload", "push"):
                    return  # what follows is no request

    def _describe(self, operation: str, fields: list[str]) -> str:
        """Say what is about to be done, and to what file, whatever the program calls it."""
        if not fields or operation in _ON_OPEN_FILE:
            return operation
        return f"{operation} {self._files.absolute(fields[1 if operation == 'symlink' else 0])}"

    async def _reply(self, *fields: bytes | int | str) -> None:
        texts = [field if isinstance(field, bytes) else os.fsencode(str(field)) for field in fields]
        await self._records.send(b"R", b"\0".join(texts))

    # --- Names ---

    async def stat(self, path: str, follow: str) -> None:
        await self._reply(*self._files.find(path, follow=follow == "1").numbers())

    async def list(self, path: str) -> None:
        directory = self._files.find(path)
        if not directory.is_directory:
            raise failure(errno.ENOTDIR, path)
        names: list[bytes] = []
        for name, node in directory.entries.items():
            kind = b"d" if node.is_directory else b"l" if stat.S_ISLNK(node.mode) else b"f"
            names.append(kind + os.fsencode(name))
        for start in range(0, len(names), _NAMES):
            await self._records.send(b"D", b"\0".join(names[start : start + _NAMES]))
        await self._reply()

    async def mkdir(self, path: str, mode: str) -> None:
        self._files.add(path, new_directory(int(mode) & 0o755))
        await self._reply()

    async def unlink(self, path: str) -> None:
        self._files.unlink(path)
        await self._reply()

    async def rmdir(self, path: str) -> None:
        self._files.unlink(path, directory=True)
        await self._reply()

    async def chmod(self, path: str, mode: str) -> None:
        node = self._files.find(path)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(int(mode))
        await self._reply()

    async def rename(self, source: str, target: str) -> None:
        self._files.rename(source, target)
        await self._reply()

    async def symlink(self, target: str, path: str) -> None:
        self._files.add(path, new_link(target))
        await self._reply()

    async def link(self, source: str, path: str) -> None:
        node = self._files.find(source, follow=False)
        if node.is_directory:
            raise failure(errno.EPERM, source, path)
        self._files.add(path, node)
        node.links += 1
        await self._reply()

    async def touch(self, path: str, mode: str, exist_ok: str) -> None:
        parent, name = self._files.locate(path)
        node = parent.entries.get(name) if name else self._files.root
        if node is None:
            parent.entries[name] = new_file(int(mode) & 0o755)
        elif exist_ok != "1":
            raise failure(errno.EEXIST, path)
        else:
            node.touch()
        await self._reply()

    async def readlink(self, path: str) -> None:
        node = self._files.find(path, follow=False)
        if not stat.S_ISLNK(node.mode):
            raise failure(errno.EINVAL, path)
        await self._reply(node.target)

    async def resolve(self, path: str, strict: str) -> None:
        if strict == "1":
            self._files.find(path)
        await self._reply(self._files.resolve(path))

    async def environment(self) -> None:
        await self._reply(f"HOME={HOME}", "USER=user", "PATH=/usr/local/bin:/usr/bin:/bin")

    # --- Content ---

    def _regular(self, path: str) -> Node:
        node = self._files.find(path)
        if node.is_directory:
            raise failure(errno.EISDIR, path)
        return node

    async def get(self, path: str) -> None:
        content = bytes(self._regular(path).content)
        for start in range(0, len(content), _PIECE):
            await self._records.send(b"D", content[start : start + _PIECE])
        await self._reply()

    async def put(self, path: str) -> None:
        parent, name = self._files.locate(path)
        node = parent.entries.get(name) if name else self._files.root
        if node is not None and node.is_directory:
            raise failure(errno.EISDIR, path)
        content = bytearray()
        while (record := await self._records.receive()) is not None and record[0] == b"D":
            content += record[1]
        if record is None:
            return  # it was cut short, and is taken back
        node = parent.entries.setdefault(name, node or new_file())
        node.content = content
        node.touch()
        await self._reply()

    async def upload(self, path: str) -> None:
        parent, name_there = self._files.locate(path, follow=False)
        if (old := parent.entries.get(name_there)) is not None and old.entries:
            raise failure(errno.ENOTEMPTY, path)
        count = size = 0
        trail: list[Node] = []
        top = last = new_directory()
        while (record := await self._records.receive()) is not None and record[0] != b".":
            tag, payload = record
            if tag == b"c":
                last.content += payload
                size += len(payload)
            elif tag == b"h":
                last.content += bytes(_HOLE.unpack(payload)[0])
            elif tag == b"u":
                trail.pop()
            else:
                first, name, *rest = payload.split(b"\0", 2)
                if tag == b"l":
                    name, rest = first, [name]
                last = (
                    new_directory(int(first, 8))
                    if tag == b"d"
                    else new_link(os.fsdecode(rest[0]))
                    if tag == b"l"
                    else new_file(int(first, 8))
                )
                if tag == b"f":
                    last.content += rest[0]
                    size += len(rest[0])
                count += tag != b"d"
                if trail:
                    trail[-1].entries[os.fsdecode(name)] = last
                else:
                    top = last
                if tag == b"d":
                    trail.append(last)
        if record is None:
            return
        self._files.add(path, top, replace=True)
        await self._reply(count, size)

    async def push(self, path: str) -> None:
        await self.upload(path)  # no file's state is told: so each comes back whole

    async def download(self, path: str, excluded: Container[str] = ()) -> None:
        count, size = await self._send_tree("", self._files.find(path), excluded)
        await self._records.send(b".", b"")
        await self._reply(count, size)

    async def pull(self, path: str, _patience: str) -> None:
        excluded: set[str] = set()
        while (record := await self._records.receive()) is not None:
            if record[0] == b"N":
                excluded.update(map(os.fsdecode, record[1].split(b"\0")))
        await self.download(path, excluded)

    async def _send_tree(self, name: str, node: Node, excluded: Container[str]) -> tuple[int, int]:
        """Send a tree; return how many files and links it has, and bytes in them."""
        head = b"%o\0%s" % (node.mode & 0o777, os.fsencode(name))
        if node.is_directory:
            await self._records.send(b"d", head)
            entries = [(each, entry) for each, entry in node.entries.items() if each not in excluded]
            sent = [await self._send_tree(each, entry, excluded) for each, entry in entries]
            await self._records.send(b"u", b"")
            return sum(count for count, _ in sent), sum(size for _, size in sent)
        if stat.S_ISLNK(node.mode):
            await self._records.send(b"l", b"%s\0%s" % (os.fsencode(name), os.fsencode(node.target)))
            return 1, 0
        content = bytes(node.content)
        await self._records.send(b"f", b"%s\0%s" % (head, content[:_PIECE]))
        for start in range(_PIECE, len(content), _PIECE):
            await self._records.send(b"c", content[start : start + _PIECE])
        return 1, len(content)

    # --- Open files ---

    async def open(self, path: str, mode: str) -> None:
        parent, name = self._files.locate(path)
        node = parent.entries.get(name) if name else self._files.root
        if node is None:
            if mode.startswith("r"):
                raise failure(errno.ENOENT, path)
            node = parent.entries[name] = new_file()
        elif mode.startswith("x"):
            raise failure(errno.EEXIST, path)
        elif node.is_directory:
            raise failure(errno.EISDIR, path)
        if mode.startswith("w"):
            node.content.clear()
        self._open, self._appends = node, mode.startswith("a")
        self._position = len(node.content) if self._appends else 0
        await self._reply()

    async def read(self, size: str) -> None:
        assert self._open is not None
        data = bytes(self._open.content[self._position : self._position + int(size)])
        self._position += len(data)
        await self._reply(data)

    async def _write(self, data: bytes) -> None:
        node = self._open
        assert node is not None
        if self._appends:
            self._position = len(node.content)
        node.resize(max(self._position + len(data), len(node.content)))
        node.content[self._position : self._position + len(data)] = data
        self._position += len(data)
        node.touch()
        await self._reply()

    async def seek(self, offset: str, whence: str) -> None:
        assert self._open is not None
        start = {0: 0, 1: self._position, 2: len(self._open.content)}.get(int(whence))
        if start is None or start + int(offset) < 0:
            raise failure(errno.EINVAL, "")
        self._position = start + int(offset)
        await self._reply(self._position)

    async def truncate(self, size: str) -> None:
        assert self._open is not None
        wanted = int(size) if size else self._position
        if wanted < 0:
            raise failure(errno.EINVAL, "")
        self._open.resize(wanted)
        await self._reply(wanted)


#: Whose first field is no path.
_ON_OPEN_FILE: Final = frozenset({"read", "seek", "truncate"})
_OPERATIONS: Final = {
    name: operation for name, operation in vars(FileSession).items() if not name.startswith("_") and name != "serve"
}
