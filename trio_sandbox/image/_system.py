"""The system disk: kernel, initial RAM disk, and the read-only disk of the guest's agent."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path

import attrs

from .._errors import ImageBuildError
from ..qemu._process import InheritedFds
from ._initrd import InitrdEntry, encode_initrd
from ._mmdebstrap import Bootstrap, open_scratch, run_mmdebstrap
from ._recipe import BuildContext, digest_of

KERNEL_NAME, INITRD_NAME, DISK_NAME = "vmlinuz", "initrd.img", "system.img"

#: In the order of their insertion.
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
#: What the guest needs on top of the standard library, from the host's own installation.
_DISTRIBUTIONS = {
    "trio": "trio",
    "attrs": "attr attrs",
    "outcome": "outcome",
    "sortedcontainers": "sortedcontainers",
    "idna": "idna",
    "sniffio": "sniffio",
}
_AGENT_PACKAGES = ("wire", "guest")
_LEFT_OUT = {"__pycache__", "_tests", "testing", "tests"}
KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "nokaslr",
    "mitigations=off",
    "8250.nr_uarts=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
)


@attrs.frozen
class SystemRecipe:
    """How to build the system disk; there is one."""

    name: str = "system"
    user_suite: str = "trixie"
    # The kernel of the next release crashes now and then under the software emulation of QEMU 7.2.
    kernel_suite: str = "bookworm"

    @property
    def files(self) -> tuple[str, ...]:
        """What a VM is booted with."""
        return (KERNEL_NAME, INITRD_NAME, DISK_NAME)

    def digest(self) -> str:
        """Return a digest that also covers the agent's sources and what it imports."""
        sources = hashlib.sha256()
        for path, data in _agent_files():
            sources.update(f"{path}\0{len(data)}\0".encode() + data)
        return digest_of([attrs.asdict(self), _MODULES, _INIT, _KERNEL_HOOK, _DISK_HOOK, sources.hexdigest()])

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the three files."""
        async with open_scratch(context.staging, context.environment) as scratch:
            await self._build_kernel(context, scratch)
            await self._build_disk(context, scratch)
        return {"kernel": KERNEL_NAME}

    async def _build_kernel(self, context: BuildContext, scratch: Path) -> None:
        bootstrap = Bootstrap(
            suite=self.kernel_suite,
            variant="extract",
            packages=("linux-image-cloud-amd64", "busybox-static"),
            hooks=(_KERNEL_HOOK, f"copy-out /out {context.staging}"),
        )
        await run_mmdebstrap(
            bootstrap,
            scratch=scratch,
            inherited=InheritedFds(),
            environment=context.environment,
            report=lambda message, fraction: context.report(f"kernel: {message}", fraction and fraction * 0.5),
        )
        out = context.staging / "out"
        modules = [name for name in _MODULES if (out / f"{name}.ko").exists()]
        entries = [InitrdEntry(path) for path in ("bin", "dev", "modules", "root")]
        entries.append(InitrdEntry("bin/busybox", (out / "busybox").read_bytes(), executable=True))
        entries.append(InitrdEntry("init", _INIT.replace("MODULES", " ".join(modules)).encode(), executable=True))
        entries.extend(
            InitrdEntry(f"modules/{name}.ko", (out / f"{name}.ko").read_bytes())
            for name in modules
        )
        (context.output / INITRD_NAME).write_bytes(encode_initrd(entries))
        (out / "vmlinuz").rename(context.output / KERNEL_NAME)

    async def _build_disk(self, context: BuildContext, scratch: Path) -> None:
        archive = context.staging / "agent.tar"
        archive.write_bytes(_agent_archive())
        disk = context.output / DISK_NAME
        disk.touch()
        disk.chmod(0o666)
        with InheritedFds() as inherited:
            fd = inherited.open(disk, os.O_RDWR)
            os.ftruncate(fd, 128 * 2**20)
            bootstrap = Bootstrap(
                suite=self.user_suite,
                variant="extract",
                packages=("python3.13-minimal", "libpython3.13-stdlib"),
                hooks=(
                    'mkdir -p "$1/disk"',
                    f"tar-in {archive} /disk",
                    _DISK_HOOK + f'mke2fs -q -F -t ext4 -O ^has_journal,^resize_inode,^metadata_csum -m 0 -b 4096 -N 8192 -d "$1/disk" /proc/self/fd/{fd}',
                ),
            )
            await run_mmdebstrap(
                bootstrap,
                scratch=scratch,
                inherited=inherited,
                environment=context.environment,
                report=lambda message, fraction: context.report(f"agent: {message}", 0.5 + (fraction or 0) * 0.5),
            )
        disk.chmod(0o644)


_KERNEL_HOOK = (
    'set -e; cd "$1"; mkdir out; cp bin/busybox out/busybox; cp boot/vmlinuz-* out/vmlinuz; '
    f'for name in {" ".join(_MODULES)}; do '
    # What is built into the kernel is no file.
    'find lib usr/lib -name "$name.ko" -exec cp {} out/ ";"; done'
)
_LIBRARIES = ("ld-linux-x86-64", "libc", "libm", "libz", "libexpat", "libbz2", "libcrypto", "libssl", "libffi", "liblzma", "libuuid", "libzstd")
_DISK_HOOK = (
    'set -e; cd "$1/disk"; mkdir -p dev proc sys run tmp image usr/bin usr/lib/x86_64-linux-gnu; '
    "cp -a ../usr/lib/python3.13 usr/lib/; cp -a ../usr/bin/python3.13 usr/bin/; cp -a ../usr/lib64 usr/; "
    "ln -s usr/bin bin; ln -s usr/lib lib; ln -s usr/lib64 lib64; ln -s python3.13 usr/bin/python3; "
    + " ".join(f"cp -a ../usr/lib/x86_64-linux-gnu/{name}.so.* usr/lib/x86_64-linux-gnu/;" for name in _LIBRARIES)
    + " chroot . /usr/bin/python3.13 -I -S -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.13 /agent; "
)

_INIT = """#!/bin/busybox sh
for name in MODULES; do
  /bin/busybox insmod /modules/$name.ko
