"""Entries of the store: what their manifests say, what they stand on, what they take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

import trio

from .._errors import ImageError
from ._manifest import MANIFEST_NAME, Manifest, check_files, corrupt, read_manifest
from ._stored import IMAGE_NAME, BuiltImage, ImageSettings
from .oci import CONTAINER_LANGUAGES, container_digest

#: How much of a digest is in the name of a directory, and the least that says which one is meant.
DIGEST_CHARACTERS: Final = 16
_SHORTEST_DIGEST: Final = 6
#: Those of packages.
_LANGUAGES: Final = ("python", "javascript")
ENTRY_NAME: Final = re.compile(rf".+-[0-9a-f]{{{DIGEST_CHARACTERS}}}")

#: Hashing a whole image takes a while; it must not keep others from the threads that start processes.
_reading_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trio_sandbox.image.reading")


def entry_name(name: str, digest: str) -> str:
    """Return what the directory of an entry is called."""
    return f"{name}-{digest[:DIGEST_CHARACTERS]}"


def name_of(entry: Path) -> str:
    """Return the name that a directory of the store was made for."""
    return entry.name.rpartition("-")[0]


def reading() -> trio.CapacityLimiter:
    """Return what bounds how many threads read whole images."""
    try:
        return _reading_limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(2)
        _reading_limiter.set(limiter)
        return limiter


def verify(entry: Path) -> Manifest:
    manifest = read_manifest(entry)
    check_files(entry, manifest)
    return manifest


def try_to_read(entry: Path) -> Manifest:
    """Return the manifest of *entry*; one that says nothing if it can't be read."""
    try:
        return read_manifest(entry)
    except ImageError:
        return Manifest(name="", digest="", created=0, files={}, details={})


def is_disk(manifest: Manifest) -> bool:
    return IMAGE_NAME in manifest.files


def is_container(manifest: Manifest) -> bool:
    """Tell whether it is a container image, as this version of the library makes them."""
    return manifest.digest == container_digest(str(manifest.details.get("container")))


def mapping_of(manifest: Manifest, name: str) -> Mapping[str, object]:
    """Return one of the manifest's details, which is a mapping or missing."""
    value = manifest.details.get(name)
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def below_of(manifest: Manifest) -> Mapping[str, str]:
    """Return the name and the content of what a layer stands on; empty texts for what is none."""
    values = mapping_of(manifest, "below")
    return {key: str(values.get(key, "")) for key in ("name", "content")}


def standing(entry: Path, manifest: Manifest, languages: tuple[str, ...] | None = None) -> BuiltImage:
    """Return the image whose disk stands on no other; *languages* None: the manifest says them.

    Raises:
      ImageCorruptError: if it does not say them as it should.

    """
    path = entry / IMAGE_NAME
    settings = None
    if languages is None:
        try:
            settings, languages = container_facts(manifest)
        except ValueError as exc:
            raise corrupt(entry, manifest.name, f"{MANIFEST_NAME}: {exc}") from exc
    virtual_size = manifest.details.get("virtual_size")
    return BuiltImage(
        name=manifest.name,
        digest=manifest.digest,
        path=path,
        size_bytes=disk_usage(path),
        virtual_size=virtual_size if isinstance(virtual_size, int) else 0,
        manifest=manifest,
        languages=languages,
        settings=settings,
        system_packages=mapping_of(manifest, "packages"),
    )


def container_facts(manifest: Manifest) -> tuple[ImageSettings, tuple[str, ...]]:
    """Return how programs are started in a container image, and the languages it has.

    Raises:
      ValueError: if its manifest does not say them as it should.

    """
    settings = ImageSettings.from_value(manifest.details.get("settings"))
    languages = manifest.details.get("languages")
    if not isinstance(languages, list):
        raise ValueError(f"it is damaged: 'languages' is {languages!r:.80}")  # noqa: TRY004  damage is one error
    known = [each for each in CONTAINER_LANGUAGES if each in languages]
    if len(known) != len(cast("list[object]", languages)):
        raise ValueError(f"it is damaged: there are no such languages: {languages!r:.80}")
    return settings, tuple(cast("list[str]", languages))


def _languages(manifest: Manifest) -> list[str]:
    """Return the languages that a layer was made for, which a step below it may have brought."""
    value = manifest.details.get("languages")
    return [each for each in _LANGUAGES if isinstance(value, list) and each in value]


def layered(below: BuiltImage, entry: Path, manifest: Manifest) -> BuiltImage:
    path = entry / IMAGE_NAME
    return BuiltImage(
        name=manifest.name,
        digest=manifest.digest,
        path=below.path,
        layers=(*below.layers, path),
        size_bytes=below.size_bytes + disk_usage(path),
        virtual_size=below.virtual_size,
        manifest=manifest,
        languages=(*below.languages, *(each for each in _languages(manifest) if each not in below.languages)),
        settings=below.settings,
        system_packages=below.system_packages,
        packages={**below.packages, **{name: str(each) for name, each in mapping_of(manifest, "packages").items()}},
        npm_lock=str(manifest.details.get("npm_lock", below.npm_lock)),
    )


def matches(entry: Path, name_or_digest: str) -> bool:
    name, _, digest = entry.name.rpartition("-")
    if name_or_digest == name:
        return True
    return len(name_or_digest) >= _SHORTEST_DIGEST and digest.startswith(name_or_digest[:DIGEST_CHARACTERS])


def disk_usage(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(disk_usage(child) for child in path.iterdir())
    return path.lstat().st_blocks * 512
