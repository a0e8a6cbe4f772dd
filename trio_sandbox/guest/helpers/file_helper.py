"""The file helper: a process that touches files in a user's name, forked by the spawner without exec.

It stands where the user's own processes stand, in their root, namespaces and control group, with their user id and
nothing else, so that the kernel decides what may be touched, and a link that is swapped in the last moment leads
nowhere that the user could not go anyway. It has one thread and serves one session at a time; the agent has as many
helpers as there are sessions at once, and only carries their bytes. No user's process can trace it: a process that
changed its user id without exec is not dumpable.

A session is a stream socket with records (see `trees`). Q holds the fields of a request, separated by NUL; the answer
is R with the fields of a result, or X with an error's number and the names of the files concerned, maybe after content:

    stat path follow            R mode ino dev nlink uid gid size rdev blksize blocks atime mtime ctime     the times in ns
    list path                   D entries NUL-separated, each after d, f, l or o for its kind, ...; R
    mkdir path mode, unlink path, rmdir path, chmod path mode, rename from to, symlink target path, link from to,
    touch path mode exist_ok    R
    readlink path               R target
    resolve path strict         R path
    get path                    D content, ...; R                      of a regular file, as the next
    put path                    <- D content, ..., E; R                all of it, once it is there; see `_Session.put`
    environment                 R NAME=value ...                       of processes of the user, unless they are told
    upload path                 <- a tree; R files bytes     as a whole or not at all
    push path                   <- a tree; K path state ..., ...; R files bytes     as upload, with the files' states
    download path               a tree; R files bytes
    pull path patience          <- N name ..., ..., K path state ..., ..., and its end; a tree, but for the names and for files
                                that are in these states; R files bytes     see `changes`
    merge source path           R                                      a copy of what is there already: see `merging`
    append path text            R
    watch path                  R, then W mask name for each change
    open path mode              R, then for that file: read size (R content), W content (R), seek offset whence (R
                                position), truncate size (R)

Whatever the session's end cuts short is taken back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from io import FileIO
from typing import TYPE_CHECKING

from ..changes import EXCLUDED, STATES, ChangesReader, pack, states_below, unpack_states
from ..messages import receive_message
from ..trees import (
    BATCH,
    CHUNK,
    HEADER,
    LISTING_BYTES,
    LISTING_LIMIT,
    LISTING_NAMES,
    NAME_COST,
    TreeError,
    TreeReader,
    TreeWriter,
    check_replaceable,
    record,
)
from . import merging
from .direct_file import DirectFile
from .replacing import (
    NOT_WAITING,
    NotTheSameError,
    Replacement,
    check_regular,
    check_writable,
    copy_into,
    create_like,
    may_be_replaced,
    open_nameless,
    write_all,
)
from .watching import watch

if TYPE_CHECKING:
    from typing import NoReturn

#: Told the agent between two sessions.
IDLE = b"."
#: The descriptor of the socket that sessions come by.
CONTROL = 3

_MAXIMUM_RECORD = 1 << 20
#: What comes by the socket: the sessions use it one after the other. The kernel gives it pages as they are filled.
_buffer = bytearray(_MAXIMUM_RECORD + HEADER.size)
#: Of sync_file_range(2): write all of it, and wait until it is written.
_AND_WAIT = 0x1 | 0x2 | 0x4
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def _open(path: str, flags: int) -> int:
    """Open a file, and make one only if there is none: O_CREAT is denied, also to root, on another user's file in a directory like /tmp."""
    if flags & os.O_CREAT and not flags & os.O_EXCL:
        try:
            return os.open(path, flags & ~os.O_CREAT)
        except FileNotFoundError:
            pass
    return os.open(path, flags, 0o666)


def _write_out(descriptor: int) -> bool:
    return bool(_libc.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _AND_WAIT) == 0)


class _SessionOverError(Exception):
    """The other end is gone, or nothing sensible can follow."""


