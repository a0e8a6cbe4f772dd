"""A file that has its name only when it is complete: until then nobody finds it, and it is gone with who writes it, however that ends."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Self, final

#: What file systems say that have no files without names, or no second names of files.
_CANT: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.EPERM)


@final
class NewFile:
    """A new file, for a block; after that there is none, unless it was published. All of it blocks: call it in a thread.

    Args:
      target: What it is to be called; there must be none of that name, and its directory must be there.

    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary: Path | None = None
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
        self.file: BinaryIO = open(self._create(), "w+b")  # noqa: SIM115 - it is closed at the block's end

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(self._target.parent, flags | os.O_TMPFILE, 0o666)
        except OSError as exc:
            if exc.errno not in _CANT:
                raise
        # There it has a name, which a process that is killed leaves.
        self._temporary = self._target.with_name(f".{self._target.name[:100]}.{secrets.token_hex(8)}")
        return os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, 0o666)

    def __enter__(self) -> Self:
        return self

    def publish(self) -> None:
        """Have all of it on the disk, and give it its name, which replaces nothing.

        Raises:
          FileExistsError: if somebody has made one of that name meanwhile.
          OSError: if it can't be written.

        """
        self.file.flush()
        os.fsync(self.file.fileno())
        directory = os.open(self._target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a descriptor of a directory the link at its end is followed: see linkat(2).
            os.link(f"/proc/self/fd/{self.file.fileno()}", self._target.name, dst_dir_fd=directory)
        except OSError as exc:
            if self._temporary is None or exc.errno not in (*_CANT, errno.EXDEV, errno.ENOENT):
                raise
            if os.path.lexists(self._target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(self._target)) from None
            os.rename(self._temporary, self._target)
        finally:
            os.close(directory)

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        finally:
            if self._temporary is not None:
                with suppress(FileNotFoundError):
                    self._temporary.unlink()
