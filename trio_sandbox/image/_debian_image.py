"""Images made of Debian packages."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from ..qemu._process import InheritedFds, run_owned
from ._mmdebstrap import Bootstrap, build_environment, build_error, open_scratch, run_mmdebstrap
from ._recipe import BuildContext, digest_of

IMAGE_NAME = "image.qcow2"
_RAW_NAME = "image.raw"

# Everything is thrown away with its VM: no journal. Checksums of metadata are slow without the
# host's instructions. The kernel would fill lazily made inode tables at run time, in every overlay.
_MKE2FS = "mke2fs -q -F -t ext4 -O ^has_journal,^metadata_csum,^resize_inode -m 0 -E lazy_itable_init=0,nodiscard"


@attrs.frozen(kw_only=True)
class DebianImage:
    """A root file system of Debian packages, with an ordinary user of number 1000."""

    name: str
    description: str
    suite: str
    packages: tuple[str, ...]
    virtual_size: int = 8 * 2**30
    """What programs see as the size of the disk, in bytes."""
    customize: tuple[str, ...] = ()
    """More shell commands, with the tree as ``$1``."""

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    def digest(self) -> str:
        """Return the digest of the recipe; newer packages of the same names do not change it."""
        return digest_of([attrs.asdict(self), _CLEAN, _USER, _MKE2FS])

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the disk."""
        raw = context.staging / _RAW_NAME
        with InheritedFds() as inherited:
            # In a user namespace root is nobody in particular outside of it: it may not walk to
            # the file, but it may write through a descriptor to a file that all may write to.
            raw.touch()
            raw.chmod(0o666)
            fd = inherited.open(raw, os.O_RDWR)
            os.ftruncate(fd, self.virtual_size)
            bootstrap = Bootstrap(
                suite=self.suite,
                variant="essential",
                packages=self.packages,
                hooks=(_USER, *self.customize, _CLEAN + _PLAIN + f'{_MKE2FS} -d "$1/mnt" /proc/self/fd/{fd}'),
            )
            async with open_scratch(context.staging, context.environment) as scratch:
                await run_mmdebstrap(
                    bootstrap,
                    scratch=scratch,
                    inherited=inherited,
                    environment=context.environment,
                    report=lambda message, fraction: context.report(message, fraction and fraction * 0.95),
                )
        context.report("converting", 0.95)
        process = await run_owned(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", os.fspath(raw), os.fspath(context.output / IMAGE_NAME)],
            environment=build_environment(context.environment),
        )
        if process.returncode != 0:
            raise build_error("qemu-img", process.output())
        return {"suite": self.suite, "virtual_size": self.virtual_size, "packages": list(self.packages)}


# dpkg's and apt's own caches go away after the hooks; the file system is made before.
_CLEAN = (
    'set -e; cd "$1"; rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/* var/cache/debconf/*-old tmp/* '
    "usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/lintian; rm -f etc/resolv.conf etc/hostname etc/machine-id; "
    ': > etc/machine-id; echo sandbox > etc/hostname; printf "127.0.0.1 localhost sandbox\\n::1 localhost\\n" > etc/hosts; '
)
# mmdebstrap has mounted /proc, /sys and /dev in the tree. A bind mount that is not recursive shows
# the tree without them.
_PLAIN = 'mount --bind "$1" "$1/mnt"; trap \'umount "$1/mnt"\' EXIT; '
_USER = (
    'set -e; cd "$1"; echo "user:x:1000:1000::/home/user:/bin/bash" >> etc/passwd; '
    'echo "user:x:1000:" >> etc/group; echo "user:*:20000:0:99999:7:::" >> etc/shadow; '
    "mkdir -p proc sys dev run home; cp -a etc/skel home/user; chown -R 1000:1000 home/user"
)