def main(environment: dict[str, str]) -> NoReturn:
    """Serve sessions until the agent is gone; *environment* is what processes of the user get."""
    try:
        # What was not imported before the fork would come from the user's own files.
        sys.path.clear()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.closerange(CONTROL + 1, os.sysconf("SC_OPEN_MAX"))
        # To run when the agent waits or its time slice is over, not at each piece that the agent passes on.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        control = socket.socket(fileno=CONTROL)
        while (received := receive_message(control)) is not None:
            with socket.socket(fileno=received[1][0]) as sock:
                _Session(sock, environment).serve()
                # Before the socket is closed, so that who sees the session's end finds it there.
                control.send(IDLE)
    except BaseException as exc:  # noqa: BLE001  the spawner's code, which called us, must not go on in this process
        sys.excepthook(type(exc), exc, exc.__traceback__)
    finally:
        os._exit(0)


class _Session:
    def __init__(self, sock: socket.socket, environment: dict[str, str]) -> None:
        self._sock = sock
        self._environment = environment
        self._start = self._end = 0  # of what is in the buffer and not yet taken
        self._file: FileIO | None = None

    def serve(self) -> None:
        try:
            while (received := self._receive()) is not None:
                tag, payload = received
                operation, *fields = bytes(payload).split(b"\0") if tag == b"Q" else [b"", b""]
                try:
                    if tag == b"Q":
                        _OPERATIONS[operation](self, *map(os.fsdecode, fields))
                    else:
                        self._write(payload)
                except OSError as exc:
                    # Where no name was at hand, as when writing, it is about the request's.
                    name = fields[0] if exc.filename is None else os.fsencode(str(exc.filename))
                    second = b"" if exc.filename2 is None else os.fsencode(str(exc.filename2))
                    self._send(b"X", b"\0".join([b"%d" % (exc.errno or errno.EIO), name, second]))
                    if operation in _TAKING:
                        break  # what was sent behind the request is no request
        except _SessionOverError:
            pass
        finally:
            if self._file is not None:
                self._file.close()

    # --- Records ---

    def _receive(self) -> tuple[bytes, memoryview] | None:
        """Return the next record, valid until the next call; None where the other end has said all it has to say."""
        if not self._fill(HEADER.size):
            return None
        tag, length = HEADER.unpack_from(_buffer, self._start)
        self._start += HEADER.size
        if length > _MAXIMUM_RECORD or not self._fill(length):
            return None
        self._start += length
        return tag, memoryview(_buffer)[self._start - length : self._start]

    def _fill(self, size: int, *, exact: bool = False) -> bool:
        """See to it that so many bytes are there, and if *exact*, receive no more; False if they won't come."""
        left = self._end - self._start
        if left >= size:
            return True
        if not left or self._start + size > len(_buffer):
            _buffer[:left] = _buffer[self._start : self._end]
            self._start, self._end = 0, left
        with memoryview(_buffer) as view:
            while self._end - self._start < size:
                length = self._receive_some(view[self._end : self._start + size if exact else None])
                if not length:
                    return False
                self._end += length
        return True

    def _receive_some(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except OSError:
            raise _SessionOverError from None

    def _receive_more(self) -> tuple[bytes, memoryview]:
        received = self._receive()
        if received is None:
            raise _SessionOverError
        return received

    def _send(self, tag: bytes, payload: bytes) -> None:
        self._send_raw(record(tag, payload))

    def _send_raw(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError:
            raise _SessionOverError from None

    def _reply(self, *fields: bytes | int | str) -> None:
        texts = [field if isinstance(field, bytes) else os.fsencode(str(field)) for field in fields]
        self._send(b"R", b"\0".join(texts))

    # --- Operations on names ---

    def stat(self, path: str, follow: str) -> None:
        s = os.stat(path, follow_symlinks=follow == "1")
        times = s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns
        numbers = s.st_mode, s.st_ino, s.st_dev, s.st_nlink, s.st_uid, s.st_gid, s.st_size
        self._reply(*numbers, s.st_rdev, s.st_blksize, s.st_blocks, *times)

    def list(self, path: str) -> None:
        batch: list[bytes] = []
        size = cost = 0
        # A file system may give a name twice while others make and remove it.
        seen: set[str] = set()
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name in seen:
                    continue
                seen.add(name)
                kind = b"l" if entry.is_symlink() else b"d" if entry.is_dir() else b"f" if entry.is_file() else b"o"
                batch.append(kind + os.fsencode(name))
                size += len(batch[-1])
                if size > LISTING_BYTES or len(batch) == LISTING_NAMES:
                    cost += size + NAME_COST * len(batch)
                    if cost > LISTING_LIMIT:
                        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW), path)
                    self._send(b"D", b"\0".join(batch))
                    batch.clear()
                    size = 0
        if batch:
            self._send(b"D", b"\0".join(batch))
        self._reply()

    def mkdir(self, path: str, mode: str) -> None:
        os.mkdir(path, int(mode))
        self._reply()

    def unlink(self, path: str) -> None:
        os.unlink(path)
        self._reply()

    def rmdir(self, path: str) -> None:
        os.rmdir(path)
        self._reply()

    def chmod(self, path: str, mode: str) -> None:
        os.chmod(path, int(mode))
        self._reply()

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)
        self._reply()

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)
        self._reply()

    def link(self, source: str, path: str) -> None:
        os.link(source, path)
        self._reply()

    def touch(self, path: str, mode: str, exist_ok: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
        if exist_ok == "1":
            try:
                os.utime(path)
            except FileNotFoundError:
                pass
            else:
                self._reply()
                return
        else:
            flags |= os.O_EXCL
        os.close(os.open(path, flags, int(mode)))
        self._reply()

    def readlink(self, path: str) -> None:
        self._reply(os.readlink(path))

    def resolve(self, path: str, strict: str) -> None:
        self._reply(os.path.realpath(path, strict=strict == "1"))

    def environment(self) -> None:
        self._reply(*(f"{name}={value}" for name, value in self._environment.items()))

    # --- Content ---

    def get(self, path: str) -> None:
        check_regular(os.stat(path), path)
        # Looked at again: it may be another one by now, and opening that must not wait either.
        with FileIO(os.open(path, os.O_RDONLY | NOT_WAITING)) as file:
            check_regular(os.fstat(file.fileno()), path)
            while data := file.read(CHUNK):
                self._send(b"D", data)
        self._reply()

    def put(self, path: str) -> None:
        """Replace what a file holds, and nothing else about it, when all of the new content is there.

        As a rule a new file takes the old one's place, so that nobody ever sees half of it. Where that would not be the same
        file to others (it has another owner, more names, attributes, ...) or the directory can't be written, the content is
        copied into the file that is there, as by open(2) with O_TRUNC.
        """
        try:
            self._put(os.path.realpath(path), path)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, path) from None
        self._reply()

    def _put(self, target: str, path: str) -> None:
        old: os.stat_result | None
        try:
            old = os.stat(target)
        except FileNotFoundError:
            old = None
        else:
            check_regular(old, path)
            check_writable(target)
        if old is None or may_be_replaced(target, old):
            try:
                with Replacement(target, path) as new, FileIO(create_like(old, new), "r+") as file:
                    self._receive_content(file)
                    try:
                        new.commit()
                    except NotTheSameError:
                        copy_into(target, file)
                return
            except NotTheSameError:
                pass
        with FileIO(open_nameless(os.path.dirname(target)), "r+") as file:
            self._receive_content(file)
            copy_into(target, file)

    def _receive_content(self, file: FileIO) -> None:
        while True:
            tag, payload = self._receive_more()
            if tag != b"D":
                return
            write_all(file, payload)

    def upload(self, path: str, *, tell_states: bool = False) -> None:
        states: list[bytes] = []
        with Replacement(path, path) as new:
            check_replaceable(new.parent, new.target)
            new.go_elsewhere()
            writer = TreeWriter(new.place, new.name)
            try:
                self._receive_tree(writer)
            except TreeError:
                raise _SessionOverError from None  # no host of ours sends such
            except OSError as exc:
                raise OSError(exc.errno, exc.strerror, path) from None
            finally:
                writer.close()
            if tell_states:  # before anybody knows that it is there
                states += pack(STATES, states_below(new.place, new.name))
            new.commit_like()
        for each in states:
            self._send_raw(each)
        self._reply(writer.files, writer.size)

    def push(self, path: str) -> None:
        self.upload(path, tell_states=True)

    def merge(self, source: str, path: str) -> None:
        merging.merge(source, path)
        self._reply()

    def append(self, path: str, text: str) -> None:
        merging.append(path, text)
        self._reply()

    def _receive_tree(self, writer: TreeWriter) -> None:
        large: DirectFile | None = None
        while not writer.finished:
            # After a part of a large file only the next header is received, and not all that is there:
            # what follows is another part, as a rule, which need not come by our buffer.
            if not self._fill(HEADER.size, exact=large is not None):
                raise _SessionOverError
            tag, length = HEADER.unpack_from(_buffer, self._start)
            if tag == b"c":
                self._start += HEADER.size
                descriptor = writer.expect(length)
                large = large or DirectFile(descriptor)
                self._receive_into(large, length)
                continue
            if large is not None:
                large.finish()
                large = None
            writer.write(*self._receive_more())

    def _receive_into(self, file: DirectFile, length: int) -> None:
        while length:
            room = file.room[:length]
            count = min(len(room), self._end - self._start)
            if count:
                room[:count] = memoryview(_buffer)[self._start : self._start + count]
                self._start += count
            elif not (count := self._receive_some(room)):
                raise _SessionOverError
            file.add(count)
            length -= count

    def download(self, path: str) -> None:
        self._send_tree(TreeReader(path))

    def pull(self, path: str, patience: str) -> None:
        excluded: set[str] = set()
        known: dict[bytes, bytes] = {}
        while (received := self._receive()) is not None:
            tag, payload = received
            if tag == EXCLUDED:
                excluded.update(map(os.fsdecode, bytes(payload).split(b"\0")))
            elif tag == STATES:
                known.update(unpack_states(bytes(payload)))
        self._send_tree(ChangesReader(path, known, excluded, int(patience), _write_out))

    def _send_tree(self, reader: TreeReader) -> None:
        for batch in reader.batches():
            self._send_raw(batch)
        self._reply(reader.files, reader.size)

    # --- Open files ---

    def open(self, path: str, mode: str) -> None:
        self._file = FileIO(path, mode, opener=_open)
        self._reply()

    def read(self, size: str) -> None:
        assert self._file is not None
        self._reply(self._file.read(min(int(size), BATCH)) or b"")

    def _write(self, data: memoryview) -> None:
        assert self._file is not None
        write_all(self._file, data)
        self._reply()

    def seek(self, offset: str, whence: str) -> None:
        assert self._file is not None
        self._reply(self._file.seek(int(offset), int(whence)))

    def truncate(self, size: str) -> None:
        assert self._file is not None
        self._reply(self._file.truncate(int(size) if size else None))

    # --- Changes ---

    def watch(self, path: str) -> None:
        """Report changes until the other end has had enough: nothing but its end can come."""
        for changes in watch(path, self._sock.fileno(), self._reply):
            self._send_raw(changes)


_Operation = Callable[..., None]
_OPERATIONS: dict[bytes, _Operation] = {
    name.encode(): operation
    for name, operation in vars(_Session).items()
    if not name.startswith("_") and name != "serve"
}
#: Requests that more follows than the next one may be sent before they are answered.
_TAKING = (b"put", b"upload", b"push")
