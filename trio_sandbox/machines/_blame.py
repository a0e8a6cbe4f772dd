"""Why a machine was not restored from a saved state: whether the state may be to blame."""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

from .._errors import CapacityError, GuestProtocolError, QemuStorageDaemonError, VmError
from ..qemu import describe_exit

#: What restoring a saved state can raise: it is no good, or other processes leave no room for it.
RESTORE_FAILURES: Final = (VmError, GuestProtocolError, QemuStorageDaemonError, CapacityError, OSError)

#: What is said where somebody killed QEMU, or this host has too little of something.
_OF_THE_HOST: Final = (
    describe_exit(-signal.SIGKILL),
    *map(os.strerror, (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC)),
)


def blames_the_state(exc: Exception) -> bool:
    """Whether that may be the state's fault; where it is not, the next machine may be restored from it."""
    return not any(reason in first_line(exc) for reason in _OF_THE_HOST)


def first_line(exc: Exception) -> str:
    """Return what we say; what the guest says comes behind it."""
    return str(exc).partition("\n")[0]
