"""Archives of images: a tar file with an index in front, of which nothing is believed when it is read.

    index.json             the manifests of all layers, the lowest first, the names of the locks, and those that a container image is known by
    0/image.qcow2 ...      their disks, in that order
    locks/NAME ...         what was chosen for requirements, so that nobody has to choose again

Only the 512 bytes of a member's header are read as tar has it: a plain file, of the very name and size that the index says. Tar's extensions (long names,
sparse files, links, attributes) are refused, and so is what comes behind the end.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import BinaryIO, Final, cast, final

import attrs

from .._oci_reference import parse_oci
from .._stored_json import Fields, parse_json
from ..constants import IMAGE_DISK_MIB
from ._choices import choices_of
from ._entry import below_of, container_facts, is_container, mapping_of
from ._manifest import LONGEST_MANIFEST, Manifest
from ._stored import IMAGE_NAME
from .oci import LARGEST_DISK, container_name

#: Changes with whatever an archive means.
_FORMAT: Final = 1
_INDEX: Final = "index.json"
_BLOCK: Final = 512
#: What tar pads a file to.
_RECORD: Final = 20 * _BLOCK
#: Of the index: a manifest has some ten thousand bytes.
_LONGEST_INDEX: Final = 16 * 2**20
#: A disk of QEMU's that has fewer is no problem; nobody's image has so many steps.
_MOST_LAYERS: Final = 128
#: Of a lock of a thousand packages there are 2 MB.
_LONGEST_LOCK: Final = 32 * 2**20
#: Of one layer: as large as the disk of an image can become, and then some.
_LARGEST_LAYER: Final = 64 * 2**30

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._+-]{0,99}")
_DIGEST: Final = re.compile("[0-9a-f]{64}")
#: Names and versions of packages, which go to uv as lines of text.
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:~!_-]{0,199}")
_LONGEST_STEP: Final = 10_000
#: Of what a manifest says, levels within each other.
_DEEPEST: Final = 8
#: What only the manifest of a container image says.
_OF_CONTAINERS: Final = {"container", "settings"}
#: Names that one container image is known by.
MOST_REFERENCES: Final = 100


@final
@attrs.frozen
class ArchivedLayer:
    """A layer in an archive, or the image below all layers."""

    manifest: Manifest
    offset: int
    """Where its disk begins in the file."""

    @property
    def size(self) -> int:
        """Of its disk, in bytes."""
        return self.manifest.files[IMAGE_NAME].size

    @property
    def content(self) -> str:
        """The digest of its disk."""
        return self.manifest.files[IMAGE_NAME].sha256


@final
@attrs.frozen
class Archive:
    """What is in an archive. Made by `read_archive`."""

    layers: tuple[ArchivedLayer, ...]
    """The lowest first."""
    locks: Mapping[str, str] = attrs.field(repr=False)
    """Texts by names."""
    references: tuple[str, ...] = ()
    """Names that the container image below all layers is known by."""


def archive_parts(
    manifests: Sequence[Manifest], locks: Mapping[str, str], references: Sequence[str] = ()
) -> Generator[bytes | int]:
    """Yield an archive in pieces: bytes to write, or the number of the layer whose disk comes here."""
    index = {
        "format": _FORMAT,
        "layers": [json.loads(each.to_json()) for each in manifests],
        "locks": list(locks),
        "references": list(references),
    }
    yield from _small(_INDEX, json.dumps(index, indent=1).encode())
    for number, manifest in enumerate(manifests):
        size = manifest.files[IMAGE_NAME].size
        yield _header(_disk(number), size)
        yield number
        yield bytes(-size % _BLOCK)
    for name, text in locks.items():
        yield from _small(f"locks/{name}", text.encode())
    yield bytes(2 * _BLOCK)


def _small(name: str, data: bytes) -> Generator[bytes]:
    yield _header(name, len(data)) + data + bytes(-len(data) % _BLOCK)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)  # which writes sizes of more than 8 GiB as well


def _disk(number: int) -> str:
    return f"{number}/{IMAGE_NAME}"


def read_archive(file: BinaryIO) -> Archive:
    """Read all of an archive but the disks, which are skipped; whether those are what the index says is for others to find out.

    Args:
      file: Open for reading, and one that can be sought.

    Raises:
      ValueError: if it is no archive, or has something in it that none of ours has.
      OSError: if it can't be read.

    """
    index = Fields(parse_json(_read_small(file, _INDEX, _LONGEST_INDEX)))
    index.check_format(_FORMAT)
    manifests = [Manifest.from_value(each) for each in index.items("layers", _MOST_LAYERS)]
    check_chain(manifests)
    references = index.items("references", MOST_REFERENCES) if "references" in index.names() else []
    check_references(manifests[0], references)
    layers: list[ArchivedLayer] = []
    for number, manifest in enumerate(manifests):
        size = _read_header(file, _disk(number))
        if size != manifest.files[IMAGE_NAME].size:
            raise ValueError(f"{_disk(number)} is not as long as it should be")
        layers.append(ArchivedLayer(manifest, file.tell()))
        file.seek(size + -size % _BLOCK, 1)
    locks: dict[str, str] = {}
    wanted = {name for manifest in manifests for name in choices_of(manifest)}
    for name in index.items("locks", _MOST_LAYERS):
        if not isinstance(name, str) or name in locks or name not in wanted:
            raise ValueError(f"it has a lock that no layer needs: {name!r:.80}")
        locks[name] = _read_small(file, f"locks/{name}", _LONGEST_LOCK).decode()
    end = file.read(_RECORD + 1)
    if len(end) < 2 * _BLOCK or len(end) > _RECORD or any(end):
        raise ValueError("it is truncated, or something comes behind its end")
    return Archive(tuple(layers), locks, tuple(cast("list[str]", references)))


def _read_small(file: BinaryIO, name: str, longest: int) -> bytes:
    size = _read_header(file, name)
    if size > longest:
        raise ValueError(f"{name} has more than {longest} bytes")
    data = file.read(size + -size % _BLOCK)
    if len(data) < size:
        raise ValueError("it is truncated")
    return data[:size]


def _read_header(file: BinaryIO, name: str) -> int:
    """Read the header of a member, and return the member's size."""
    try:
        info = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
    except tarfile.HeaderError as exc:
        raise ValueError(f"it has no {name} where it should be ({exc})") from exc
    if info.type != tarfile.REGTYPE or info.name != name or info.linkname or info.size < 0:
        raise ValueError(f"it has {info.name!r:.80} where {name} should be, or {name} is no plain file")
    return info.size


