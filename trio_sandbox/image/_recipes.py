"""The images that can be built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ._debian_image import DebianImage

# What programs, and programmers, expect of a machine, whatever the language.
_COMMON = (
    "apt",
    "bash",
    "bzip2",
    "ca-certificates",
    "curl",
    "debian-archive-keyring",  # what apt checks signatures with
    "file",
    "gawk",
    "git",
    "jq",
    "less",
    "make",
    "media-types",  # which extension a type of file has
    "netbase",  # names of services and protocols
    "patch",
    "procps",
    "python-is-python3",
    "python3",
    "tree",
    "tzdata",
    "unzip",
    "xz-utils",
    "zip",
)

_PYTHON = DebianImage(
    name="python",
    suite="trixie",
    packages=(*_COMMON, "python3-numpy", "python3-pip", "python3-requests", "python3-venv"),
    languages=("python", "shell"),
)

# No npm: Debian's comes as hundreds of packages. Packages are added by the host's.
_NODE = DebianImage(
    name="node",
    suite="trixie",
    packages=(*_COMMON, "nodejs"),
    languages=("javascript", "python", "shell"),
)

IMAGES: Mapping[str, DebianImage] = MappingProxyType({image.name: image for image in (_NODE, _PYTHON)})


def images_with(language: str) -> tuple[str, ...]:
    """Return the names of the images that have an interpreter of *language*."""
    return tuple(image.name for image in IMAGES.values() if language in image.languages)
