"""Images that are another one with a fixed set of packages: what is in them is written down in locks beside this file.

A lock says which versions, and the digests of all files of theirs. Where the files come from is for the user's index to say.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from .._image import AnyImage, Image
from .._image_steps import PackagesStep

#: Each, and the image that the packages are added to. ``nox -s lock`` writes the locks.
LOCKED: Final[Mapping[str, str]] = MappingProxyType({"data": "python"})


def spell_out(image: AnyImage) -> AnyImage:
    """Return the image that *image* is short for, if it is one of `LOCKED`, or stands on one."""
    name = image if isinstance(image, str) else image.name
    if name not in LOCKED:
        return image
    steps = () if isinstance(image, str) else image.steps
    return Image(LOCKED[name], steps=(_step(name), *steps))


@functools.cache
def _step(name: str) -> PackagesStep:
    lock = tomllib.loads(Path(__file__).with_name(f"pylock.{name}.toml").read_text("utf-8"))
    packages = lock["packages"]
    return PackagesStep(
        requirements=tuple(f"{package['name']}=={package['version']}" for package in packages),
        digests=tuple(sorted(wheel["hashes"]["sha256"] for package in packages for wheel in package["wheels"])),
        label=f"the packages of {name}",
    )