def check_chain(manifests: Sequence[Manifest]) -> None:
    """Make sure that each layer is one on the layer before it, and says nothing that could be harmful anywhere else.

    What a manifest says is shown on terminals, made part of paths, and given to programs of the host.
    """
    if not manifests:
        raise ValueError("it has no layers")
    for below, manifest in zip((None, *manifests), manifests, strict=False):
        if not _NAME.fullmatch(manifest.name) or not _DIGEST.fullmatch(manifest.digest):
            raise ValueError(
                f"it has a layer with the name {manifest.name!r:.80} and the digest {manifest.digest!r:.80}"
            )
        if set(manifest.files) != {IMAGE_NAME}:
            raise ValueError(f"{manifest.name} has other files than {IMAGE_NAME}")
        (disk,) = manifest.files.values()
        if disk.size > _LARGEST_LAYER or not _DIGEST.fullmatch(disk.sha256):
            raise ValueError(f"the disk of {manifest.name} is too large, or has no digest")
        stands_on = (
            {"name": below.name, "content": below.files[IMAGE_NAME].sha256} if below else {"name": "", "content": ""}
        )
        if below_of(manifest) != stands_on:
            raise ValueError(f"{manifest.name} does not stand on what comes before it")
        step = manifest.details.get("step", "")
        if not isinstance(step, str) or len(step) > _LONGEST_STEP or not step.isprintable():
            raise ValueError(f"{manifest.name} says in a way that can't be shown what it adds")
        for name, version in mapping_of(manifest, "packages").items():
            if not _WORD.fullmatch(name) or not isinstance(version, str) or not _WORD.fullmatch(version):
                raise ValueError(f"{manifest.name} has a package {name!r:.80} of the version {version!r:.80}")
        if not _is_flat(manifest.details, _DEEPEST):
            raise ValueError(f"{manifest.name} says too much of itself")
        if len(manifest.to_json()) > LONGEST_MANIFEST:
            raise ValueError(f"{manifest.name} says more of itself than is ever read")
        if type(manifest.details.get("virtual_size")) is not int:
            raise ValueError(f"{manifest.name} does not say how large its disk is")
        if below and _OF_CONTAINERS & manifest.details.keys():
            raise ValueError(f"{manifest.name} is a container image, and stands on another image")
    most = IMAGE_DISK_MIB * 2**20
    if is_container(manifests[0]):
        _check_container(manifests[0])
        most = LARGEST_DISK
    for manifest in manifests:
        if cast("int", manifest.details["virtual_size"]) > most:
            raise ValueError(f"{manifest.name} is a disk of more than {most} bytes")


def _check_container(manifest: Manifest) -> None:
    if manifest.name != container_name(manifest.digest):
        raise ValueError(f"{manifest.name} is not the name of that container image")
    if not _DIGEST.fullmatch(str(manifest.details["container"])):
        raise ValueError(f"{manifest.name} does not say which container image it is")
    _check_reference(manifest.details.get("step"))
    container_facts(manifest)


def check_references(base: Manifest, references: Sequence[object]) -> None:
    """Make sure that the names which *base* is to be known by are those of container images, and that it is one.

    Raises:
      ValueError: if not.

    """
    if references and not is_container(base):
        raise ValueError(f"{base.name} is no container image, and has names of one")
    if len(references) > MOST_REFERENCES:
        raise ValueError(f"{base.name} has more than {MOST_REFERENCES} names")
    for reference in references:
        _check_reference(reference)


def _check_reference(reference: object) -> None:
    # A path that is not absolute would be another one on each machine.
    if not isinstance(reference, str) or str(parse_oci(reference)) != reference:
        raise ValueError(f"it has a container image of the name {reference!r:.80}")


def _is_flat(value: object, deepest: int) -> bool:
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, object]", value).values()
    elif isinstance(value, list):
        inner = cast("list[object]", value)
    else:
        return True
    return deepest > 0 and all(_is_flat(each, deepest - 1) for each in inner)
