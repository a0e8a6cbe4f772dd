"""Debian file trees, made with mmdebstrap, as root or as an ordinary user.

An ordinary user gets a user namespace in which he is root and owns a range of user ids. That
root is nobody in particular outside: he may not walk through a private home directory. So the
scripts that run in there reach our files through inherited descriptors only. Root gets namespaces,
too, where there are any: without them nothing is mounted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import trio

from .._errors import ImageBuildError, MissingProgramError
from .._programs import REQUIREMENTS, missing
from ..qemu import InheritedFds, is_marked, mark, remove_marked, run_owned
from ._apt_progress import AptProgress
from ._full_disk import says_full
from ._rights import explain_refusal, find_rights
from ._scratch import choose_directory

#: What apt takes from the environment. Nothing else of the user's gets in.
_KEPT_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_NEEDED = ("mmdebstrap", "/usr/share/keyrings/debian-archive-keyring.gpg", "mke2fs", "qemu-img", "newuidmap")
_LOG_BYTES = 64 * 2**10
#: Lines of output that go into an error message, and how much of each.
_LOG_LINES, _LOG_COLUMNS = 15, 300
#: The staging directory's note of a scratch directory elsewhere.
_NOTE_NAME = "scratch-path"
#: A scratch directory elsewhere. Earlier versions take whatever begins with "trio-sandbox-" for a leftover.
_SCRATCH_PREFIX = "build-trio-sandbox-"
_SCRATCH_NAME = re.compile(re.escape(_SCRATCH_PREFIX) + "[0-9a-f]{16}")
#: Processes that were just killed may write for an instant more.
_REMOVAL_TRIES, _REMOVAL_PAUSE = 20, 0.1


@attrs.frozen(kw_only=True)
class Bootstrap:
    """One file tree."""

    suite: str
    """Debian's name of the release."""
    variant: str
    """mmdebstrap's choice of packages that are installed besides; "extract" only unpacks."""
    packages: tuple[str, ...]
    hooks: tuple[str, ...]
    """Shell scripts run as root when the tree is complete, with its path as ``$1``; or mmdebstrap's own commands."""


def check_programs() -> None:
    """Make sure that what building needs is installed.

    Raises:
      MissingProgramError: naming the first thing that is not, and its package.
    """
    needed = [requirement for requirement in REQUIREMENTS if requirement.name in _NEEDED]
    for requirement in missing(needed):
        raise MissingProgramError(requirement.name, requirement.package)


async def examine_building(cache_dir: Path, environment: Mapping[str, str]) -> str:
    """Say how images would be built here. Makes nothing.

    Raises:
      ImageBuildError: if they can't be; the message says why, and what to do.
      MissingProgramError: if a program is not installed.
    """
    check_programs()
    rights = await find_rights(environment)
    root = os.geteuid() == 0
    staging = cache_dir
    while not staging.exists():
        staging = staging.parent
    directory = choose_directory(staging, root=root, device_nodes=not rights.namespaces)
    how = (
        "in namespaces of their own"
        if rights.namespaces
        else "without namespaces of their own, which this root may not make"
    )
    return f"{how}, in {directory}"


async def run_mmdebstrap(
    bootstrap: Bootstrap,
    *,
    staging: Path,
    inherited: InheritedFds,
    environment: Mapping[str, str],
    report: Callable[[str, float], object],
) -> None:
    """Make the tree, run the hooks on it, and throw it away.

    Cancelled, it leaves no process, and no file but those that `remove_staging` removes.

    Raises:
      ImageBuildError: if mmdebstrap fails; the last of its output is in the message.
      MissingProgramError: if a program is not installed.
      OSError: if there is no place for the tree.
    """
    # mmdebstrap runs customize hooks for every variant but "extract", whose last ones are these.
    if bootstrap.variant == "extract":
        kind, progress = "extract", AptProgress(report, rounds=(0.1, 0.8), steps=1)
    else:  # first the essential packages, then the others
        kind, progress = "customize", AptProgress(report, rounds=(0.05, 0.35, 0.95), steps=3)
    with inherited:
        check_programs()
        rights = await find_rights(environment)
        root = os.geteuid() == 0
        scratch = _make_scratch(staging, root=root, device_nodes=not rights.namespaces)
        # As root, mmdebstrap would mount /dev, /proc and /sys for all to see, and being killed leave
        # them there. In namespaces of its own they end with it, and so does every process below it.
        await _run(
            [
                *(rights.as_root('exec "$@"') if root else ()),
                "mmdebstrap",
                "--verbose",
                f"--mode={'root' if root else 'unshare'}",
                f"--variant={bootstrap.variant}",
                f"--include={','.join(bootstrap.packages)}",
                "--format=null",
                # The tree is thrown away. And after a hook that empties its /tmp, mmdebstrap's
                # cleaning would take the host's own apt for the tree's.
                f"--skip=cleanup{'' if rights.namespaces else ',check/canmount,chroot/mount'}",
                *(f"--{kind}-hook={hook}" for hook in bootstrap.hooks),
                bootstrap.suite,
                "/dev/null",
            ],
            inherited=inherited,
            environment={**environment, "TMPDIR": os.fspath(scratch)},
            on_output=progress.feed,
        )


