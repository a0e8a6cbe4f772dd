"""Names of container images: where one is, and which of several is meant."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, final

import attrs

_REGISTRY: Final = "docker"
#: What has one image, or several of which a tag says which one is meant.
_LOCAL: Final = ("docker-archive", "oci", "oci-archive")
_TRANSPORTS: Final = (_REGISTRY, *_LOCAL)
_LONGEST: Final = 4096
#: As registries have them; the registry itself checks the rest. Names have no credentials.
_IN_REGISTRY: Final = re.compile(r"//[A-Za-z0-9][\w.:/\[\]-]*(?:@sha256:[0-9a-f]{64})?", re.ASCII)


@final
@attrs.frozen
class OciReference:
    """Where a container image is."""

    transport: str
    location: str
    """What is after the first colon. The path in it is absolute."""

    def __str__(self) -> str:
        return f"{self.transport}:{self.location}"

    @property
    def path(self) -> Path | None:
        """The file or directory that it is in; None if it is in a registry."""
        if self.transport == _REGISTRY:
            return None
        return Path(self.location.partition(":")[0])


def is_oci(name: str) -> bool:
    """Tell whether an image's name is meant for one of a container's."""
    return name.partition(":")[0] in _TRANSPORTS and ":" in name


def parse_oci(name: object) -> OciReference:
    """Read the name of a container image; paths become absolute.

    Raises:
      TypeError, ValueError: if it is none.

    """
    if type(name) is not str:
        raise TypeError(f"a container image's `reference` must be str, not {type(name).__name__}")
    transport, colon, location = name.partition(":")
    if transport not in _TRANSPORTS or not colon:
        raise ValueError(
            f"{name!r:.200} names no container image: begin with docker:// (a registry), oci:, oci-archive: or docker-archive:"
        )
    if len(name) > _LONGEST or not name.isprintable():
        raise ValueError(
            f"the name of a container image must be at most {_LONGEST} printable characters: {name!r:.200}"
        )
    if transport == _REGISTRY:
        if not _IN_REGISTRY.fullmatch(location):
            raise ValueError(f"{name!r:.200} is no image of a registry; write it as in 'docker://debian:12-slim'")
        return OciReference(transport, location)
    path, colon, tag = location.partition(":")
    if not path:
        raise ValueError(f"{name!r:.200} has no path; write it as in '{transport}:app'")
    return OciReference(transport, f"{os.path.abspath(path)}{colon}{tag}")
