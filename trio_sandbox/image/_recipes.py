"""The images that can be built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ._debian_image import DebianImage

_PYTHON = DebianImage(
    name="python",
    suite="trixie",
    packages=(
        "bash",
        "ca-certificates",
        "curl",
        "file",
        "git",
        "jq",
        "less",
        "procps",
        "python3",
        "python3-numpy",
        "python3-pip",
        "python3-requests",
        "python3-venv",
        "unzip",
        "xz-utils",
        "zip",
    ),
)

IMAGES: Mapping[str, DebianImage] = MappingProxyType({image.name: image for image in (_PYTHON,)})
