"""The image that a program asks for: by what its script says (PEP 723), and by requirements besides."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence

import trio

from .._checks import to_path
from .._image import AnyImage, Image
from .._requirements import allows, read_script
from ._layer import LAYER_MARK
from ._recipes import IMAGES


async def read_source(path: str | os.PathLike[str]) -> str:
    """Return the text of a Python file of the host's, decoded as Python does.

    Raises:
      TypeError, ValueError: if *path* can't be a file's.
      OSError: if it can't be read.
      SyntaxError: if it is not Python source text.

    """
    return importlib.util.decode_source(await trio.Path(to_path(path, "path", "file")).read_bytes())


def image_for_script(image: AnyImage, source: str = "", *, more: Iterable[str] = ()) -> AnyImage:
    """Return *image* with what the script *source* needs by its block ``# /// script``, and with *more* requirements.

    Raises:
      ValueError: if the block can't be read, or wants another Python than the image has.

    """
    needs = read_script(source)
    name = _name(image)
    python = IMAGES[name].python if name in IMAGES else None
    if needs.requires_python is not None and python is not None and not allows(needs.requires_python, python):
        raise ValueError(f"the script requires Python {needs.requires_python}, and the image {name!r} has {python}")
    requirements = (*needs.requirements, *more)
    if not requirements:
        return image
    return _whole(image).packages(*requirements, exclude_newer=needs.exclude_newer)


def image_for_program(
    image: AnyImage, requirements: Sequence[str], language: str | None = None, source: str = ""
) -> AnyImage:
    """Return *image* with packages for a program: npm's for one in JavaScript, else Python's.

    Args:
      image: What they are added to.
      requirements: Of one or the other kind.
      language: None, or one that has no packages: what the image is for.
      source: A script of Python's, whose block ``# /// script`` counts as well.

    Raises:
      ValueError: if a requirement is none, or as `image_for_script` does.

    """
    if language not in ("python", "javascript"):
        name = _name(image)
        language = IMAGES[name].languages[0] if name in IMAGES else "python"
    if language == "javascript":
        return _whole(image).npm(*requirements) if requirements else image
    return image_for_script(image, source, more=requirements)


def _name(image: AnyImage) -> str:
    return (image if isinstance(image, str) else image.name).partition(LAYER_MARK)[0]


def _whole(image: AnyImage) -> Image:
    return Image(image) if isinstance(image, str) else image