async def run_as_root(
    script: str, arguments: Sequence[str] = (), *, inherited: InheritedFds, environment: Mapping[str, str]
) -> None:
    """Run a shell script as root; in namespaces of its own, with which its mounts and processes end, if `find_rights` finds any.

    Raises:
      ImageBuildError: if it fails; the last of its output is in the message.
      MissingProgramError: if a program is not installed.
    """
    with inherited:
        check_programs()
        rights = await find_rights(environment)
        await _run([*rights.as_root(script), *arguments], inherited=inherited, environment=environment)


async def run_tool(argv: Sequence[str], *, environment: Mapping[str, str]) -> None:
    """Run a program as ourselves.

    Raises:
      ImageBuildError: if it fails; the last of its output is in the message.
      MissingProgramError: if it is not installed.
    """
    await _run(argv, inherited=InheritedFds(), environment=environment)


async def _run(
    argv: Sequence[str],
    *,
    inherited: InheritedFds,
    environment: Mapping[str, str],
    on_output: Callable[[bytes], object] | None = None,
) -> None:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    process = await run_owned(
        argv,
        environment={"PATH": path, "LC_ALL": "C.UTF-8", **kept, **environment},
        inherited=inherited,
        tail_bytes=_LOG_BYTES,
        on_output=on_output,
    )
    if process.returncode != 0:
        raise ImageBuildError(_explain(argv[0], process.output()))


def _explain(program: str, output: str) -> str:
    """Say why *program* failed, as far as its output tells."""
    reason = f"{program} failed"
    refusals = [line for line in output.splitlines() if "unshare" in line or "/etc/sub" in line]
    if any(says_full(line) for line in output.splitlines() if line not in refusals):
        reason = f"{program} failed because the disk is full: free some, or use another cache directory"
    elif refusals:
        reason = f"{program} failed: {explain_refusal(refusals[-1])}"
    elif "Temporary failure resolving" in output or "Could not connect" in output or "Unable to connect" in output:
        reason = f"{program} failed because Debian's packages could not be fetched: building needs the network"
    lines = [line[:_LOG_COLUMNS] for line in output.splitlines() if not line.startswith("/usr/bin/dpkg ")]
    return "\n".join([f"{reason}. The last of its output:", *lines[-_LOG_LINES:]])


def lend_output(path: Path, inherited: InheritedFds, size: int = 0) -> str:
    """Make the file *path*, of *size* bytes that take no room; return its name for a script that runs as root."""
    path.touch()
    # A user namespace's root is somebody else to this file. Its directory is private, so this lets
    # in nobody but whom we hand a descriptor.
    path.chmod(0o666)
    fd = inherited.open(path, os.O_RDWR)
    os.ftruncate(fd, size)
    return f"/proc/self/fd/{fd}"


def lend_input(path: Path, inherited: InheritedFds) -> str:
    """Open the file *path*; return its name for a script that runs as root."""
    path.chmod(0o644)
    return f"/proc/self/fd/{inherited.open(path, os.O_RDONLY)}"


def _make_scratch(staging: Path, *, root: bool, device_nodes: bool) -> Path:
    """Return a directory which mmdebstrap may make its tree in; `remove_staging` removes it. Arguments as `choose_directory`."""
    note = staging / _NOTE_NAME
    if note.exists():
        return Path(note.read_text("utf-8"))
    parent = choose_directory(staging, root=root, device_nodes=device_nodes)
    scratch = parent / ("scratch" if parent == staging else f"{_SCRATCH_PREFIX}{os.urandom(8).hex()}")
    # First the note: what is noted is found again, whatever kills us.
    note.write_text(os.fspath(scratch), "utf-8")
    scratch.mkdir(mode=0o700)
    mark(scratch)
    scratch.chmod(0o755)
    return scratch


async def remove_staging(staging: Path, environment: Mapping[str, str]) -> None:
    """Remove a build's directory, and what the build left elsewhere; its processes have been killed.

    Raises:
      OSError: if it can't be removed.
    """
    try:
        scratch = Path((staging / _NOTE_NAME).read_text("utf-8"))
    except FileNotFoundError:
        scratch = staging
    # Nobody but the cache's owner writes these notes; a damaged one must do no harm all the same.
    if _SCRATCH_NAME.fullmatch(scratch.name) and is_marked(scratch):
        await _remove_tree(scratch, environment)
    await _remove_tree(staging, environment)


async def _remove_tree(directory: Path, environment: Mapping[str, str]) -> None:
    attempt = 0
    while not await trio.to_thread.run_sync(_try_to_remove, directory, attempt == _REMOVAL_TRIES):
        attempt += 1
        if os.geteuid() == 0:
            await trio.sleep(_REMOVAL_PAUSE)
        else:
            # Files of the user namespace's other users, perhaps: only its root may remove them. To him
            # our own files are out of reach, and he will complain of them.
            script = 'find "$1" -xdev -mindepth 2 -delete 2> /dev/null || :'
            await run_as_root(script, [os.fspath(directory)], inherited=InheritedFds(), environment=environment)


def _try_to_remove(directory: Path, last: bool) -> bool:
    try:
        remove_marked(directory)
    except FileNotFoundError:
        return not directory.exists()
    except OSError:
        if last:
            raise
        return False
    return True
