"""What may be asked for: which image, and what of a machine restored from a saved sandbox."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

import attrs

from .._config import SandboxConfig
from .._image import DEFAULT_IMAGE, AnyImage, to_image
from .._oci_reference import is_oci
from ..image import ImageStore
from ._named import NamedTemplate

#: Fields of a configuration that a saved sandbox goes on with as they were.
_KEPT_FIELDS: Final = ("memory_mib", "vcpus", "guest_namespaces")
#: Said while a machine boots instead of going on.
BOOTS_ANEW: Final = (
    "booting from its disk, to have more memory: files are kept, variables, processes and mounts are not"
)


def check_image(image: object) -> AnyImage:
    """Return what names an image, in its one form, or refuse what can't."""
    if isinstance(image, SandboxConfig):
        raise TypeError("`image` must be the name of an image, not a SandboxConfig: pass that as `config=`")
    return to_image(image)


def check_known(store: ImageStore, image: AnyImage) -> None:
    """Refuse what nothing can be built by.

    Raises:
      UnknownImageError: if no recipe has that name; whether there is a container image is only seen when it is fetched.

    """
    name = image if isinstance(image, str) else image.name
    if not is_oci(name):
        store.check_name(name)


def boots_anew(saved: NamedTemplate, config: SandboxConfig) -> bool:
    """Whether a machine of *config* can't be restored from the state of *saved*, and boots from its disk."""
    return config.memory_mib > saved.memory_mib


def saved_config(saved: NamedTemplate, config: SandboxConfig) -> SandboxConfig:
    """Return *config* with what decides whether the state of *saved* loads, as it was."""
    return attrs.evolve(config, **{name: getattr(saved, name) for name in _KEPT_FIELDS})


def fit(
    saved: NamedTemplate, image: AnyImage, config: SandboxConfig | None, fields: Container[str]
) -> tuple[AnyImage, SandboxConfig]:
    """Return the image and the configuration of a machine restored from *saved*, or refuse what was asked for.

    *fields* were said one by one. Of a whole configuration nobody knows which were; what is the default was not.
    """
    if image not in (saved.image, DEFAULT_IMAGE):
        raise ValueError(
            f"the saved sandbox {saved.name!r} has the image {saved.image!r}, not {image!r}: leave `image` out"
        )
    if config is None:
        config = SandboxConfig()
    default = SandboxConfig()
    for name in _KEPT_FIELDS:
        if name not in fields and getattr(config, name) == getattr(default, name):
            config = attrs.evolve(config, **{name: getattr(saved, name)})
    wrong = [name for name in _KEPT_FIELDS if getattr(config, name) != getattr(saved, name)]
    if wrong and not boots_anew(saved, config):
        kept, wanted = (" and ".join(f"{name}={getattr(one, name)!r}" for name in wrong) for one in (saved, config))
        raise ValueError(
            f"the saved sandbox {saved.name!r} has {kept}, not {wanted}: its state fits no other machine, so leave them out. "
            f"With a `memory_mib` of more than {saved.memory_mib} it boots from its disk, and keeps files but no variables and processes"
        )
    if config.warmup:
        raise ValueError(
            f"`SandboxConfig.warmup` does not run in a saved sandbox, and {saved.name!r} is one: leave it out"
        )
    return saved.image, config
