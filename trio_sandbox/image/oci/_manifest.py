"""What a container image says of itself: its manifest and its configuration, as they are in the directory that skopeo fills.

Each has a digest by which somebody else names it: the manifest names the configuration and the layers as they are stored, the configuration
names the layers as they are unpacked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast, final

import attrs

from ..._errors import OciError
from ..._stored_json import Fields, parse_json
from .._stored import bounded_labels, check_command

#: Bytes of a manifest, and of a configuration. Registries take manifests of 4 MiB.
_LONGEST: Final = 4 * 2**20
_MOST_LAYERS: Final = 256
_DIGEST: Final = re.compile("sha256:([0-9a-f]{64})")
_VARIABLE: Final = re.compile("[A-Za-z_][A-Za-z0-9_.-]*")
#: Bytes of all variables, each with its name and the two characters beside them.
_MOST_VARIABLES: Final = 256 * 2**10
#: The guest's platform.
_PLATFORM: Final = ("linux", "amd64")


@final
@attrs.frozen
class Blob:
    """A file of an image."""

    digest: str
    """SHA-256, in hexadecimal digits."""
    size: int


@final
@attrs.frozen
class Layer:
    """One layer."""

    blob: Blob
    """As it is stored, compressed or not."""
    diff_id: str
    """The digest of what it unpacks to."""


@final
@attrs.frozen(kw_only=True)
class Configuration:
    """What the image says of how its program is run."""

    variables: Mapping[str, str]
    user: str
    """A name or a number, perhaps with a group after a colon; "" for root."""
    directory: str
    """Where programs start; "" for the root directory."""
    command: tuple[str, ...]
    """The program and its arguments; empty if there is none."""
    labels: Mapping[str, str]


@final
@attrs.frozen(kw_only=True)
class ContainerImage:
    """One image, as it was fetched into a directory."""

    digest: str
    """Of the manifest: it decides all else."""
    layers: tuple[Layer, ...]
    configuration: Configuration


def read_container_image(directory: Path) -> ContainerImage:
    """Read manifest and configuration of what skopeo has put into *directory*. Blocks: call it in a thread.

    Raises:
      OciError: if they are damaged, not what they are named, or for another platform.

    """
    try:
        return parse_container_image(
            _read_file(directory / "manifest.json"), lambda digest: _read_file(directory / digest)
        )
    except (OSError, ValueError) as exc:
        raise OciError(f"the container image is damaged, or none that can be run: {exc}") from exc


def parse_container_image(text: bytes, read: Callable[[str], bytes]) -> ContainerImage:
    """Read a manifest.

    Args:
      text: What it says.
      read: Returns the configuration, which the manifest names by its digest.

    Raises:
      ValueError: as `read_container_image` raises `OciError`.

    """
    manifest = Fields(parse_json(text))
    if manifest.number("schemaVersion") != 2:
        raise ValueError("its manifest is of Docker's first format, which has no digests of what is in its layers")
    blobs = [_blob(Fields(each)) for each in _list(manifest.values().get("layers"))]
    named = _blob(manifest.fields("config"))
    configuration = read(named.digest)
    check_digest("its configuration", named.digest, hashlib.sha256(configuration).hexdigest())
    value = Fields(parse_json(configuration))
    platform = value.text("os"), value.text("architecture")
    if platform != _PLATFORM:
        raise ValueError(f"it is for {platform[0]:.40} on {platform[1]:.40}, and guests are {' on '.join(_PLATFORM)}")
    diff_ids = [_digest(each) for each in _list(value.fields("rootfs").values().get("diff_ids"))]
    if len(diff_ids) != len(blobs) or len(blobs) > _MOST_LAYERS:
        raise ValueError(f"it has {len(blobs)} layers by its manifest, and {len(diff_ids)} by its configuration")
    return ContainerImage(
        digest=hashlib.sha256(text).hexdigest(),
        layers=tuple(Layer(blob, diff_id) for blob, diff_id in zip(blobs, diff_ids, strict=True)),
        configuration=_configuration(value.values().get("config") or {}),
    )


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"a file that describes it has more than {_LONGEST} bytes")
    return data


def check_digest(what: str, wanted: str, found: str) -> None:
    """Refuse what is not what it was named.

    Raises:
      ValueError: which says so.

    """
    if wanted != found:
        raise ValueError(f"{what} should have the digest sha256:{wanted} and has sha256:{found}")


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"a list was expected, not {value!r:.80}")  # noqa: TRY004  damage is one error
    return cast("list[object]", value)


def _digest(value: object) -> str:
    match = _DIGEST.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"a digest (SHA-256) was expected, not {value!r:.100}")
    return match[1]


def _blob(fields: Fields) -> Blob:
    return Blob(_digest(fields.values().get("digest")), fields.number("size"))


def _configuration(value: object) -> Configuration:
    values = Fields(value).values()
    variables: dict[str, str] = {}
    for each in _texts(values.get("Env")):
        name, equals, text = each.partition("=")
        # What is no variable of a shell's, or has several lines, can't be written to /etc/environment.
        if equals and _VARIABLE.fullmatch(name) and len(text.splitlines()) < 2:
            variables[name] = text
    command = (*_texts(values.get("Entrypoint")), *_texts(values.get("Cmd")))
    check_command(command)
    if sum(len(f"{name}={text}\n".encode()) for name, text in variables.items()) > _MOST_VARIABLES:
        raise ValueError("its variables are longer than any program takes")
    return Configuration(
        variables=variables,
        user=_text(values.get("User")),
        directory=_text(values.get("WorkingDir")),
        command=command,
        labels=_labels(Fields(values.get("Labels") or {})),
    )


def _labels(fields: Fields) -> Mapping[str, str]:
    return bounded_labels({name: fields.text(name) for name in fields.names()})


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(each) for each in _list(value or []))


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"a text was expected, not {value!r:.80}")
    value.encode()  # half of a character beyond U+FFFF is none
    return value
