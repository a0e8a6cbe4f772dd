"""For which Python, and on which platform, an image's packages are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, final

import attrs

from .._errors import PackagesError

#: The versions of glibc that uv has a platform for, the newest first.
_GLIBC_MINORS: Final = (40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 28, 17)


@final
@attrs.frozen
class Target:
    """What packages are chosen for."""

    python: str
    """Major and minor version."""
    platform: str
    """As uv calls it."""

    @property
    def site(self) -> str:
        """Where Debian's Python looks for what its own packages do not bring, relative to /."""
        return f"usr/local/lib/python{self.python}/dist-packages"


def find_target(image: str, packages: Mapping[str, object]) -> Target:
    """Return what packages for the image *image* must be for, which has Debian's *packages* in these versions.

    Raises:
      PackagesError: if it has no Python.

    """
    python = re.match(r"(\d+\.\d+)\b", str(packages.get("python3-minimal", "")))
    glibc = re.match(r"2\.(\d+)\b", str(packages.get("libc6", "")))
    if python is None or glibc is None:
        raise PackagesError(
            f"packages can't be added to the image {image!r}: it has no Python of ours. In a container image have its own pip do it: "
            'Image.oci(...).script("pip install ...", network=...)'
        )
    minor = next((each for each in _GLIBC_MINORS if each <= int(glibc[1])), None)
    if minor is None:
        raise PackagesError(
            f"packages can't be added to the image {image!r}: there are none for its glibc 2.{glibc[1]}"
        )
    return Target(python[1], f"x86_64-manylinux_2_{minor}")
