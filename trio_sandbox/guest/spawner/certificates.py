"""The users' certificates of authorities: their image's own, and for as long as a host says so more of them. Stdlib only."""

from __future__ import annotations

import contextlib
import os
import stat

from . import mounts

#: Where programs look for them: Debian and Alpine, Fedora, openSUSE, and what OpenSSL itself does.
_PLACES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
#: Where they are in any image; the host's variables for programs name it.
_BUNDLE = "/run/trio-sandbox/certificates.pem"
#: Nobody's are longer; longer ones are cut.
_LIMIT = 4 * 2**20


class Certificates:
    """Puts more of them over the image's own, and takes them away again."""

    __slots__ = ("_covered",)

    def __init__(self) -> None:
        self._covered: list[str] = []

    def set(self, files: list[int]) -> None:
        """Have programs that are started from now on, or that look again, trust what is in *files* as well, as PEM.

        Raises:
          OSError: if there is no room for them.

        """
        for place in self._covered:
            mounts.unmount(place)
        self._covered.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_BUNDLE)
        if not files:
            return
        places = dict.fromkeys(os.path.realpath(place) for place in _PLACES)
        theirs = [(place, content) for place in places if (content := _read(place)) is not None]
        os.makedirs(os.path.dirname(_BUNDLE), exist_ok=True)
        descriptor = os.open(_BUNDLE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(descriptor, "wb", buffering=0) as file:
            for data in (theirs[0][1] if theirs else b"", b"\n", *map(_content, files)):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        for place, _ in theirs:
            # An image that can't have them there is no reason not to run: there are the variables.
            with contextlib.suppress(OSError):
                mounts.bind_file(_BUNDLE, place)
                self._covered.append(place)


def _read(path: str) -> bytes | None:
    """Return the content of a regular file; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        return file.read(_LIMIT) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)
