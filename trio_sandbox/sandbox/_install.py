"""Packages for a sandbox that runs: what packs them asks the sandbox, and the sandbox unpacks them."""

from __future__ import annotations

import mmap
import stat
from collections.abc import Sequence
from typing import Protocol, final

import attrs

from .._image_steps import PackagesStep
from ..image import PackageInstaller
from ._path import GuestPath
from ._requests import GuestRequests


class Installer(Protocol):
    """What installs packages in a sandbox, on the machine where its image is."""

    async def install(self, guest: GuestRequests, step: PackagesStep) -> None:
        """Do `Sandbox.install` in the sandbox that *guest* asks."""
        ...


@final
@attrs.frozen
class LocalInstaller:
    """Installs packages in a sandbox of this machine."""

    packages: PackageInstaller

    async def install(self, guest: GuestRequests, step: PackagesStep) -> None:
        """Do `Sandbox.install`."""
        await _install(guest, self.packages, step)


async def _install(sandbox: GuestRequests, installer: PackageInstaller, step: PackagesStep) -> None:
    async def ask(command: Sequence[str]) -> bytes:
        return (await sandbox.run_process(command, cwd="/", capture_stdout=True)).stdout or b""

    async with installer.open_archive(step, ask) as packed:
        if packed is None:
            return
        with packed.archive.open("rb") as file:
            # Not closed: it is gone with the last who looks at it.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if not packed.interpreter:
            await sandbox.run_process(packed.unpacking(""), stdin=content, cwd="/", user="root")
            return
        # Its name comes from the sandbox's code, perhaps, which must not become root by it.
        program = await sandbox.path(packed.interpreter, user="root").resolve()
        user = "root" if await _is_roots(program) else None
        await sandbox.run_process(packed.unpacking(str(program)), stdin=content, cwd="/", user=user)


async def _is_roots(program: GuestPath) -> bool:
    """Tell whether nobody but root can change a program, or what is on the way to it."""
    for path in (program, *program.parents):
        status = await path.stat(follow_symlinks=False)
        if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022:
            return False
    return True
