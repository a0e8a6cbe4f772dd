"""From a machine's description to QEMU's command line: values in, values out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, final

import attrs

from .. import constants
from .._checks import check_flag, one_of
from .._config import check_memory_mib, check_vcpus

#: The guest's agent finds its port by this name.
AGENT_PORT: Final = "org.trio-sandbox.agent"

#: QEMU's name for the overlay that a machine starts with.
OVERLAY_NODE: Final = "overlay"

AcceleratorName = Literal["kvm", "tcg"]


def _words(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    for word in value:
        if not word or not word.isprintable() or " " in word:
            raise ValueError(f"`{attribute.name}` must be printable words without spaces, not {word!r}")


def _paths(paths: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    return tuple(Path(path) for path in paths)


@final
@attrs.frozen(kw_only=True)
class MachineConfig:
    """A virtual machine: three disks, a kernel, memory, and nothing that it could do without."""

    kernel: Path = attrs.field(converter=Path)
    """The kernel; readable for everybody, as QEMU opens it as another user."""
    initrd: Path = attrs.field(converter=Path)
    """The initial RAM disk; readable for everybody, too."""
    kernel_args: tuple[str, ...] = attrs.field(default=(), converter=tuple[str, ...], validator=_words)
    """The kernel's command line, word by word."""
    system_disk: Path = attrs.field(converter=Path)
    """The raw disk with the agent, shared read-only by every machine."""
    image: Path = attrs.field(converter=Path)
    """The disk that the overlay stands on, read-only."""
    image_format: Literal["qcow2", "raw"] = attrs.field(default="qcow2", validator=one_of("qcow2", "raw"))
    """The format of `image`."""
    image_layers: tuple[Path, ...] = attrs.field(default=(), converter=_paths)
    """What stands on `image` and belongs to it, the lowest first: qcow2 files, read-only, which stay where they are."""
    layers: tuple[Path, ...] = attrs.field(default=(), converter=_paths)
    """Frozen overlays between those and `overlay`, the lowest first: qcow2 files, read-only."""
    overlay: Path = attrs.field(converter=Path)
    """A qcow2 file of this machine's own that takes what the guest writes; its maker removes it."""
    mounts: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """What the third disk reads, raw and `constants.MOUNTS_DISK_BYTES` long; None: zeros."""
    mounts_bytes: int = 0
    """How much of that is in use, from its start."""
    disk_bytes: int | None = None
    """What the guest may write to its disk, in bytes: the file `overlay` may be as long as `Limits.of_machine` says. None: all of it."""
    memory_mib: int = attrs.field(default=constants.DEFAULT_MEMORY_MIB, validator=check_memory_mib)
    """RAM, in MiB; at least `constants.MINIMUM_MEMORY_MIB`."""
    vcpus: int = attrs.field(default=1, validator=check_vcpus)
    """Virtual CPUs, from 1 to `constants.MAXIMUM_VCPUS`."""
    memory_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """A file of `memory_mib` MiB that is the RAM; None: memory of the machine's own.

    The user that QEMU runs as must be allowed to read it, and to write to it if it is `memory_shared`; without `VmManager.shares_memory`
    in any case.
    """
    memory_shared: bool = attrs.field(default=False, validator=check_flag)
    """What the guest writes goes to `memory_file`; otherwise to private copies of its pages."""
    balloon: bool = attrs.field(default=False, validator=check_flag)
    """A memory balloon, by which the guest gives memory back: when it is asked to, and free pages unasked.

    A machine with private copies can't have one. QEMU discards what a guest gives back by punching holes into
    the file, and with that into the memory of every other machine on it; and a guest can give back what it likes,
    whether it was asked to or not. Since a state loads into the same machine only, what is to have clones must
    go without as well.
    """

    def __attrs_post_init__(self) -> None:
        if self.balloon and self.memory_file is not None and not self.memory_shared:
            raise ValueError(
                "a machine with `balloon` can't have a private copy of its `memory_file`: what its guest gave back "
                "would be cut out of the file, and of the memory of all others on it; set `memory_shared`, with a file "
                "of its own, or go without `balloon`"
            )


