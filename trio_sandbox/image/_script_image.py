"""The image that a script of Python's asks for by itself (PEP 723)."""

from __future__ import annotations

from collections.abc import Iterable

from .._image import AnyImage, Image
from .._requirements import allows, read_script
from ._layer import LAYER_MARK
from ._recipes import IMAGES


def image_for_script(image: AnyImage, source: str = "", *, more: Iterable[str] = ()) -> AnyImage:
    """Return *image* with what the script *source* needs by its block ``# /// script``, and with *more* requirements.

    Raises:
      ValueError: if the block can't be read, or wants another Python than the image has.

    """
    needs = read_script(source)
    name = (image if isinstance(image, str) else image.name).partition(LAYER_MARK)[0]
    python = IMAGES[name].python if name in IMAGES else None
    if needs.requires_python is not None and python is not None and not allows(needs.requires_python, python):
        raise ValueError(f"the script requires Python {needs.requires_python}, and the image {name!r} has {python}")
    requirements = (*needs.requirements, *more)
    if not requirements:
        return image
    whole = Image(image) if isinstance(image, str) else image
    return whole.packages(*requirements, exclude_newer=needs.exclude_newer)
