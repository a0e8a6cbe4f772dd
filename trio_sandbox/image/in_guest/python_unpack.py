"""Unpacks an archive (tar) from standard input into the working directory, as it is: it needs no other program of the image.

Its text is run by the Python of an image, as root, in a sandbox, so it stands alone: the standard library of Python 3.8 or later.
"""

from __future__ import annotations

import sys
import tarfile


def _unpack() -> None:
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        if hasattr(tarfile, "fully_trusted_filter"):
            tar.extraction_filter = tarfile.fully_trusted_filter
        tar.extractall(numeric_owner=True)


if __name__ == "__main__":
    _unpack()
