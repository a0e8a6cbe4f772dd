"""Virtual machines with the real QEMU, kernel and agent, for the tests that need one."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from trio_sandbox.image import BuiltImage, SystemDisk
from trio_sandbox.qemu import MachineConfig, Runtime, VmManager, detect_accelerator, open_runtime, open_vm_manager


@pytest.fixture
def config(system_disk: SystemDisk, python_image: BuiltImage, tmp_path: Path) -> MachineConfig:
    """Give a machine with an overlay of its own."""
    overlay = tmp_path / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(python_image.path), str(overlay)]
    subprocess.run(command, check=True)
    return MachineConfig(
        kernel=system_disk.kernel,
        initrd=system_disk.initrd,
        kernel_args=system_disk.kernel_args,
        system_disk=system_disk.disk,
        image=python_image.path,
        overlay=overlay,
    )


@pytest.fixture
async def runtime() -> AsyncGenerator[Runtime]:
    async with open_runtime(Path("/tmp")) as runtime:
        yield runtime


@pytest.fixture
async def manager(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[VmManager]:
    accelerator = await detect_accelerator(cache_dir=tmp_path_factory.getbasetemp(), environment=runtime.environment)
    async with open_vm_manager(runtime=runtime, accelerator=accelerator) as manager:
        yield manager
