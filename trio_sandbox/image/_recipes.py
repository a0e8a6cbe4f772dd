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
    languages=("python", "shell"),
)

# No npm: Debian's comes as hundreds of packages. What a project needs can be uploaded with its node_modules.
_NODE = DebianImage(
    name="node",
    suite="trixie",
    packages=("bash", "ca-certificates", "curl", "less", "nodejs", "procps"),
    languages=("javascript", "shell"),
)

IMAGES: Mapping[str, DebianImage] = MappingProxyType({image.name: image for image in (_NODE, _PYTHON)})


def images_with(language: str) -> tuple[str, ...]:
    """Return the names of the images that have an interpreter of *language*."""
    return tuple(image.name for image in IMAGES.values() if language in image.languages)
