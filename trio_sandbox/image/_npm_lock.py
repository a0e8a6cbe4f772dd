"""Locks of npm's (package-lock.json): what is in one, and whether installing it needs nothing but archives of the registry with digests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, cast, final

import attrs

from .._errors import PackagesError
from .._requirements import NPM_NAME

_MOST_PACKAGES: Final = 10_000
#: A package's place: in the directory at the top, or in that of another package.
_PLACE: Final = re.compile(rf"node_modules/{NPM_NAME}(?:/node_modules/{NPM_NAME}){{0,31}}")
_NAME: Final = re.compile(NPM_NAME)
_VERSION: Final = re.compile(r"[0-9][0-9A-Za-z.+-]{0,200}")
_SHA512: Final = re.compile(r"sha512-([A-Za-z0-9+/]{86}==)")
_PROGRAM: Final = re.compile(r"[A-Za-z0-9._~@-]+")
#: What a package may say that it is for, and what images are; besides, they have a C library.
_PLATFORM: Final = {"os": "linux", "cpu": "x64"}


@final
@attrs.frozen(order=True)
class NpmPackage:
    """A package at its place."""

    place: str
    """Relative to /."""
    name: str
    version: str
    sha512: str = attrs.field(repr=False)
    """The digest of its archive, in Base64."""
    programs: tuple[tuple[str, str], ...] = ()
    """Files of it, by what they are called as programs."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@final
@attrs.frozen
class NpmLock:
    """A lock that was looked at. Made by `parse_npm_lock`."""

    text: str = attrs.field(repr=False)
    """As JSON. Equal locks have equal texts."""
    packages: tuple[NpmPackage, ...]
    """Those for Linux on x86_64; a package is behind the one whose directory it is in."""
    wanted: tuple[str, ...]
    """The names that were asked for."""

    def change(self, earlier: NpmLock | None) -> tuple[tuple[NpmPackage, ...], tuple[str, ...]]:
        """Return what is to be installed where *earlier* is there, and the places that have to be cleared before."""
        if earlier is None:
            return self.packages, ()
        ours = set(self.packages)
        cleared = tuple(package.place for package in earlier.packages if package not in ours)
        # Programs of what was there for others only could not be found by name.
        asked = {f"node_modules/{name}" for name in self.wanted if name not in earlier.wanted}
        there = set(earlier.packages)
        missing = [
            package
            for package in self.packages
            if package not in there
            or package.place in asked
            or any(package.place.startswith(f"{place}/") for place in cleared)
        ]
        return tuple(missing), cleared

    def check_kept(self, earlier: NpmLock) -> None:
        """Make sure that what was asked for earlier is what it was.

        Raises:
          PackagesError: if not.

        """
        ours = {package.place: package for package in self.packages}
        for package in earlier.packages:
            now = ours.get(package.place)
            if package.place.removeprefix("node_modules/") in earlier.wanted and now != package:
                raise PackagesError(
                    f"an earlier step of the image has {package}, and this one would make that "
                    f"{'nothing' if now is None else now}: ask for all packages in one step"
                )


def parse_npm_lock(text: str, libc: str = "glibc") -> NpmLock:
    """Read a lock.

    Args:
      text: The lock's.
      libc: The name of the C library of the image that it is for.

    Raises:
      PackagesError: if it is no lock, or has what does not come from a registry, has no digest, or can't run in an image.

    """
    try:
        value: Any = json.loads(text)
        entries = cast("dict[str, Any]", value["packages"])
        if len(entries) > _MOST_PACKAGES:
            raise ValueError(f"it has {len(entries)} packages")
        wanted = tuple(sorted(entries[""].get("dependencies", {})))
        packages: list[NpmPackage] = []
        skipped: list[str] = []
        for place in sorted(entries):
            entry = entries[place]
            if not place or entry.get("inBundle") or any(place.startswith(f"{each}/") for each in skipped):
                continue
            if _is_for_images(place, entry, libc):
                packages.append(_package(place, entry))
            else:
                skipped.append(place)
        return NpmLock(json.dumps(value, sort_keys=True), tuple(packages), wanted)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as exc:
        raise PackagesError(f"it is no lock of npm's (package-lock.json, version 2 or 3): {exc!r:.200}") from exc


def _is_for_images(place: str, entry: Mapping[str, Any], libc: str) -> bool:
    for kind, ours in {**_PLATFORM, "libc": libc}.items():
        named: object = entry.get(kind, [])
        listed = [str(each) for each in (cast("list[object]", named) if isinstance(named, list) else [named])]
        allowed = [each for each in listed if not each.startswith("!")]
        if f"!{ours}" in listed or (allowed and ours not in allowed and "any" not in allowed):
            if entry.get("optional"):
                return False
            raise PackagesError(
                f"{_describe(place, entry)} is for {kind} {', '.join(listed):.100} only, and the image is {ours}: "
                "choose another package or version"
            )
    return True


def _package(place: str, entry: Mapping[str, Any]) -> NpmPackage:
    name, version = str(entry.get("name", _name(place))), str(entry.get("version", ""))
    if not _PLACE.fullmatch(place) or not _NAME.fullmatch(name) or not _VERSION.fullmatch(version or "0"):
        raise ValueError(f"a package at {place!r:.100}, {name!r:.100}, version {version!r:.50}")
    location = str(entry.get("resolved", "https:"))
    if entry.get("link") or not version or not location.startswith(("https:", "http:")):
        raise PackagesError(
            f"{_describe(place, entry)} does not come from a registry, but from {location!r:.200}, which would run programs on "
            f"this host. {_WAY_OUT}"
        )
    match = _SHA512.search(str(entry.get("integrity", "")))
    if match is None:
        raise PackagesError(
            f"the registry gives no SHA-512 digest of {_describe(place, entry)}, so that nobody can tell whether it is the "
            f"right one: choose another version. {_WAY_OUT}"
        )
    programs = entry.get("bin", {})
    return NpmPackage(
        place=place,
        name=name,
        version=version,
        sha512=match[1],
        programs=tuple(sorted((str(name), str(path)) for name, path in programs.items() if _PROGRAM.fullmatch(name))),
    )


#: For whoever wants it all the same.
_WAY_OUT: Final = (
    'Install it inside a virtual machine: Image(...).apt("npm").script("npm install --prefix / ...", network=...)'
)


def _name(place: str) -> str:
    return place.rpartition("node_modules/")[2]


def _describe(place: str, entry: Mapping[str, Any]) -> str:
    return f"{_name(place):.100}@{entry.get('version', '?')!s:.50}"
