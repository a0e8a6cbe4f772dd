"""Images made of Debian packages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import attrs

from ..qemu import InheritedFds
from ._ext4 import mke2fs_script
from ._mmdebstrap import Bootstrap, lend_output, run_mmdebstrap, run_tool
from ._recipe import BuildContext, digest_of
from ._rights import find_rights
from ._stored import IMAGE_NAME as IMAGE_NAME

#: The Python of each release.
_PYTHONS: Final = {"bookworm": "3.11", "trixie": "3.13"}
#: How much of the work mmdebstrap is; the rest is qemu-img.
_MMDEBSTRAP_PART = 0.95

# The ordinary user whom code runs as. The package that has useradd, and would make the files of
# passwords, is not needed for it; `shadow` has the number 42 in every Debian. Python reads the
# directory of a user's packages only if it was there when the interpreter started.
_ADD_USER = (
    'set -e; cd "$1"; echo "user:x:1000:1000::/home/user:/bin/bash" >> etc/passwd; '
    'echo "user:x:1000:" >> etc/group; '
    "sed -i 's/^\\([^:]*\\):[^:]*/\\1:x/' etc/passwd etc/group; "
    "sed 's/:.*/:*:20000:0:99999:7:::/' etc/passwd > etc/shadow; sed 's/:.*/:*::/' etc/group > etc/gshadow; "
    "chown 0:42 etc/shadow etc/gshadow; chmod 640 etc/shadow etc/gshadow; "
    "mkdir -p proc sys dev run home; cp -a etc/skel home/user; "
    "for python in usr/lib/python3.*; do "
    '[ ! -d "$python" ] || mkdir -p "home/user/.local/lib/${python##*/}/site-packages"; done; '
    "chown -R 1000:1000 home/user"
)
# Nobody in a machine has a password, so that no program needs the rights of its owner to ask for one.
# And a machine that is thrown away has no packages that pip could damage.
_LOOSEN = (
    'set -e; cd "$1"; find . -xdev -type f -perm /6000 -exec chmod a-s {} +; rm -f usr/lib/python3*/EXTERNALLY-MANAGED'
)
# Files that mmdebstrap brought from the host, or put in place of others while it installs, go as well.
_CLEAN = (
    'set -e; umask 022; cd "$1"; rm -rf var/cache/apt/* var/lib/apt/lists/* var/cache/debconf/*-old tmp/* '
    "usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/lintian "
    "etc/resolv.conf etc/machine-id etc/hostname etc/hosts usr/sbin/policy-rc.d; "
    'for moved in usr/sbin/*.REAL; do [ ! -e "$moved" ] || mv -f "$moved" "${moved%.REAL}"; done; '
    "find var/log -type f -delete; : > etc/machine-id; echo sandbox > etc/hostname; "
    'printf "127.0.0.1 localhost sandbox\\n::1 localhost\\n" > etc/hosts'
)
_LIST_PACKAGES = "dpkg-query --admindir=\"$1/var/lib/dpkg\" -W -f '${{Package}} ${{Version}}\\n' > {listing}"
# mmdebstrap has mounted /proc, /sys and /dev in the tree, if it may; a bind mount that is not recursive shows
# the tree without them.
_MAKE_DISK = 'set -e; mount --bind "$1" "$1/mnt"; trap \'umount "$1/mnt"\' EXIT; '


@attrs.frozen(kw_only=True)
class DebianImage:
    """A root file system of Debian packages, with an ordinary user of number 1000."""

    name: str
    suite: str
    """Debian's name of the release."""
    packages: tuple[str, ...]
    """Installed besides the essential ones, with what they depend on."""
    languages: tuple[str, ...]
    """Whose interpreters are among them, the main one first."""
    virtual_size: int = 8 * 2**30
    """What programs see as the size of the disk, in bytes. Only what is used takes room."""

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    @property
    def base(self) -> None:
        """Nothing."""
        return

    @property
    def python(self) -> str:
        """The version of its Python, major and minor."""
        return _PYTHONS[self.suite]

    def digest(self) -> str:
        """Return the digest of the recipe. Newer versions of the packages do not change it."""
        # What it is used for does not change what is built.
        contents = attrs.asdict(self, filter=lambda field, _: field.name != "languages")
        return digest_of(contents, _ADD_USER, _LOOSEN, _CLEAN, _MAKE_DISK, mke2fs_script("", ""))

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the disk."""
        raw, listing = context.staging / "image.raw", context.staging / "packages"
        mounted = (await find_rights(context.environment)).namespaces
        with InheritedFds() as inherited:
            disk = lend_output(raw, inherited, self.virtual_size)
            await run_mmdebstrap(
                Bootstrap(
                    suite=self.suite,
                    variant="essential",
                    packages=self.packages,
                    hooks=(
                        _ADD_USER,
                        _LOOSEN,
                        _LIST_PACKAGES.format(listing=lend_output(listing, inherited)),
                        _CLEAN,
                        _MAKE_DISK + mke2fs_script("$1/mnt", disk) if mounted else mke2fs_script("$1", disk),
                    ),
                ),
                staging=context.staging,
                inherited=inherited,
                environment=context.environment,
                report=lambda message, fraction: context.report(message, fraction * _MMDEBSTRAP_PART),
            )
        context.report("converting to qcow2", _MMDEBSTRAP_PART)
        output = context.output / IMAGE_NAME
        await run_tool(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", os.fspath(raw), os.fspath(output)],
            environment=context.environment,
        )
        packages = dict(line.split(maxsplit=1) for line in listing.read_text("utf-8").splitlines())
        return {"suite": self.suite, "virtual_size": self.virtual_size, "packages": packages}
