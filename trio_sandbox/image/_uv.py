"""Packages of Python's by uv: chosen, fetched and unpacked on the host, without running anything of theirs.

uv is asked for wheels only (``--only-binary :all:``), and each lock is looked at before it is used. Whose index, proxy, certificates and
credentials count is uv's configuration, which is the user's: its files, but those of a project, and its variables.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from .._errors import PackagesError
from .._image_steps import PackagesStep
from ..qemu import OwnedProcess, remove_tree, run_owned
from ._full_disk import says_full
from ._places import absolute
from ._pylock import Lock, Pin, missing_wheel, parse_lock
from ._target import Target

_REQUIREMENTS, _CONSTRAINTS, _LOCK = "requirements.in", "constraints.txt", "pylock.toml"
#: Variables of uv's that say what there is to choose from; other choices make another lock.
_CHOICE: Final = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_EXTRA_INDEX_URL",
    "UV_NO_INDEX",
    "UV_FIND_LINKS",
    "UV_EXCLUDE_NEWER",
    "UV_PRERELEASE",
    "UV_RESOLUTION",
    "UV_CONFIG_FILE",
    "UV_NO_CONFIG",
)
#: And those that say how to get at it. All others are about environments and builds of the host's.
_ACCESS: Final = (
    "UV_CACHE_DIR",
    "UV_NO_CACHE",
    "UV_OFFLINE",
    "UV_KEYRING_PROVIDER",
    "UV_CREDENTIALS_DIR",
    "UV_NATIVE_TLS",
    "UV_SYSTEM_CERTS",
    "UV_INSECURE_HOST",
    "UV_HTTP",
    "UV_REQUEST_TIMEOUT",
    "UV_CONCURRENT",
)
#: Variables that have, or may have, paths, relative to our directory, and what is between two of them: uv is run in another directory.
_PLACES: Final = {
    **dict.fromkeys(("UV_CACHE_DIR", "UV_CONFIG_FILE", "UV_CREDENTIALS_DIR", "UV_DEFAULT_INDEX", "UV_INDEX_URL"), ""),
    **dict.fromkeys(("SSL_CERT_FILE", "SSL_CLIENT_CERT", "NETRC"), ""),
    **dict.fromkeys(("UV_INDEX", "UV_EXTRA_INDEX_URL"), " "),
    "UV_FIND_LINKS": ",",
    "SSL_CERT_DIR": ":",
}
#: Other variables that would have uv look at another Python.
_OTHER_PYTHONS: Final = ("VIRTUAL_ENV", "CONDA_", "PYTHON")
_OUTPUT_BYTES: Final = 64 * 2**10
#: Lines of uv's that go into an error message.
_LINES, _COLUMNS = 20, 400
_NO_WHEEL: Final = (
    re.compile(r"(?P<package>[\w.-]+)==(?P<version>\S+) has no (?:usable |compatible )?wheels"),
    re.compile(
        r"Wheels are required for `(?P<package>[\w.-]+?)(?:==(?P<version>[^`]+))?` because building from source"
    ),
    re.compile(r"Building source distributions for `(?P<package>[\w.-]+)(?P<version>)` is disabled"),
)
_UNREACHABLE: Final = ("Failed to fetch", "Request failed", "Network connectivity is disabled", "network was disabled")

Report = Callable[[str, float | None], object]


def find_uv() -> str:
    """Return the path of uv.

    Raises:
      ModuleNotFoundError: if the extra ``packages`` is not installed.

    """
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError) as exc:
        raise ModuleNotFoundError(
            "packages of an image need uv, which is not installed: pip install 'trio-sandbox[packages]'", name="uv"
        ) from exc


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for uv, out of ours."""
    kept = {
        name: absolute(name, value, _PLACES)
        for name, value in variables.items()
        if (name.startswith((*_CHOICE, *_ACCESS)) if name.startswith("UV_") else not name.startswith(_OTHER_PYTHONS))
    }
    return {**kept, "UV_PYTHON_DOWNLOADS": "never"}


