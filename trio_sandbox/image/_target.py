"""For which Python, or which Node.js, an image's packages are, on which platform, and where they go."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, final

import attrs

from .._errors import PackagesError

#: The versions of glibc that uv has a platform for, the newest first.
_GLIBC_MINORS: Final = (40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 28, 17)
#: The oldest minor version of musl that uv has one for.
_OLDEST_MUSL: Final = 2
#: The longest line that names an interpreter, and what takes its place.
_LONGEST_LINE: Final = 127
_TRAMPOLINE: Final = "#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''\n"


@final
@attrs.frozen
class Target:
    """What packages are chosen for, and where they are put."""

    python: str
    """Major and minor version."""
    platform: str
    """As uv calls it."""
    site: str = attrs.field(
        default=attrs.Factory(lambda self: f"usr/local/lib/python{self.python}/dist-packages", takes_self=True)
    )
    """Where that Python looks for modules, relative to /. By default what Debian's has for packages that are not its own."""
    scripts: str = "usr/local/bin"
    """Where programs of packages go, relative to /."""
    prefix: str = "usr/local"
    """Where other files of packages go, relative to /."""
    interpreter: str = "/usr/bin/python3"
    """That Python."""
    container: bool = False
    """Whether it is in a container image, which may have no shell, no cp and no tar."""

    @property
    def first_line(self) -> bytes:
        """How a script begins that this Python runs."""
        line = f"#!{self.interpreter}\n"
        if " " in self.interpreter or len(os.fsencode(line)) > _LONGEST_LINE:
            line = _TRAMPOLINE.format(self.interpreter)
        return os.fsencode(line)


def find_target(image: str, packages: Mapping[str, object]) -> Target:
    """Return what packages for one of our own images must be for, which has Debian's *packages* in these versions.

    Raises:
      PackagesError: if it has no Python.

    """
    python = re.match(r"(\d+\.\d+)\b", str(packages.get("python3-minimal", "")))
    glibc = re.match(r"2\.(\d+)\b", str(packages.get("libc6", "")))
    if python is None or glibc is None:
        raise PackagesError(f"packages can't be added to the image {image!r}: it has no Python of ours")
    return Target(python[1], find_platform(image, "glibc", glibc[0]))


def find_platform(image: str, libc: str, version: str) -> str:
    """Return the platform, as uv calls it, of an image with a C library of that name and version.

    Raises:
      PackagesError: if there are no packages for it.

    """
    match = re.match(r"(\d+)\.(\d+)\b", version)
    major, minor = (int(match[1]), int(match[2])) if match is not None else (0, 0)
    if libc == "musl" and (major, minor) >= (1, _OLDEST_MUSL):
        return "x86_64-unknown-linux-musl"
    if libc == "glibc" and major == 2:
        known = next((each for each in _GLIBC_MINORS if each <= minor), None)
        if known is not None:
            return f"x86_64-manylinux_2_{known}"
    what = f"{libc} {version}".strip() or "C library, which is neither glibc nor musl"
    raise PackagesError(f"packages can't be added to the image {image!r}: there are none for its {what:.60}")
