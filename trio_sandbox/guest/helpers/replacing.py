"""New content for files: put in their place as a whole, or copied into them where that is not the same. Stdlib only."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from typing import TYPE_CHECKING

from ..trees import BATCH, extents, is_sparse, remove

if TYPE_CHECKING:
    from typing import Self

#: For what is to be a regular file; should it be another by now, nothing waits for its other end.
NOT_WAITING = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Replacement:
    """Something new, which takes the place of *target* by `commit` or is gone at the end of the block.

    It is made in the directory `place`, as a rule that of *target*.
    """

    def __init__(self, target: str, shown: str) -> None:
        directory = os.path.dirname(target)
        self.target: str = os.path.basename(target)
        self._shown = shown
        self.name: str = f".trio-sandbox-{os.urandom(8).hex()}"
        if self.target in ("", ".", ".."):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown)
        try:
            # To look up names in; the user need not be able to read it.
            self.parent: int = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, shown) from None
        self.place: int = self.parent
        self._elsewhere = ""
        self._pending = True

    def go_elsewhere(self) -> None:
        """Have another place, for the user alone, where *target* can be written and its directory can not.

        `commit_like` copies the content from there; `commit` can't be then.
        """
        directory = f"/proc/self/fd/{self.parent}"
        if os.access(directory, os.W_OK, effective_ids=True):
            return
        if not os.access(self.target, os.W_OK, dir_fd=self.parent, effective_ids=True, follow_symlinks=False):
            return
        for temporary in ("/var/tmp", "/tmp"):
            try:
                os.mkdir(elsewhere := f"{temporary}/{self.name}", 0o700)
            except OSError:
                continue
            self._elsewhere = elsewhere
            self.place = os.open(elsewhere, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return

    def __enter__(self) -> Self:
        return self

    def commit(self) -> None:
        """Have it take the place, in one step; `NotTheSameError` where that is a mount point. Errors as rename(2)."""
        if self._elsewhere:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self._shown)
        try:
            os.rename(self.name, self.target, src_dir_fd=self.parent, dst_dir_fd=self.parent)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise NotTheSameError from None
            raise
        self._pending = False

    def commit_like(self) -> None:
        """Have it take the place; a file that is there, and no link, stays the same but for its content.

        Raises:
          OSError: as rename(2), or as open(2) of the file for writing.

        """
        # Not by its name: who else may write in that directory may have put a link there meanwhile.
        ours = os.open(self.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.place)
        try:
            old = os.lstat(self.target, dir_fd=self.parent)
            if stat.S_ISREG(old.st_mode) and stat.S_ISREG(os.fstat(ours).st_mode):
                self._replace_file(old, f"/proc/self/fd/{ours}")
                return
        except FileNotFoundError:
            pass
        finally:
            os.close(ours)
        self.commit()

    def _replace_file(self, old: os.stat_result, new: str) -> None:
        check_writable(target := f"/proc/self/fd/{self.parent}/{self.target}")
        os.chmod(new, 0o600)
        with FileIO(os.open(new, os.O_RDONLY | NOT_WAITING)) as file:
            try:
                if self._elsewhere or not may_be_replaced(target, old):
                    raise NotTheSameError
                be_like(old, file.fileno())
                self.commit()
            except NotTheSameError:
                copy_into(self.target, file, self.parent)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if self._pending:
                remove(self.place, self.name)
            if self._elsewhere:
                os.rmdir(self._elsewhere)
        finally:
            if self._elsewhere:
                os.close(self.place)
            os.close(self.parent)
        if isinstance(error, OSError) and error.filename != self._shown:
            # Nobody knows the name of what would have replaced it.
            raise OSError(error.errno, error.strerror, self._shown) from None


class NotTheSameError(Exception):
    """A new file would differ from the old one in more than its content, or can't be made where the old one is."""


def check_regular(status: os.stat_result, path: str) -> None:
    """Refuse what is no regular file, with EISDIR or EOPNOTSUPP."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        # Reading or writing it may wait for ever, and for others than who asked.
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


def check_writable(path: str) -> None:
    """Refuse a file that the user may not write. Errors as open(2)."""
    if not os.access(path, os.W_OK, effective_ids=True):
        os.close(os.open(path, os.O_WRONLY | NOT_WAITING))  # for the kernel to say why not


def may_be_replaced(path: str, status: os.stat_result) -> bool:
    """Whether a new file can be all that the old one is, as far as that can be told beforehand."""
    if status.st_nlink > 1 or stat.S_IMODE(status.st_mode) & ~0o777:
        return False
    try:
        return not os.listxattr(path)
    except OSError:
        return True  # the file system has none


def create_like(old: os.stat_result | None, new: Replacement) -> int:
    """Make a file that is to be *new*, with the owner and mode of the old one, and return its descriptor.

    Raises:
      NotTheSameError: if that can't be.
      OSError: as open(2).

    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if old is None:
        return os.open(new.name, flags, 0o666, dir_fd=new.parent)
    try:
        descriptor = os.open(new.name, flags, 0o600, dir_fd=new.parent)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):  # the last: /proc
            raise NotTheSameError from None
        raise
    try:
        be_like(old, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def be_like(old: os.stat_result, descriptor: int) -> None:
    """Give a file the owner and mode of the old one; `NotTheSameError` if that can't be."""
    made = os.fstat(descriptor)
    try:
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    except PermissionError:
        raise NotTheSameError from None


def open_nameless(directory: str) -> int:
    """Return the descriptor of an empty file that is gone when it is closed, where the user may have one."""
    for place in (directory, "/var/tmp", "/tmp"):
        try:
            return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            pass
    return os.memfd_create("content", os.MFD_CLOEXEC)


def copy_into(target: str, content: FileIO, dir_fd: int | None = None) -> None:
    """Replace what the file *target* holds by *content*; holes stay holes. Errors as open(2) and write(2)."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | NOT_WAITING
    with FileIO(os.open(target, flags, dir_fd=dir_fd), "w") as file:
        old, new = os.fstat(file.fileno()), os.fstat(content.fileno())
        check_regular(old, target)
        if old.st_size:
            file.truncate(0)
        for start, end in extents(content.fileno(), new.st_size) if is_sparse(new) else [(0, new.st_size)]:
            content.seek(start)
            file.seek(start)
            while start < end and (data := content.read(min(BATCH, end - start))):
                write_all(file, memoryview(data))
                start += len(data)
        if file.tell() < new.st_size:
            file.truncate(new.st_size)


def write_all(file: FileIO, view: memoryview) -> None:
    """Write all of *view*. Errors as write(2)."""
    while view:
        # None: it would block, which nothing does that was opened here.
        view = view[file.write(view) or 0 :]
