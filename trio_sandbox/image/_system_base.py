"""What of the system disk comes from Debian: the kernel, the initial RAM disk, the agent's Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
import trio

from .._errors import ImageBuildError
from ..qemu import InheritedFds
from ._initrd import InitrdEntry, encode_initrd
from ._kernel import extract_vmlinux
from ._mmdebstrap import Bootstrap, lend_output, run_mmdebstrap
from ._recipe import BuildContext, StandsAlone, digest_of

KERNEL_NAME, INITRD_NAME, USERLAND_NAME = "vmlinux", "initrd.img", "userland.tar"

#: Drivers in the order of their insertion. Some are built into some kernels.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_balloon",
    "rng-core",
    "virtio-rng",
)
#: What Python's own modules are linked to, so far as an agent may import them.
_LIBRARIES = (
    "ld-linux-x86-64",
    "libbz2",
    "libc",
    "libexpat",
    "libffi",
    "liblzma",
    "libm",
    "libuuid",
    "libz",
    "libzstd",
)

_COPY_KERNEL = (
    'set -e; cd "$1"; mkdir out; cp bin/busybox out/busybox; cp boot/vmlinuz-* out/vmlinuz; '
    f"for name in {' '.join(_MODULES)}; do "
    'find lib usr/lib -name "$name.ko" -exec cp {} out/ ";"; done'
)
# Only unpacked, not configured: no package's scripts have run, so the links of a merged /usr are ours to make.
_COPY_PYTHON = (
    'set -e; mkdir "$1/out"; cd "$1/out"; mkdir -p agent dev image proc run sys tmp usr/bin usr/lib/x86_64-linux-gnu; '
    "cp -a ../usr/bin/python3.13 usr/bin/; cp -a ../usr/lib64 usr/; cp -a ../usr/lib/python3.13 usr/lib/; "
    "for name in {libraries}; do cp -a ../usr/lib/x86_64-linux-gnu/$name.so.* usr/lib/x86_64-linux-gnu/; done; "
    "for name in bin lib lib64; do ln -s usr/$name $name; done; ln -s python3.13 usr/bin/python3; "
    "rm -rf usr/lib/python3.13/ensurepip usr/lib/python3.13/idlelib usr/lib/python3.13/lib2to3 "
    "usr/lib/python3.13/pydoc_data usr/lib/python3.13/tkinter usr/lib/python3.13/turtle.py; "
    # Trio asks for the path of libpthread when it is imported, and Python starts ldconfig, gcc and ld in
    # turn to find it. None of them is here, so this is the answer already.
    "printf 'def find_library(name):\\n    return None\\n' > usr/lib/python3.13/ctypes/util.py; "
    # Trio imports ssl, and by way of hmac OpenSSL's hashes, which is a tenth of its import under software
    # emulation. The agent uses neither: what speaks TLS in a guest does so inside the image.
    "rm usr/lib/python3.13/lib-dynload/_ssl.* usr/lib/python3.13/lib-dynload/_hashlib.*; "
    "echo '# No TLS here: see the recipe of the system disk.' > usr/lib/python3.13/ssl.py; "
    # Nothing checks whether the sources are newer: they never are.
    "chroot . /usr/bin/python3.13 -I -S -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.13; "
    # A library that is missing is better missed here than by process 1 of every guest.
    'chroot . /usr/bin/python3.13 -I -S -c "import ctypes, hashlib, lzma, ssl, zlib"; '
    "tar -cf {userland} ."
)
# Whatever fails here ends process 1, which is a kernel panic, which ends the VM, with the message
# on its console.
_INIT = """#!/bin/busybox sh
set -e
for name in MODULES; do /bin/busybox insmod /modules/$name.ko; done
/bin/busybox mount -t devtmpfs devtmpfs /dev
tries=0
until [ -b /dev/vda ]; do
  if [ $tries = 500 ]; then echo "init: no system disk"; exit 1; fi
  tries=$((tries + 1)); /bin/busybox sleep 0.02
done
/bin/busybox mount -t ext4 -o ro /dev/vda /root
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /usr/bin/python3.13 -I -S /agent
"""


@attrs.frozen
class SystemBase(StandsAlone):
    """How to build it; there is one."""

    name: str = "system-base"
    # The kernel of the next release crashes now and then under the software emulation of QEMU 7.2.
    kernel_suite: str = "bookworm"
    kernel_package: str = "linux-image-cloud-amd64"
    userland_suite: str = "trixie"

    @property
    def files(self) -> tuple[str, ...]:
        """Kernel and initial RAM disk as they are booted, and the tree for the agent to be put into."""
        return (KERNEL_NAME, INITRD_NAME, USERLAND_NAME)

    def digest(self) -> str:
        """Return the digest of the recipe. Newer versions of the packages do not change it."""
        return digest_of(attrs.asdict(self), _MODULES, _LIBRARIES, _COPY_KERNEL, _COPY_PYTHON, _INIT)

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the three files."""
        modules = await self._build_kernel(context)
        await self._build_userland(context)
        return {"kernel_suite": self.kernel_suite, "userland_suite": self.userland_suite, "modules": modules}

    async def _build_kernel(self, context: BuildContext) -> list[str]:
        await run_mmdebstrap(
            Bootstrap(
                suite=self.kernel_suite,
                variant="extract",
                packages=(self.kernel_package, "busybox-static"),
                hooks=(_COPY_KERNEL, f"copy-out /out {context.staging}"),
            ),
            staging=context.staging,
            inherited=InheritedFds(),
            environment=context.environment,
            report=lambda message, fraction: context.report(f"kernel: {message}", fraction / 2),
        )
        context.report("kernel: unpacking it", 0.45)
        return await trio.to_thread.run_sync(_pack_kernel, context.staging / "out", context.output)

    async def _build_userland(self, context: BuildContext) -> None:
        with InheritedFds() as inherited:
            userland = lend_output(context.output / USERLAND_NAME, inherited)
            await run_mmdebstrap(
                Bootstrap(
                    suite=self.userland_suite,
                    variant="extract",
                    packages=("python3.13-minimal", "libpython3.13-stdlib"),
                    hooks=(_COPY_PYTHON.format(userland=userland, libraries=" ".join(_LIBRARIES)),),
                ),
                staging=context.staging,
                inherited=inherited,
                environment=context.environment,
                report=lambda message, fraction: context.report(f"Python: {message}", 0.5 + fraction / 2),
            )


def _pack_kernel(source: Path, output: Path) -> list[str]:
    """Make kernel and initial RAM disk of what was copied out; return the modules' names."""
    modules = [name for name in _MODULES if (source / f"{name}.ko").exists()]
    entries = [InitrdEntry(path) for path in ("bin", "dev", "modules", "root")]
    entries.append(InitrdEntry("init", _INIT.replace("MODULES", " ".join(modules)).encode(), executable=True))
    entries.append(InitrdEntry("bin/busybox", (source / "busybox").read_bytes(), executable=True))
    entries += [InitrdEntry(f"modules/{name}.ko", (source / f"{name}.ko").read_bytes()) for name in modules]
    (output / INITRD_NAME).write_bytes(encode_initrd(entries))
    try:
        (output / KERNEL_NAME).write_bytes(extract_vmlinux((source / "vmlinuz").read_bytes()))
    except ValueError as exc:
        raise ImageBuildError(f"Debian's kernel could not be unpacked: {exc}") from exc
    return modules