done
/bin/busybox mount -t devtmpfs devtmpfs /dev
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.01; done
/bin/busybox mount -t ext4 -o ro,noatime /dev/vda /root
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /usr/bin/python3.13 -I -S -X frozen_modules=on /agent
"""

_AGENT_MAIN = b"""from trio_sandbox.guest import init

init.main()
"""


def _agent_files() -> Iterator[tuple[str, bytes]]:
    """Yield path and content of everything that goes into /agent, in a fixed order."""
    yield "agent/__main__.py", _AGENT_MAIN
    ours = Path(str(resources.files("trio_sandbox")))
    for package in _AGENT_PACKAGES:
        yield from _tree(ours / package, f"agent/trio_sandbox/{package}")
    for distribution, packages in _DISTRIBUTIONS.items():
        try:
            base = Path(str(metadata.distribution(distribution).locate_file("")))
        except metadata.PackageNotFoundError as exc:
            raise ImageBuildError(f"the Python distribution {distribution}, which the guest's agent needs, is not installed") from exc
        for package in packages.split():
            yield from _tree(base / package, f"agent/{package}")


def _tree(directory: Path, target: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.rglob("*.py")):
        relative = path.relative_to(directory)
        if not _LEFT_OUT.intersection(relative.parts):
            yield f"{target}/{relative.as_posix()}", path.read_bytes()


def _agent_archive() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        directories: set[str] = set()
        for path, data in _agent_files():
            for parent in reversed(Path(path).parents[:-1]):
                if parent.as_posix() not in directories:
                    directories.add(parent.as_posix())
                    info = tarfile.TarInfo(parent.as_posix())
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()
