"""What this process may do for a build, found by trying: before anything is downloaded, and for `doctor`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from .._errors import ImageBuildError
from ..qemu import InheritedFds, minimal_environment, run_owned

#: The capabilities that root needs for making a file tree of Debian packages, and their numbers; see capabilities(7).
_CAPABILITIES: Final = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "SETGID": 6, "SETUID": 7, "SYS_CHROOT": 18}
_EXCERPT: Final = 300


@attrs.frozen
class Rights:
    """How a build gets the rights of root."""

    namespaces: bool
    """In namespaces of its own, with which its mounts and processes end. Root does without them, and without mounts, where
    there are none, as in most containers."""

    def as_root(self, script: str) -> list[str]:
        """Return the beginning of an argv that runs a shell script as root, its first argument being the script's ``$1``."""
        if self.namespaces:
            return [*_UNSHARE, "sh", "-c", f"set -e; mount --make-rprivate /; {script}", "sh"]
        return ["sh", "-c", f"set -e; {script}", "sh"]


_UNSHARE: Final = ("mmdebstrap", "--unshare-helper")

#: What works does not change while we run.
_found: dict[int, Rights] = {}


async def find_rights(environment: Mapping[str, str]) -> Rights:
    """Find out how to build, by trying; some 0.2 s the first time.

    Args:
      environment: Goes into the environment of every child process.

    Raises:
      ImageBuildError: if nothing can be built; the message says why, and what to do.
      MissingProgramError: if mmdebstrap is not installed.
    """
    await trio.lowlevel.checkpoint()
    user = os.geteuid()
    if user not in _found:
        with InheritedFds() as inherited:
            process = await run_owned(
                [*Rights(namespaces=True).as_root("true")],
                environment={**minimal_environment(), **environment},
                inherited=inherited,
            )
        if process.returncode == 0:
            _found[user] = Rights(namespaces=True)
        elif user != 0:
            raise ImageBuildError(explain_refusal(process.output()))
        elif missing := missing_capabilities(_read_status()):
            raise ImageBuildError(
                f"root can't build images here without the capabilities {', '.join(missing)}: give the container these, or "
                "build the images elsewhere, and copy the cache directory"
            )
        else:
            _found[user] = Rights(namespaces=False)
    return _found[user]


def _read_status() -> str:
    return Path("/proc/self/status").read_text("ascii", "replace")


def missing_capabilities(status: str) -> list[str]:
    """Return what root lacks for building without namespaces.

    Args:
      status: The text of ``/proc/self/status``.
    """
    (effective,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]


def explain_refusal(output: str) -> str:
    """Say why an ordinary user can't get a user namespace of its own, and what to do.

    Args:
      output: What mmdebstrap said.
    """
    if "/etc/subuid" in output or "/etc/subgid" in output:
        return (
            "images can't be built by this user, who has no range of user ids to hand out: as root, "
            "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER; see subuid(5)"
        )
    if "No space left on device" in output:
        # What unshare(2) says of a limit; no disk has to do with it.
        why = "the limit of this system's user namespaces, user.max_user_namespaces, is reached"
        way_out = "as root, sysctl user.max_user_namespaces=15000"
    elif "Operation not permitted" in output or "Permission denied" in output:
        why = "this system lets ordinary users make no user namespaces, or this is a chroot, which has none for them"
        way_out = (
            "as root, sysctl kernel.unprivileged_userns_clone=1 (Debian) or "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container, run as its root"
        )
    else:
        why = f"no user namespace can be made: {' '.join(output.split())[:_EXCERPT] or 'mmdebstrap said nothing'}"
        way_out = "see user_namespaces(7)"
    return (
        f"images can't be built by this user: {why}. To change that: {way_out}. Or build the images elsewhere, and copy the "
        "cache directory"
    )