@final
@attrs.frozen(kw_only=True)
class MachineFds:
    """The numbers of the descriptors that QEMU inherits: it opens no file by its name."""

    kernel: int
    initrd: int | None
    """None: none is read, which is for machines restored from a state."""
    system_disk: int
    image: int
    image_layers: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    overlay: int
    """Open for reading and writing."""
    frozen_overlay: int
    """The same file, open for reading only: all that QEMU keeps of it once a snapshot stands on it."""
    mounts: int | None = None
    qmp: int
    """A connected stream socket, like the two below."""
    agent: int
    console: int
    kvm: int | None = None
    """``/dev/kvm`` open for reading and writing, where QEMU may not open it itself."""
    memory: int
    """`MachineConfig.memory_file`, open for whatever, or memory of the machine's own: memfd_create(2)."""


#: What QEMU is told about the descriptor of a set that is open for writing, to know it again.
WRITABLE: Final = "writable"


@final
@attrs.frozen
class DiskNode:
    """One file of a machine's disk, as QEMU knows it."""

    name: str
    fdset: int
    """The number of the set of its descriptors. `WRITABLE` says which is open for writing."""


def disk_nodes(fds: MachineFds) -> list[DiskNode]:
    """Return the files of a machine's disk as it starts, the lowest layer first and the overlay last."""
    layers = [DiskNode(_layer_node(number), fd) for number, fd in enumerate(fds.layers)]
    return [*layers, DiskNode(OVERLAY_NODE, fds.overlay)]


