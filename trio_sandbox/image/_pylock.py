"""Locks of packages (PEP 751): what is in one, and whether installing it needs nothing but wheels with digests."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import tomllib
from collections.abc import Mapping, Set as AbstractSet
from pathlib import Path
from typing import Any, Final, cast, final

import attrs

from .._errors import PackagesError, WheelMissingError

#: Nobody's lock has more.
_MOST_PACKAGES: Final = 10_000
#: Of a package, and its version (PEP 508, PEP 440): they go to uv as a line of a file, in which more would be an option of uv's.
_NAME: Final = re.compile("[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_VERSION: Final = re.compile("([A-Za-z0-9][A-Za-z0-9.!+_-]*)?")
_BARE_KEY: Final = re.compile("[A-Za-z0-9_-]+")


@final
@attrs.frozen
class Pin:
    """A package as it was chosen."""

    name: str
    """In its normal form."""
    version: str


@final
@attrs.frozen
class Lock:
    """A lock that was looked at. Made by `parse_lock`."""

    text: str = attrs.field(repr=False)
    """As TOML. Equal locks have equal texts."""
    pins: tuple[Pin, ...]

    def without(self, installed: AbstractSet[Pin]) -> Lock:
        """Return what is still to be installed where *installed* is there."""
        value = tomllib.loads(self.text)
        value["packages"] = [each for each in value["packages"] if _pin(each) not in installed]
        return _lock(value)

    def only(self, digests: AbstractSet[str]) -> Lock:
        """Return it with no other wheels than those of *digests*.

        Raises:
          PackagesError: if a package has none of them.

        """
        value = tomllib.loads(self.text)
        for package in value["packages"]:
            package["wheels"] = [each for each in package.get("wheels", ()) if each["hashes"]["sha256"] in digests]
            if not package["wheels"]:
                pin = _pin(package)
                raise PackagesError(f"{pin.name} {pin.version} is in the index with other files than those of the lock")
        return _lock(value)


def parse_lock(text: str, directory: Path | None = None) -> Lock:
    """Read a lock.

    Args:
      text: The lock's.
      directory: What paths in it are relative to; None: they must be absolute.

    Raises:
      WheelMissingError: if a package is to be built from source.
      PackagesError: if it is no lock, or has a wheel without a digest.

    """
    try:
        value: Any = tomllib.loads(text)
        version = str(value["lock-version"])
        packages = cast("list[Any]", value["packages"])
        if version.partition(".")[0] != "1" or not isinstance(packages, list) or len(packages) > _MOST_PACKAGES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"a lock of version {version!r:.20}")
        for package in packages:
            _check_package(package, directory)
        # The Python of the image is what counts, and uv would compare with the host's.
        value.pop("requires-python", None)
        return _lock(value)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise PackagesError(f"it is not a lock of packages (pylock.toml, PEP 751): {exc!r:.200}") from exc


def _lock(value: dict[str, Any]) -> Lock:
    text = "".join(f"{_key(name)} = {_toml(part)}\n" for name, part in value.items())
    return Lock(text, tuple(_pin(package) for package in value["packages"]))


def _pin(package: Mapping[str, Any]) -> Pin:
    return Pin(re.sub(r"[-_.]+", "-", str(package["name"])).lower(), str(package.get("version", "")))


def _check_package(package: Mapping[str, Any], directory: Path | None) -> None:
    """Make sure that a package is wheels with digests, so that nothing of it is ever built; make paths absolute."""
    pin = _pin(package)
    if not _NAME.fullmatch(pin.name) or not _VERSION.fullmatch(pin.version):
        raise PackagesError(
            f"the lock has a package {pin.name!r:.100} of the version {pin.version!r:.100}, which can't be one"
        )
    archive = package.get("archive")
    wheels = [archive] if archive and _is_wheel(archive) else package.get("wheels")
    if not wheels or "directory" in package or "vcs" in package:
        raise missing_wheel(pin.name, pin.version)
    for wheel in wheels:
        if not _is_wheel(wheel):
            raise missing_wheel(pin.name, pin.version)
        if not re.fullmatch("[0-9a-f]{64}", str(wheel.get("hashes", {}).get("sha256", ""))):
            raise PackagesError(f"the lock has no SHA-256 digest of a wheel of {pin.name} {pin.version}: make it anew")
        if "path" in wheel:
            path = Path(wheel["path"])
            if directory is None and not path.is_absolute():
                raise PackagesError(
                    f"the lock has a relative path for {pin.name} {pin.version}, {str(path)!r}: make it absolute"
                )
            wheel["path"] = os.path.normpath((directory or path) / path)


def _is_wheel(wheel: Mapping[str, Any]) -> bool:
    location = str(wheel.get("url") or wheel.get("path") or "")
    return location.partition("#")[0].partition("?")[0].endswith(".whl")


def missing_wheel(package: str, version: str, words: str = "") -> WheelMissingError:
    """Return the error of a package that has no wheel; *words* are uv's."""
    what = f"{package}=={version}" if version else package
    message = (
        f"{what} has no wheel that fits the image, and building one would run the package's code on this host. "
        f'Build it inside a virtual machine: Image(...).script("pip install {what}", network=...), or choose another version'
    )
    return WheelMissingError(f"{message}\n{words}" if words else message, package=package, version=version)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)


def _toml(value: object) -> str:
    """Write a value of TOML; its strings are written as JSON's are."""
    match value:
        case bool() | str():
            return json.dumps(value)
        case int() | float():
            return repr(value)
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat()
        case list():
            return f"[{', '.join(map(_toml, cast('list[object]', value)))}]"
        case dict():
            items = cast("dict[str, object]", value).items()
            return f"{{{', '.join(f'{_key(name)} = {_toml(part)}' for name, part in items)}}}"
        case _:
            raise TypeError(f"{value!r:.80} can't be written as TOML")
