"""What runs the guests' instructions: proved by a guest that ran, and remembered until the next boot."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, final

import attrs
import trio

from .._config import Timeouts
from .._errors import HardwareRequiredError
from .._observe import part_logger
from .._private import make_private_directory
from .._stored_json import Fields, read_json
from ._build import QemuBuild, inspect_qemu, locate_qemu
from ._confinement import Confinement, kvm_access, prove_confinement
from ._machine import AcceleratorName, base_argv
from ._process import InheritedFds, describe_exit, minimal_environment, run_owned

_log = part_logger("accelerator")

_KVM: Final = Path("/dev/kvm")
_CACHE_FILE: Final = "accelerator.json"

#: The probe's guest: a firmware of our own, mapped at the end of the first MiB and of the first 4 GiB.
#: It goes to long mode, as a kernel does, for there are hosts whose KVM emulates real mode and never
#: runs anything else; then it computes and leaves by way of isa-debug-exit.
_PROBE_CODE: Final = bytes.fromhex(
    # -- 16 bit, at F000:0000
    "fa"  # cli
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "66c706 0010 03200000"  # mov dword [0x1000], 0x2003: the PML4's first entry, to...
    "66c706 0020 03300000"  # mov dword [0x2000], 0x3003: ... the page directory pointers', to...
    "66c706 0030 83000000"  # mov dword [0x3000], 0x83: ... one page of 2 MiB, mapped to itself
    "66b8 00100000 0f22d8"  # mov eax, 0x1000; mov cr3, eax
    "66b8 20000000 0f22e0"  # mov eax, 1 << 5 (PAE); mov cr4, eax
    "66b9 800000c0 0f32"  # mov ecx, 0xC0000080 (EFER); rdmsr
    "660d 00010000 0f30"  # or eax, 1 << 8 (LME); wrmsr
    "2e660f0116 9000"  # lgdt cs:[0x90]
    "66b8 11000080 0f22c0"  # mov eax, 0x80000011 (PG, ET, PE); mov cr0, eax
    "66ea 5a000f00 0800"  # jmp 8:0xF005A
    # -- 64 bit, at 0xF005A
    "b9 e8030000 31c0"  # mov ecx, 1000; xor eax, eax
    "01c8"  # add eax, ecx
    "89048d 00400000"  # mov [rcx * 4 + 0x4000], eax
    "ffc9 75f3"  # dec ecx; jnz add
    "8b0425 04400000"  # mov eax, [0x4004]: 500500, the sum of 1 to 1000
    "ba 01050000 ee f4"  # mov edx, 0x501; out dx, al; hlt
)
_PROBE_TABLES: Final = bytes.fromhex(
    # -- at F000:0080
    "0000000000000000 00000000009a2000"  # the GDT: null; 64-bit code
    "0f00 80000f00"  # its limit and address, at 0x90
)
_RESET_VECTOR: Final = bytes.fromhex("ea 0000 00f0")  # jmp F000:0000
#: isa-debug-exit makes ``(value << 1) | 1`` of what is written to it; 0x14 ends 500500.
_PROBE_STATUS: Final = (500500 & 0xFF) << 1 & 0xFF | 1


def probe_firmware() -> bytes:
    """Return the probe's guest, 64 KiB."""
    firmware = bytearray(0x10000)
    firmware[: len(_PROBE_CODE)] = _PROBE_CODE
    firmware[0x80 : 0x80 + len(_PROBE_TABLES)] = _PROBE_TABLES
    firmware[0xFFF0 : 0xFFF0 + len(_RESET_VECTOR)] = _RESET_VECTOR
    return bytes(firmware)


@final
@attrs.frozen
class Accelerator:
    """What runs the guests' instructions; made by `detect_accelerator`."""

    name: AcceleratorName
    """QEMU's name for it: "kvm" or "tcg"."""
    hardware: bool
    """The processor runs them. Software emulation is no security boundary by QEMU's own policy."""
    reason: str
    """Why it was chosen, for people."""
    qemu: QemuBuild
    """The QEMU that this is about."""
    confinement: Confinement
    """The confinement with which it was proved."""


async def detect_accelerator(
    choice: Literal["auto", "kvm", "tcg"] = "auto",
    *,
    require_hardware: bool = False,
    cache_dir: Path | None = None,
    environment: Mapping[str, str],
    timeouts: Timeouts | None = None,
) -> Accelerator:
    """Find out what can run a guest here.

    That ``/dev/kvm`` opens proves nothing: there are hosts where every call on it succeeds and yet no
    guest ever runs. So a guest of a few bytes is run, confined as every virtual machine is, and what
    came of it is remembered for this boot of the host and this QEMU.

    Cancelling leaves no process and no half-written file.

    Args:
      choice: "auto" takes hardware where it was proved to work, else software emulation; the others
        insist.
      require_hardware: Refuse software emulation.
      cache_dir: Where to remember the verdict; None: not at all. A directory that can't be written is
        no error, but costs a probe (up to `Timeouts.accelerator_probe`) each time.
      environment: `Runtime.environment`.
      timeouts: The probe's bound.

    Raises:
      HardwareRequiredError: if software emulation was refused, or "kvm" insisted on, and no guest ran
        on hardware; the message says what happened.
      MissingProgramError: if QEMU is not installed.
      SandboxError: if QEMU does not run at all.
    """
    timeouts = Timeouts() if timeouts is None else timeouts
    confinement = await prove_confinement(environment)
    if choice == "tcg":
        if require_hardware:
            raise HardwareRequiredError('software emulation ("tcg") was asked for and refused at the same time')
        build = await inspect_qemu(environment)
        return Accelerator("tcg", False, "software emulation was asked for", build, confinement)

    key = await trio.to_thread.run_sync(_cache_key, confinement, timeouts)
    cached = None if cache_dir is None else await trio.to_thread.run_sync(_read_cache, cache_dir, key)
    if cached is None:
        build = await inspect_qemu(environment)
        failure = await prove_kvm(build, confinement, environment=environment, deadline=timeouts.accelerator_probe)
        if cache_dir is not None:
            entry = _CacheEntry(key, build.version, failure)
            await trio.to_thread.run_sync(_write_cache, cache_dir, entry)
    else:
        build, failure = attrs.evolve(locate_qemu(), version=cached.version), cached.failure
    if failure is None:
        return Accelerator("kvm", True, "a guest ran on KVM", build, confinement)
    if require_hardware or choice == "kvm":
        raise HardwareRequiredError(f"no hardware acceleration: {failure}")
    return Accelerator("tcg", False, f"no hardware acceleration, as {failure}", build, confinement)


