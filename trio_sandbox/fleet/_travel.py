"""What of a program's configuration goes to its nodes, and what can't."""

from __future__ import annotations

import attrs

from .._config import HostConfig, SandboxConfig
from .._image import AnyImage, Image
from .._image_steps import AptStep, FilesStep, ScriptStep
from .._network import Network
from .._oci_reference import is_oci, parse_oci
from ..network import find_proxy, read_trust


def check_travels(image: AnyImage) -> AnyImage:
    """Return *image*, if nodes can have it.

    Raises:
      ValueError: if it is an archive of this machine, or one of its steps needs a function of this program.

    """
    name = image.name if isinstance(image, Image) else image
    if is_oci(name) and parse_oci(name).path is not None:
        raise ValueError(
            f"{name!r} can't be used on a fleet: its nodes do not have the files of this machine. Nothing was started; push the "
            "image to a registry that the nodes reach, and name that: docker://NAME:TAG"
        )
    for step in image.steps if isinstance(image, Image) else ():
        rules = step.network.rules if isinstance(step, (AptStep, ScriptStep)) else ()
        if own := [rule.host for rule in rules if callable(rule.to)]:
            raise ValueError(
                f"the step {str(step)!r:.100} of an image can't be made on a fleet: NetworkRule({own[0]!r}) has a function of this "
                "program as `to`, and a node builds the image. Nothing was started; give an address that the nodes reach"
            )
    return image


def sandbox_there(config: SandboxConfig) -> SandboxConfig:
    """Return what a node needs to know of it: connections are made, and idleness is noticed, by the program."""
    return attrs.evolve(config, network=Network.none(), hibernate_after=None)


def host_there(config: HostConfig) -> HostConfig:
    """Return what the host of a node is to be like: its progress is told by other means, and of `HostConfig.warm` it has what it will be asked for.

    Raises:
      ValueError, OSError: if `HostConfig.proxy`, `HostConfig.ca_certificates` or an image of `HostConfig.warm` can't be used.

    """
    find_proxy(config.proxy)
    read_trust(config.ca_certificates)
    warm: dict[AnyImage | tuple[AnyImage, SandboxConfig], int] = {}
    for (image, sandbox), count in config.warm.items():
        check_travels(image)
        if isinstance(image, Image) and any(isinstance(step, FilesStep) for step in image.steps):
            raise ValueError(
                f"`warm` has {image!r:.200}, which nodes can't keep ready: they do not have the files of this machine. Nothing was "
                "started; leave it out"
            )
        key = image, sandbox_there(sandbox)
        warm[key] = warm.get(key, 0) + count
    return attrs.evolve(config, progress=HostConfig().progress, warm=warm)