def base_argv(accelerator: AcceleratorName, *, kvm_fd: int | None = None) -> list[str]:
    """Return what all our machines have in common, the accelerator's probe included.

    Sources: qemu(1); ``docs/system/security.rst`` in QEMU's sources for what isolates a guest.
    """
    argv = ["-name", "trio-sandbox", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # QEMU needs none of these calls after its start; a guest that took it over might.
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    # q35 and not microvm, whose guests under TCG can't calibrate their clock on a loaded host.
    # A core dump would carry the guest's memory out of the sandbox. A description of a saved state is for debuggers, and
    # QEMU from 8.2 on aborts when it writes one without the configuration that `machine_argv` leaves out.
    argv += ["-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,dump-guest-core=off,suppress-vmdesc=on"]
    match accelerator:
        case "kvm" if kvm_fd is not None:
            argv += [*_fdset(kvm_fd), "-accel", f"kvm,device={_fdset_path(kvm_fd)}", "-cpu", _HARDWARE_CPU]
        case "kvm":
            argv += ["-accel", "kvm", "-cpu", _HARDWARE_CPU]
        case "tcg":
            argv += ["-accel", f"tcg,thread=multi,tb-size={_TB_MIB}", "-cpu", _TCG_CPU]
    return argv


#: No virtual machines inside the guest: nobody needs them, and KVM's code for them is one way out of it.
_WITHOUT_NESTING: Final = ",-vmx,-svm"
_HARDWARE_CPU: Final = f"host{_WITHOUT_NESTING}"

#: The x86-64-v2 level, which distributions build for, and rdrand, without which the guest's first
#: getrandom(2) waits for a second. Every feature more costs time: "max" boots a sixth slower.
_TCG_CPU: Final = f"qemu64{_WITHOUT_NESTING},+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt"

#: TCG translates code for the address that it is at. At random ones, each start of a program would be translated anew, which takes
#: as long as everything else about it, and once in some 35 starts all translated code, the kernel's too, would be thrown away.
_TCG_KERNEL_ARGS: Final = ("norandmaps",)

#: MiB of translated code that TCG keeps. It is private memory of each VM's QEMU.
_TB_MIB: Final = 64


def machine_argv(
    config: MachineConfig,
    accelerator: AcceleratorName,
    fds: MachineFds,
    *,
    incoming: bool = False,
    memory_read_only: bool = False,
) -> list[str]:
    """Return the arguments with which QEMU runs the machine *config*.

    Args:
      config: The machine.
      accelerator: What runs its instructions.
      fds: What QEMU inherits.
      incoming: It does not boot, but waits to be told where to load its state from.
      memory_read_only: Whether QEMU opens a RAM's file for reading only where it has a private copy of it; see
        `QemuBuild.opens_memory_read_only`.
    """
    argv = base_argv(accelerator, kvm_fd=fds.kvm)
    argv += ["-m", f"{config.memory_mib}M", "-smp", str(config.vcpus)]
    argv += _memory_backend(config, fds.memory, read_only=memory_read_only)
    # Only then `xen-save-devices-state` writes what `migrate-incoming` reads.
    argv += ["-global", "migration.send-configuration=off"]
    if incoming:
        argv += ["-incoming", "defer"]
    # Loaded with plain open(2), which knows nothing of descriptor sets.
    argv += ["-kernel", f"/proc/self/fd/{fds.kernel}"]
    if fds.initrd is not None:
        argv += ["-initrd", f"/proc/self/fd/{fds.initrd}"]
    argv += ["-append", " ".join([*config.kernel_args, *(_TCG_KERNEL_ARGS if accelerator == "tcg" else ())])]

    argv += ["-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"]
    argv += ["-chardev", f"socket,id=console,fd={fds.console}", "-device", "isa-serial,chardev=console"]

    # The order of the disks is their order in the guest: vda, vdb, vdc.
    argv += _system_disk(fds) + _image_disk(config, fds) + _mounts_disk(fds)
    argv += ["-device", "virtio-serial-pci,id=serial0,max_ports=2"]
    argv += ["-chardev", f"socket,id=agent,fd={fds.agent}"]
    argv += ["-device", f"virtserialport,bus=serial0.0,chardev=agent,name={AGENT_PORT}"]
    # QEMU's own generator, seeded by getrandom(2): there is no path to open.
    argv += ["-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,rng=rng0"]
    if config.balloon:
        argv += ["-device", "virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on"]
    return argv


def machine_identity(config: MachineConfig, accelerator: AcceleratorName) -> tuple[str, ...]:
    """Return what the saved state of a machine depends on, its files' contents and QEMU itself aside.

    A state loads into a machine of the same identity, and into no other.
    """
    fds = MachineFds(
        kernel=0, initrd=0, system_disk=0, image=0, overlay=0, frozen_overlay=0, qmp=0, agent=0, console=0, memory=0
    )
    alike = attrs.evolve(config, image_layers=(), layers=(), mounts=None, memory_shared=True)
    return tuple(machine_argv(alike, accelerator, fds))


def _memory_backend(config: MachineConfig, fd: int, *, read_only: bool) -> list[str]:
    shared = config.memory_shared or config.memory_file is None
    backend: dict[str, object] = {
        "qom-type": "memory-backend-file",
        "id": "ram",
        "size": config.memory_mib * 2**20,
        # Opened with plain open(2), and, unless told otherwise, for writing even where only private copies are written to.
        "mem-path": f"/proc/self/fd/{fd}",
        "share": shared,
    }
    if read_only and not shared:
        backend |= {"readonly": True, "rom": "off"}
    return ["-object", json.dumps(backend, separators=(",", ":")), "-machine", "memory-backend=ram"]


def _system_disk(fds: MachineFds) -> list[str]:
    return [
        *_fdset(fds.system_disk),
        *_blockdev(_file_node("system-file", fds.system_disk, read_only=True)),
        *_blockdev({"driver": "raw", "node-name": "system", "file": "system-file", "read-only": True}),
        *_disk("system"),
    ]


#: QEMU has the file open for writing only while it is what the machine writes to. Afterwards it takes the set's other descriptor,
#: and would be kept from that by locks of its own. `lock_disk` has one that it knows nothing of.
_WHILE_WRITTEN: Final[dict[str, object]] = {"auto-read-only": True, "locking": "off"}
#: What is thrown away with its VM needs no protection from a power failure, so the guest's flushes need not reach the disk.
_OVERLAY_OPTIONS: Final[dict[str, object]] = {"discard": "unmap", "cache": {"direct": False, "no-flush": True}}


def _image_disk(config: MachineConfig, fds: MachineFds) -> list[str]:
    image: dict[str, object] = {
        "driver": config.image_format,
        "node-name": "image",
        "file": "image-file",
        "read-only": True,
    }
    if config.image_format == "qcow2":
        image["backing"] = None  # Whatever its header names.
    overlay_file = _file_node("overlay-file", fds.overlay, read_only=False) | _OVERLAY_OPTIONS | _WHILE_WRITTEN
    top, layers = "image", list[str]()
    frozen = [(f"{top}-layer{number}", fd) for number, fd in enumerate(fds.image_layers)]
    frozen += [(_layer_node(number), fd) for number, fd in enumerate(fds.layers)]
    for name, fd in frozen:
        file = f"{name}-file"
        layer: dict[str, object] = {
            "driver": "qcow2",
            "node-name": name,
            "file": file,
            "read-only": True,
            "backing": top,
        }
        layers += [*_fdset(fd), *_blockdev(_file_node(file, fd, read_only=True)), *_blockdev(layer)]
        top = name
    overlay: dict[str, object] = {
        "driver": "qcow2",
        "node-name": OVERLAY_NODE,
        "file": "overlay-file",
        "backing": top,
        **_OVERLAY_OPTIONS,
    }
    return [
        *_fdset(fds.image),
        *_blockdev(_file_node("image-file", fds.image, read_only=True)),
        *_blockdev(image),
        *layers,
        *("-add-fd", f"fd={fds.overlay},set={fds.overlay},opaque={WRITABLE}"),
        *("-add-fd", f"fd={fds.frozen_overlay},set={fds.overlay}"),
        *_blockdev(overlay_file),
        *_blockdev(overlay),
        *_disk(OVERLAY_NODE),
    ]


def _layer_node(number: int) -> str:
    """Return QEMU's name for one of the layers that a machine starts with."""
    return f"layer{number}"


def _mounts_disk(fds: MachineFds) -> list[str]:
    # Every machine has it, for all to be alike: one with mounts goes on from a state that was saved without any. So it
    # always has one size, too, which the guest reads when it boots and never again.
    empty: dict[str, object] = {
        "driver": "null-co",
        "node-name": "mounts-file",
        "size": constants.MOUNTS_DISK_BYTES,
        "read-zeroes": True,
        "read-only": True,
    }
    file = (
        _blockdev(empty)
        if fds.mounts is None
        else [*_fdset(fds.mounts), *_blockdev(_file_node("mounts-file", fds.mounts, read_only=True))]
    )
    return [
        *file,
        *_blockdev({"driver": "raw", "node-name": "mounts", "file": "mounts-file", "read-only": True}),
        *_disk("mounts"),
    ]


def lock_disk(fd: int) -> None:
    """Keep an overlay from being written to by two machines, for as long as *fd* is open here or in QEMU.

    Raises:
      BlockingIOError: if another one has it.

    """
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(
                exc.errno, 'Failed to get "write" lock: another virtual machine writes to this disk'
            ) from exc
        # The file system has no locks.


def added_overlay(node: str, path: str) -> dict[str, object]:
    """Return the arguments of `blockdev-add` for an overlay that is going to stand on the one that a machine has.

    Args:
      node: What to call it.
      path: Of a descriptor set with the file, open for reading and writing, and once more for reading only.

    """
    file = {"driver": "file", "filename": path, **_OVERLAY_OPTIONS, **_WHILE_WRITTEN}
    return {"driver": "qcow2", "node-name": node, "file": file, "backing": None, **_OVERLAY_OPTIONS}


def _fdset(fd: int) -> list[str]:
    return ["-add-fd", f"fd={fd},set={fd}"]


def _fdset_path(fd: int) -> str:
    return f"/dev/fdset/{fd}"


def _file_node(name: str, fd: int, *, read_only: bool) -> dict[str, object]:
    # What is read-only is never written to by anybody, so locks would protect nothing.
    node: dict[str, object] = {
        "driver": "file",
        "node-name": name,
        "filename": _fdset_path(fd),
        "read-only": read_only,
    }
    if read_only:
        node["locking"] = "off"
    return node


def _blockdev(node: dict[str, object]) -> list[str]:
    return ["-blockdev", json.dumps(node, separators=(",", ":"))]


def _disk(node: str) -> list[str]:
    # A full disk on the host is the guest's error to see; the default would stop the machine for ever.
    return ["-device", f"virtio-blk-pci,drive={node},serial={node},werror=report,rerror=report"]


def stand_in_kernel() -> bytes:
    """Return the smallest kernel that QEMU takes: for a machine that is restored from a saved state, and boots none.

    QEMU wants a kernel of the same kind, for the same option ROM to be there, and would read all of the real one.
    It is an ELF file with one byte of code and the note that says where to enter it (Xen's PVH).
    """
    entry = 0x100000
    # 18 is XEN_ELFNOTE_PHYS32_ENTRY.
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    note_offset = 52 + 2 * 32
    header = struct.pack(
        "<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, entry, 52, 0, 0, 52, 32, 2, 0, 0, 0
    )  # 32 bits, little-endian, executable, i386
    load = struct.pack("<8I", 1, note_offset + len(note), entry, entry, 1, 1, 5, 4)
    describe = struct.pack("<8I", 4, note_offset, 0, 0, len(note), len(note), 4, 4)
    return header + load + describe + note + b"\xf4"  # hlt