async def prove_kvm(
    build: QemuBuild, confinement: Confinement, *, environment: Mapping[str, str], deadline: float
) -> str | None:
    """Run a guest of a few bytes on KVM; return why that failed, None if it did not."""
    await trio.lowlevel.checkpoint()
    if not os.access(_KVM, os.F_OK):
        return f"{_KVM} does not exist"
    if not confinement.other_user and not os.access(_KVM, os.R_OK | os.W_OK):
        return f"this user may not open {_KVM}: join the group that may (often: adduser USER kvm, then log in anew)"
    access = kvm_access(confinement)
    with InheritedFds() as inherited:
        kvm_fd = None
        if access.by_descriptor:
            if not build.takes_kvm_as_descriptor:
                return (
                    f"{_KVM} is for root only, QEMU runs as another user, and this QEMU can't be handed the open"
                    f" device (9.0 can): let a group other than root's have it (chgrp kvm {_KVM}; chmod 660 {_KVM})"
                )
            try:
                kvm_fd = inherited.open(_KVM, os.O_RDWR)
            except OSError as exc:
                return f"{_KVM} can't be opened: {exc.strerror}"
        return await run_probe(
            build,
            base_argv("kvm", kvm_fd=kvm_fd),
            prefix=confinement.argv(confinement.choose_uid(), groups=access.groups),
            inherited=inherited,
            environment=environment,
            deadline=deadline,
        )


async def run_probe(
    build: QemuBuild,
    argv: list[str],
    *,
    prefix: list[str],
    inherited: InheritedFds,
    environment: Mapping[str, str],
    deadline: float,
    firmware: bytes | None = None,
) -> str | None:
    """Run the probe's guest; return why it failed, None if it ran.

    Args:
      build: The QEMU.
      argv: Its arguments, without the guest's.
      prefix: The confinement's command.
      inherited: Descriptors that *argv* names; closed here.
      environment: `Runtime.environment`.
      deadline: Seconds for all of it; QEMU is killed then.
      firmware: Another guest, for tests.
    """
    image = inherited.add(os.memfd_create("probe", os.MFD_CLOEXEC))
    os.write(image, probe_firmware() if firmware is None else firmware)
    argv = [*argv, "-m", "4M", "-bios", f"/proc/self/fd/{image}", "-device", "isa-debug-exit,iobase=0x501,iosize=1"]
    with trio.move_on_after(deadline):
        process = await run_owned(
            [*prefix, build.path, *argv],
            environment={**minimal_environment(), **environment},
            inherited=inherited,
        )
        if process.returncode == _PROBE_STATUS:
            return None
        said = " ".join(process.output().split())
        return f"QEMU {describe_exit(process.returncode or 0)} instead of running a guest: {said or 'it said nothing'}"
    return f"a guest of a few instructions did not run within {deadline:g} s, though QEMU started"


@final
@attrs.frozen
class _CacheEntry:
    key: str
    version: tuple[int, ...]
    failure: str | None


def _cache_key(confinement: Confinement, timeouts: Timeouts) -> str:
    """Return what changes whenever the verdict could."""
    build = locate_qemu()
    try:
        node = os.stat(_KVM)
        device = f"{node.st_rdev} {node.st_mode:o} {node.st_uid} {node.st_gid}"
    except OSError as exc:
        device = str(exc.errno)
    groups = sorted(os.getgroups())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    parts = (boot, build, device, os.geteuid(), groups, confinement, timeouts.accelerator_probe, probe_firmware())
    # Also our own arguments: another release of ours may use another CPU model.
    return hashlib.sha256(repr((parts, base_argv("kvm"))).encode()).hexdigest()


def _read_cache(cache_dir: Path, key: str) -> _CacheEntry | None:
    try:
        fields = Fields(read_json(cache_dir / _CACHE_FILE))
        failure = None if fields.values().get("failure") is None else fields.text("failure")
        version = tuple(int(number) for number in fields.text("version").split("."))
        if fields.text("key") == key:
            return _CacheEntry(key, version, failure)
    except FileNotFoundError:
        return None
    except OSError as exc:
        _log.warning("can't read the accelerator's cached verdict: %s", exc)
    except ValueError as exc:
        _log.warning("the accelerator's cached verdict is damaged (%s) and is found anew", exc)
    return None


def _write_cache(cache_dir: Path, entry: _CacheEntry) -> None:
    version = ".".join(str(number) for number in entry.version)
    text = json.dumps({"key": entry.key, "version": version, "failure": entry.failure}, indent=2)
    try:
        make_private_directory(cache_dir)
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, prefix=".accelerator-", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.replace(file.name, cache_dir / _CACHE_FILE)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as exc:
        _log.warning("can't remember the accelerator's verdict: %s", exc)
