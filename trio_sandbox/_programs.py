"""What we need of the operating system: the one list of programs, files and their packages.

The standard library only, and no import of ours: `noxfile.py` runs this module by itself, before
anything of the library's dependencies is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from typing import NamedTuple

#: Where administrators' programs are; an ordinary user's PATH on Debian leaves these out.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class Requirement(NamedTuple):
    """One program on PATH, or one file, and where to get it."""

    name: str
    """A program's name, or a file's absolute path."""
    package: str
    """The Debian package that has it; Ubuntu's names are the same."""
    purpose: str
    ordinary_user_only: bool = False
    """Root does without it."""

    def find(self) -> str | None:
        """Give the absolute path, None if it is not there."""
        if self.name.startswith("/"):
            return self.name if os.path.exists(self.name) else None
        return find_program(self.name)


#: Everything that running and building needs, in the order in which `doctor` shows it.
REQUIREMENTS = (
    Requirement("qemu-system-x86_64", "qemu-system-x86", "runs the virtual machines"),
    Requirement("qemu-storage-daemon", "qemu-system-common", "makes their copy-on-write disks"),
    Requirement("unshare", "util-linux", "gives them namespaces of their own"),
    Requirement("setpriv", "util-linux", "takes their rights away"),
    Requirement("prlimit", "util-linux", "limits what they take"),
    Requirement("nice", "coreutils", "puts them behind everybody else"),
    Requirement("qemu-img", "qemu-utils", "converts and checks disk images"),
    Requirement("mmdebstrap", "mmdebstrap", "builds images from Debian packages"),
    Requirement(
        "/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "checks Debian's signatures"
    ),
    Requirement("mke2fs", "e2fsprogs", "makes the images' file systems"),
    Requirement("debugfs", "e2fsprogs", "prepares mounts"),
    Requirement("newuidmap", "uidmap", "lets an ordinary user build images", ordinary_user_only=True),
)

#: What only container images need: `doctor` notes what is not there.
FOR_CONTAINERS = (
    Requirement("skopeo", "skopeo", "fetches container images"),
    Requirement("zstd", "zstd", "unpacks some of their layers"),
)


def unsupported_platform() -> str:
    """Say why nothing of ours runs on this machine, "" if it does."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) == ("Linux", "x86_64"):
        return ""
    return f"trio-sandbox runs on Linux on x86_64, and this is {system} on {machine}: use a machine, or a virtual one, of that kind"


def find_program(name: str) -> str | None:
    """Give the absolute path of the program *name*, None if it is not installed.

    Unlike `shutil.which` this looks where administrators' programs are, too.
    """
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SYSTEM_DIRECTORIES))


def missing(requirements: Iterable[Requirement] = REQUIREMENTS, *, root: bool | None = None) -> list[Requirement]:
    """Give those that are not installed; *root* None: whoever we are."""
    if root is None:
        root = os.geteuid() == 0
    return [
        requirement
        for requirement in requirements
        if not (root and requirement.ordinary_user_only) and requirement.find() is None
    ]
