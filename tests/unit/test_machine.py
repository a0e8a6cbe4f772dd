"""QEMU's command line as a function of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_sandbox.qemu._build import parse_version
from trio_sandbox.qemu._machine import MachineConfig, MachineFds, machine_argv, machine_identity, stand_in_kernel

CONFIG = MachineConfig(
    kernel=Path("/store/vmlinuz"),
    initrd=Path("/store/initrd.img"),
    kernel_args=("console=ttyS0", "quiet"),
    system_disk=Path("/store/system.img"),
    image=Path("/store/image.qcow2"),
    overlay=Path("/run/1.qcow2"),
    memory_mib=192,
    vcpus=2,
)
FDS = MachineFds(
    kernel=10,
    initrd=11,
    system_disk=12,
    image=13,
    overlay=14,
    frozen_overlay=24,
    qmp=15,
    agent=16,
    console=17,
    memory=18,
)

GOLDEN = """\
-name trio-sandbox
-nodefaults
-no-user-config
-display none
-no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,usb=off,smbus=off,sata=off,vmport=off,dump-guest-core=off,suppress-vmdesc=on
-accel tcg,thread=multi,tb-size=64
-cpu qemu64,-vmx,-svm,+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt
-m 192M
-smp 2
-object {"qom-type":"memory-backend-file","id":"ram","size":201326592,"mem-path":"/proc/self/fd/18","share":true}
-machine memory-backend=ram
-global migration.send-configuration=off
-kernel /proc/self/fd/10
-initrd /proc/self/fd/11
-append console=ttyS0 quiet norandmaps
-chardev socket,id=qmp,fd=15
-mon chardev=qmp,mode=control
-chardev socket,id=console,fd=17
-device isa-serial,chardev=console
-add-fd fd=12,set=12
-blockdev {"driver":"file","node-name":"system-file","filename":"/dev/fdset/12","read-only":true,"locking":"off"}
-blockdev {"driver":"raw","node-name":"system","file":"system-file","read-only":true}
-device virtio-blk-pci,drive=system,serial=system,werror=report,rerror=report
-add-fd fd=13,set=13
-blockdev {"driver":"file","node-name":"image-file","filename":"/dev/fdset/13","read-only":true,"locking":"off"}
-blockdev {"driver":"qcow2","node-name":"image","file":"image-file","read-only":true,"backing":null}
-add-fd fd=14,set=14,opaque=writable
-add-fd fd=24,set=14
-blockdev {"driver":"file","node-name":"overlay-file","filename":"/dev/fdset/14","read-only":false,\
"discard":"unmap","cache":{"direct":false,"no-flush":true},"auto-read-only":true,"locking":"off"}
-blockdev {"driver":"qcow2","node-name":"overlay","file":"overlay-file","backing":"image",\
"discard":"unmap","cache":{"direct":false,"no-flush":true}}
-device virtio-blk-pci,drive=overlay,serial=overlay,werror=report,rerror=report
-blockdev {"driver":"null-co","node-name":"mounts-file","size":68719476736,"read-zeroes":true,"read-only":true}
-blockdev {"driver":"raw","node-name":"mounts","file":"mounts-file","read-only":true}
-device virtio-blk-pci,drive=mounts,serial=mounts,werror=report,rerror=report
-device virtio-serial-pci,id=serial0,max_ports=2
-chardev socket,id=agent,fd=16
-device virtserialport,bus=serial0.0,chardev=agent,name=org.trio-sandbox.agent
-object rng-builtin,id=rng0
-device virtio-rng-pci,rng=rng0
"""


def lines(argv: list[str]) -> str:
    """Write one option a line."""
    return "".join(f"\n{word}" if word.startswith("-") else f" {word}" for word in argv).lstrip("\n") + "\n"


def test_tcg() -> None:
    assert lines(machine_argv(CONFIG, "tcg", FDS)) == GOLDEN


def test_kvm_differs_in_accelerator_cpu_and_random_addresses_only() -> None:
    expected = (
        GOLDEN.replace("-accel tcg,thread=multi,tb-size=64", "-accel kvm")
        .replace("qemu64,-vmx,-svm,+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt", "host,-vmx,-svm")
        .replace(" norandmaps", "")
    )
    assert lines(machine_argv(CONFIG, "kvm", FDS)) == expected


def test_kvm_as_a_descriptor() -> None:
    argv = machine_argv(CONFIG, "kvm", attrs.evolve(FDS, kvm=19))
    assert "-add-fd fd=19,set=19\n-accel kvm,device=/dev/fdset/19\n-cpu host,-vmx,-svm\n" in lines(argv)


def test_a_raw_image_has_no_backing_file_to_deny() -> None:
    argv = machine_argv(attrs.evolve(CONFIG, image_format="raw"), "tcg", FDS)
    nodes = [json.loads(word) for word in argv if word.startswith("{")]
    assert {"driver": "raw", "node-name": "image", "file": "image-file", "read-only": True} in nodes


def test_what_boots_no_kernel_reads_no_initial_ram_disk() -> None:
    argv = machine_argv(CONFIG, "tcg", attrs.evolve(FDS, initrd=None), incoming=True)
    assert "-kernel" in argv
    assert "-initrd" not in argv


def test_memory_that_is_never_written_to_is_opened_for_reading_only() -> None:
    private = attrs.evolve(CONFIG, memory_file=Path("/store/memory"))
    for machine, read_only in ((private, True), (attrs.evolve(private, memory_shared=True), False), (CONFIG, False)):
        for asked in (True, False):
            argv = machine_argv(machine, "tcg", FDS, memory_read_only=asked)
            assert ('"share":false,"readonly":true,"rom":"off"' in " ".join(argv)) == (asked and read_only)


def test_no_path_of_the_hosts_is_named() -> None:
    """QEMU opens its own firmware and libraries by name, and nothing else."""
    argv = " ".join(machine_argv(CONFIG, "tcg", FDS))
    for path in (CONFIG.kernel, CONFIG.initrd, CONFIG.system_disk, CONFIG.image, CONFIG.overlay):
        assert str(path) not in argv


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_mib": 127}, "`memory_mib` must be at least 128 MiB, not 127"),
        ({"vcpus": 0}, "`vcpus` must be from 1 to 64, not 0"),
        ({"vcpus": 65}, "`vcpus` must be from 1 to 64, not 65"),
        ({"kernel_args": ("a b",)}, "words without spaces, not 'a b'"),
        ({"kernel_args": ("a\n",)}, "printable words"),
        ({"kernel_args": ("",)}, "printable words"),
        ({"image_format": "vmdk"}, "`image_format` must be 'qcow2' or 'raw', not 'vmdk'"),
    ],
)
def test_machines_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attrs.evolve(CONFIG, **changes)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright ...", (7, 2, 22)),
        ("QEMU emulator version 10.0.2", (10, 0, 2)),
        ("QEMU emulator version 9.0", (9, 0, 0)),
    ],
)
def test_parse_version(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_parse_version_of_something_else() -> None:
    with pytest.raises(ValueError, match="no version in 'hello'"):
        parse_version("hello")


def test_a_clone_has_its_ram_in_a_file_and_frozen_layers_below_its_overlay() -> None:
    config = attrs.evolve(CONFIG, layers=("/t/a.qcow2", "/t/b.qcow2"), memory_file=Path("/t/memory"))
    argv = machine_argv(config, "tcg", attrs.evolve(FDS, layers=(20, 21), memory=22), incoming=True)
    assert '"mem-path":"/proc/self/fd/22","share":false}\n-machine memory-backend=ram\n' in lines(argv)
    assert "\n-incoming defer\n" in lines(argv)
    nodes = {
        node["node-name"]: node for word in argv if word.startswith("{") and "node-name" in (node := json.loads(word))
    }
    assert [nodes[name]["backing"] for name in ("image", "layer0", "layer1", "overlay")] == [
        None,
        "image",
        "layer0",
        "layer1",
    ]
    assert [nodes[name]["read-only"] for name in ("layer0", "layer0-file", "layer1", "layer1-file")] == [True] * 4
    assert "/t/" not in " ".join(argv)


def test_layers_of_the_image_are_below_those_of_the_machine() -> None:
    config = attrs.evolve(CONFIG, image_layers=("/s/1.qcow2", "/s/2.qcow2"), layers=("/t/a.qcow2",))
    argv = machine_argv(config, "tcg", attrs.evolve(FDS, image_layers=(20, 21), layers=(22,)))
    nodes = {
        node["node-name"]: node for word in argv if word.startswith("{") and "node-name" in (node := json.loads(word))
    }
    chain = ["overlay"]
    while backing := nodes[chain[-1]]["backing"]:
        chain.append(backing)
    assert chain == ["overlay", "layer0", "image-layer1", "image-layer0", "image"]
    assert [nodes[f"{name}-file"]["filename"] for name in chain[1:4]] == [f"/dev/fdset/{fd}" for fd in (22, 21, 20)]
    assert all(nodes[name]["read-only"] and nodes[f"{name}-file"]["read-only"] for name in chain[1:])
    assert "/s/" not in " ".join(argv)
    # What the image is made of is in its digest: a state of one machine does not load into another for that.
    assert machine_identity(config, "tcg") == machine_identity(CONFIG, "tcg")


def test_the_machine_that_is_saved_differs_from_its_clones_where_it_must_only() -> None:
    config = attrs.evolve(CONFIG, memory_file=Path("/t/memory"))
    clone = machine_argv(config, "tcg", attrs.evolve(FDS, memory=22), incoming=True)
    saved = machine_argv(attrs.evolve(config, memory_shared=True), "tcg", attrs.evolve(FDS, memory=22))
    assert [word.replace('"share":true', '"share":false') for word in saved] == [
        word for word in clone if word not in ("-incoming", "defer")
    ]


def test_a_balloon_is_never_on_memory_that_others_share() -> None:
    """A guest needs no invitation to give memory back, so the device must not be there."""
    balloon = "-device virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on\n"
    assert lines(machine_argv(attrs.evolve(CONFIG, balloon=True), "tcg", FDS)) == GOLDEN + balloon
    own = attrs.evolve(CONFIG, memory_file=Path("/t/memory"), memory_shared=True, balloon=True)
    assert machine_identity(own, "tcg") != machine_identity(attrs.evolve(own, balloon=False), "tcg")
    with pytest.raises(ValueError, match="`balloon` can't have a private copy of its `memory_file`"):
        attrs.evolve(own, memory_shared=False)


def test_mounts_are_a_file_where_there_is_nothing_otherwise() -> None:
    with_mounts = lines(machine_argv(attrs.evolve(CONFIG, mounts="/m"), "tcg", attrs.evolve(FDS, mounts=23)))
    (empty,) = [line for line in GOLDEN.splitlines() if "null-co" in line]
    file = (
        "-add-fd fd=23,set=23\n"
        '-blockdev {"driver":"file","node-name":"mounts-file","filename":"/dev/fdset/23","read-only":true,"locking":"off"}'
    )
    assert with_mounts == GOLDEN.replace(empty, file)
    assert machine_identity(attrs.evolve(CONFIG, mounts="/m"), "tcg") == machine_identity(CONFIG, "tcg")


def test_what_a_saved_state_depends_on() -> None:
    assert machine_identity(CONFIG, "tcg") == machine_identity(attrs.evolve(CONFIG, overlay=Path("/x")), "tcg")
    for other in (
        machine_identity(attrs.evolve(CONFIG, memory_mib=256), "tcg"),
        machine_identity(attrs.evolve(CONFIG, vcpus=1), "tcg"),
        machine_identity(attrs.evolve(CONFIG, kernel_args=("quiet",)), "tcg"),
        machine_identity(CONFIG, "kvm"),
    ):
        assert other != machine_identity(CONFIG, "tcg")


def test_the_stand_in_kernel_is_an_elf_file_with_an_entry() -> None:
    kernel = stand_in_kernel()
    assert kernel.startswith(b"\x7fELF\x01\x01\x01")
    assert b"Xen\x00\x00\x00\x10\x00" in kernel
    assert len(kernel) < 200