def choice_of(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return those of our variables that decide what uv chooses."""
    return sorted(
        (name, absolute(name, value, _PLACES)) for name, value in variables.items() if name.startswith(_CHOICE)
    )


def compile_arguments(target: Target, *, constrained: bool, exclude_newer: str | None) -> list[str]:
    """Return uv's arguments to choose packages, in the directory that has the files."""
    return [
        *("pip", "compile", "--quiet", *_common(target), "--no-header", "--no-annotate"),
        *("--format", "pylock.toml", "--output-file", _LOCK),
        *(("--constraints", _CONSTRAINTS) if constrained else ()),
        *(() if exclude_newer is None else ("--exclude-newer", exclude_newer)),
        _REQUIREMENTS,
    ]


def install_arguments(target: Target, tree: Path) -> list[str]:
    """Return uv's arguments to fetch what the lock in its directory names, and unpack it into *tree*."""
    return [
        *("pip", "install", *_common(target), "--no-deps", "--link-mode", "copy", "--preview-features", "pylock"),
        *("--target", os.fspath(tree), "--requirements", _LOCK),
    ]


def _common(target: Target) -> list[str]:
    return [
        *("--no-progress", "--color", "never", "--python", sys.executable),
        *("--python-version", target.python, "--python-platform", target.platform, "--only-binary", ":all:"),
    ]


async def resolve(
    step: PackagesStep, pins: Iterable[Pin], target: Target, directory: Path, environment: Mapping[str, str]
) -> Lock:
    """Choose packages.

    Args:
      step: What is asked for.
      pins: What is there already, and keeps its version.
      target: What for.
      directory: An empty one, for this alone.
      environment: `Runtime.environment`.

    Raises:
      ModuleNotFoundError: if uv is not installed.
      WheelMissingError: if a package has no wheel that fits.
      PackagesError: if there is no such package or version, they contradict each other, or the index can't be reached.

    """
    kept = [f"{pin.name}=={pin.version}" for pin in pins]
    (directory / _REQUIREMENTS).write_text("".join(f"{each}\n" for each in step.requirements), "utf-8")
    (directory / _CONSTRAINTS).write_text("".join(f"{each}\n" for each in kept), "utf-8")
    arguments = compile_arguments(target, constrained=bool(kept), exclude_newer=step.exclude_newer)
    await _run(arguments, directory, environment, kept=kept)
    lock = parse_lock((directory / _LOCK).read_text("utf-8"), directory)
    return lock.only(frozenset(step.digests)) if step.digests else lock


async def unpack(
    lock: Lock, target: Target, directory: Path, tree: Path, environment: Mapping[str, str], report: Report
) -> None:
    """Fetch the wheels of *lock*, check their digests, and unpack them into the new directory *tree*.

    Args:
      lock: What to fetch.
      target: What for.
      directory: An empty one, for this alone.
      tree: Where to.
      environment: `Runtime.environment`.
      report: Told what is fetched.

    Raises:
      ModuleNotFoundError: if uv is not installed.
      PackagesError: if a wheel can't be fetched, or is not what the lock says.

    """
    (directory / _LOCK).write_text(lock.text, "utf-8")

    def tell(data: bytes) -> None:
        for line in data.decode("utf-8", "replace").splitlines():
            if line.startswith("Downloading "):
                report(line[:_COLUMNS], None)

    arguments = install_arguments(target, tree)
    # An index may forbid uv to take from its cache what it had already. The digests of the lock say more than the index could.
    cached = await _start([*arguments, "--offline"], directory, environment)
    if cached.returncode != 0:
        with suppress(FileNotFoundError):
            await trio.to_thread.run_sync(remove_tree, tree)
        await _run(arguments, directory, environment, tell)


async def _run(
    arguments: list[str],
    directory: Path,
    environment: Mapping[str, str],
    on_output: Callable[[bytes], object] | None = None,
    *,
    kept: Iterable[str] = (),
) -> None:
    process = await _start(arguments, directory, environment, on_output)
    if process.returncode != 0:
        raise explain(process.output(), kept)


async def _start(
    arguments: list[str],
    directory: Path,
    environment: Mapping[str, str],
    on_output: Callable[[bytes], object] | None = None,
) -> OwnedProcess:
    return await run_owned(
        [find_uv(), *arguments],
        environment={**environment_of(os.environ), **environment},
        cwd=directory,
        tail_bytes=_OUTPUT_BYTES,
        on_output=on_output,
    )


def explain(output: str, kept: Iterable[str] = ()) -> PackagesError:
    """Return the error that uv's output tells of, with its words; *kept* is what is there, and was not to be changed."""
    lines = [line[:_COLUMNS] for line in output.splitlines() if line.strip() and not line.startswith("warning:")]
    words = "\n".join(["uv says:", *lines[-_LINES:]])
    for pattern in _NO_WHEEL:
        if match := pattern.search(output):
            return missing_wheel(match["package"], (match["version"] or "").rstrip(",."), words)
    if says_full(output):  # whatever it failed to do for that
        return PackagesError(f"the packages can't be fetched or unpacked: the disk is full\n{words}")
    if any(each in output for each in _UNREACHABLE):
        return PackagesError(
            "the packages can't be fetched: the index of uv's configuration (UV_DEFAULT_INDEX, uv.toml; pip's own does not "
            f"count) can't be reached, and uv's cache does not have all of them. It is safe to try again\n{words}"
        )
    there = [each for each in kept if re.search(rf"(?<![\w.-]){re.escape(each)}(?![\w.+-])", output)]
    why = f", since what the image has keeps its version: {', '.join(there)}" if there else ""
    return PackagesError(f"the packages of the image can't be installed together as they were asked for{why}\n{words}")
