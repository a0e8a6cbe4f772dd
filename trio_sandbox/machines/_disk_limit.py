"""What a guest may write to its own disk: `SandboxConfig.disk_mib`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .. import constants
from .._errors import GuestProtocolError, OutcomeUnknownError, VmBootError
from ..client import ask
from ..qemu import Vm
from ._budget import disk_room

_LIMITED: Final = b"limited"


def choose_disk_mib(asked: int | None, directory: Path) -> int | None:
    """Return what a guest may write, in MiB, or None for as much as its image's disk has.

    Args:
      asked: `SandboxConfig.disk_mib`.
      directory: Where its disk is on the host. Whose limit nobody has set gets no more than is left there beside the reserve, so that
        one guest that fills its disk does not break those of others.

    """
    if asked is not None:
        return asked
    room = disk_room(directory)
    return None if room >= constants.IMAGE_DISK_MIB else max(room, constants.MINIMUM_DISK_MIB)


async def limit_disk(vm: Vm, disk_mib: int | None, *, patience: float) -> None:
    """Have the guest's kernel bound what is written to the disk of *vm* from now on: programs are told that the disk is full.

    For a guest that does not do so there is `MachineConfig.disk_bytes`; what is over that is an error of the disk.

    Args:
      vm: A machine in which no code of the sandbox runs yet.
      disk_mib: How much more than what is there already; None: as much as fits.
      patience: Seconds for the guest to do it.

    Raises:
      VmBootError: if it does not.
      GuestProtocolError: if it says what no agent of ours says.

    """
    header = {"service": "disk", "limit": None if disk_mib is None else disk_mib * 2**20}
    try:
        answer = await ask(vm, header, "a limit of its disk", most=len(_LIMITED), patience=patience)
    except OutcomeUnknownError as exc:
        raise VmBootError(f"the guest's disk was not limited: {exc}", console=vm.console()) from exc
    if answer != _LIMITED:
        raise GuestProtocolError(f"the guest answered a request to limit its disk with {answer!r}")
