"""What machine a sandbox's configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .._config import SandboxConfig
from ..image import BuiltImage, ImageSettings, SystemDisk
from ..qemu import MachineConfig

#: Tells the guest of `SandboxConfig.guest_namespaces`. It boots with that, and so keeps it in every saved state.
GUEST_NAMESPACES: Final = "trio_sandbox.namespaces"


def _settings(settings: ImageSettings) -> tuple[str, ...]:
    """Tell the guest how programs of a container image start."""
    return (
        f"trio_sandbox.user={settings.user}:{settings.group}",
        f"trio_sandbox.directory={settings.directory.encode().hex()}",
    )


def describe_machine(
    image: BuiltImage, system: SystemDisk, config: SandboxConfig, *, overlay: Path, balloon: bool
) -> MachineConfig:
    """Return the machine that boots *image*; it has no mounts yet."""
    return MachineConfig(
        kernel=system.kernel,
        initrd=system.initrd,
        kernel_args=(
            *system.kernel_args,
            # The guest starts the interpreter that will be wanted while the rest of it boots.
            f"trio_sandbox.language={image.language or 'none'}",
            *(() if image.settings is None else _settings(image.settings)),
            *([GUEST_NAMESPACES] if config.guest_namespaces else ()),
        ),
        system_disk=system.disk,
        image=image.path,
        image_layers=image.layers,
        overlay=overlay,
        disk_bytes=None if config.disk_mib is None else config.disk_mib * 2**20,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        balloon=balloon,
    )
