"""Every exception of ours, in one tree.

    SandboxError
    ├── MissingProgramError          a program of the host's is not installed
    ├── HardwareRequiredError        no hardware accelerator works, and software emulation was refused
    ├── ConfinementRequiredError     the host does not allow all of QEMU's confinement
    ├── CapacityError                the request does not fit on this host
    ├── ImageError
    │   ├── UnknownImageError        no recipe and no image of that name
    │   ├── ImageMissingError        not built, and building was refused
    │   ├── ImageBuildError          building failed
    │   │   ├── PackagesError        packages can't be resolved or fetched
    │   │   │   └── WheelMissingError    a package has no wheel for the image
    │   │   └── OciError             a container image can't be fetched or used
    │   └── ImageCorruptError        the stored files are not what was built
    ├── QMPError
    │   ├── QMPConnectError          no QMP server answered as one should
    │   ├── QMPClosedError           the connection is gone
    │   ├── QMPProtocolError         the peer does not speak QMP
    │   └── QMPCommandError          QEMU refused a command
    ├── QemuStorageDaemonError       the storage daemon failed, refused or is not running
    ├── BalloonError                 the guest did not follow, or has no balloon
    ├── VmError
    │   ├── VmBootError              the guest never answered
    │   └── VmDiedError              the guest answered once, and is gone
    ├── GuestProtocolError           the guest broke the protocol; its VM was ended
    ├── SandboxClosedError           the sandbox was closed before the request was sent
    ├── SandboxHibernatedError       the sandbox was put to sleep; the request was not sent
    ├── OutcomeUnknownError          the request was sent, and its fate is unknown
    ├── FleetError                   a fleet could not be opened
    │   ├── LinkError                a node can't be connected to
    │   │   └── WrongNodeError       another program answers at its address
    │   ├── LinkProtocolError        a node, or its user, broke the protocol
    │   ├── DrainingError            the node opens no more sandboxes
    │   └── NodeLostError            a node, or the way to it, is gone
    ├── MountError                   a directory of `SandboxConfig.mounts` could not be mounted
    ├── DeadlinePassedError          the guest stopped it by itself, at a deadline that was moved meanwhile
    ├── WarmupError                  `SandboxConfig.warmup` failed
    ├── SnapshotError                a sandbox's state could not be saved
    ├── TemplateError
    │   ├── UnknownTemplateError     no template has that key or name
    │   ├── TemplateExistsError      a template of that name is there already
    │   └── TemplateUnusableError    a saved sandbox can't be restored here
    ├── RunRefusedError              the guest could not start a run
    ├── RunFailedError               the code of a run failed, and ``check=True`` was asked for
    ├── WorkspaceConflictError       a directory can't be brought back without losing something
    └── OutputLimitError             a run printed or showed more than it may

Wrong arguments are `TypeError` and `ValueError`, raised before anything is started.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from ._display import Display
from ._metadata import mark_public
from ._quote import quote_lines
from ._workspace_change import WorkspaceChange

#: Conflicts that a message names.
_SHOWN_CONFLICTS: Final = 20


class SandboxError(Exception):
    """Root of everything that this library raises on purpose.

    `retry_safe` says whether it is safe to try again.
    """

    retry_safe: bool = True
    """True: the failed request certainly had no effect inside a guest or on a file, so that asking again can't do
    anything twice. False: it may have had its effect."""

    def __reduce__(self) -> tuple[object, ...]:
        return remake_error, (type(self), arguments_of(self)), self.__dict__


def arguments_of(error: BaseException) -> tuple[object, ...]:
    """Return what `remake_error` makes the same error of, its attributes aside."""
    if isinstance(error, OSError) and error.filename is not None:
        return error.errno, error.strerror, error.filename
    return error.args


def remake_error(kind: type[BaseException], arguments: tuple[object, ...]) -> BaseException:
    """Make an error without calling its constructor, whose parameters are not what an exception keeps."""
    error = kind.__new__(kind, *arguments)
    if isinstance(error, OSError):
        OSError.__init__(error, *arguments)  # its parts are not in what it says its arguments are
    else:
        error.args = arguments
    return error


class MissingProgramError(SandboxError):
    """A program that we need is not installed; the message names its package, and the extra of ours that brings it if there is one."""

    def __init__(self, program: str, package: str, *, extra: str = "") -> None:
        super().__init__(
            f"{program} was not found on PATH; install the package {package} (Debian: apt-get install {package})"
            + (f", or the extra {extra}: pip install 'trio-sandbox[{extra}]'" if extra else "")
        )
        self.program = program
        """What was looked for on PATH."""
        self.package = package
        """The Debian package that has it."""


class HardwareRequiredError(SandboxError):
    """`require_hardware` was asked for, and no hardware accelerator ran a guest."""


class ConfinementRequiredError(SandboxError):
    """`HostConfig.confinement` is "require", and this host does not allow all of it. The message says what is missing, and what to do."""


class CapacityError(SandboxError):
    """The request can never fit on this host, the disk is nearly full, or others hold the memory it waited for. Nothing was started."""


class ImageError(SandboxError):
    """Root of the errors of images. The store is as it was."""


class UnknownImageError(ImageError):
    """No image has that name; the message lists those that exist."""


class ImageMissingError(ImageError):
    """The image is not in the store, and building it was refused."""


class ImageBuildError(ImageError):
    """Building failed; the log's last lines are in the message, and nothing half-built is left."""


class PackagesError(ImageBuildError):
    """The packages of an image can't be resolved or fetched; the message has uv's or npm's own words. Nothing was installed."""


class WheelMissingError(PackagesError):
    """A package has no wheel that fits the image, and building one would run its code on the host."""

    def __init__(self, message: str, *, package: str, version: str = "") -> None:
        super().__init__(message)
        self.package = package
        """The package's name."""
        self.version = version
        """The version that was looked at; "" where it is not said."""


class OciError(ImageBuildError):
    """A container image can't be fetched, or is not what it says, or more than may be. Nothing of it was stored."""


class ImageCorruptError(ImageError):
    """The stored files differ from what was built; removing and rebuilding the image helps."""


class QMPError(SandboxError):
    """Root of the errors between this library and a QMP server."""


class QMPConnectError(QMPError):
    """Nobody listened, the wrong user did, or the greeting did not come in time."""


class QMPClosedError(QMPError):
    """The connection is gone; `__cause__` says why. A command in flight may have run."""

    retry_safe = False
    """False: it may have had its effect."""


class QMPProtocolError(QMPError):
    """The peer sent something that is not QMP; the channel was closed."""

    retry_safe = False
    """False: it may have had its effect."""


class QMPCommandError(QMPError):
    """QEMU answered a command with an error: it did not take effect."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc} [{error_class}]")
        self.command = command
        """The command's name."""
        self.error_class = error_class
        """QEMU's kind of error, for instance ``"GenericError"``."""
        self.desc = desc
        """QEMU's own description."""


class QemuStorageDaemonError(SandboxError):
    """The storage daemon failed, refused or is not running; no overlay was left behind."""

    def __init__(self, message: str, *, error_class: str | None = None) -> None:
        super().__init__(message)
        self.error_class = error_class
        """QEMU's kind of error, where QEMU said something; else None."""


class BalloonError(SandboxError):
    """The guest did not follow in time, has no balloon, or must not use it."""


class VmError(SandboxError):
    """Something about one virtual machine, with the last of its console in `console`."""

    def __init__(self, message: str, *, console: str = "") -> None:
        if console:
            message = f"{message}\n--- the console's last lines ---\n{quote_lines(console)}"
        super().__init__(message)
        self.console = console
        """The last lines of the guest's console, as the guest printed them."""


class VmBootError(VmError):
    """The virtual machine started, and its agent never answered."""


class VmDiedError(VmError):
    """The virtual machine ended, crashed or was killed after it had come up."""

    retry_safe = False
    """False: it may have had its effect."""


class GuestProtocolError(SandboxError):
    """The guest broke the protocol. Its VM was destroyed; nothing else was touched."""

    retry_safe = False
    """False: it may have had its effect."""


class SandboxClosedError(SandboxError):
    """The sandbox or its host is closed; the request was not sent. Use another sandbox."""


class SandboxHibernatedError(SandboxError):
    """The sandbox was put to sleep by `Sandbox.hibernate`; the request was not sent. Ask again after `Sandbox.resume`."""


class OutcomeUnknownError(SandboxError):
    """The request was sent and the answer never came; it may have had its effect.

    Only you know whether it may be done twice. Open another sandbox for it, or revert to a checkpoint.
    """

    retry_safe = False
    """False: it may have had its effect."""


class FleetError(SandboxError):
    """A fleet could not be opened; the message says why, and nothing is left of it. Or one of its nodes failed, as the subclasses say."""


class LinkError(FleetError):
    """A node of a fleet can't be connected to; the message says why. Nothing was asked of it."""


class WrongNodeError(LinkError):
    """The peer at a node's address has another certificate than that node. Nothing was sent to it."""


class LinkProtocolError(FleetError):
    """A node of a fleet, or its user, sent something that this version never sends."""

    retry_safe = False
    """False: it may have had its effect."""


class DrainingError(FleetError):
    """The node is being drained. Nothing was started; try again, and another node may do it."""


class NodeLostError(FleetError):
    """A node of a fleet, or the way to it, is gone, and with it the sandboxes that it had; others continue.

    It is the cause of what requests raise: `SandboxClosedError` for one that was not sent, `OutcomeUnknownError` for one that was.
    """

    retry_safe = False
    """False: it may have had its effect."""

    def __init__(self, message: str, *, node: str = "") -> None:
        super().__init__(message)
        self.node = node
        """The node's name."""


class DeadlinePassedError(SandboxError):
    """The guest stopped a run or a process by itself, at the deadline of the block that had started it.

    This happens if the event loop is blocked when the deadline passes. Usually the block with the deadline is cancelled, and
    nobody sees this error. You see it if you moved the deadline and the loop had no turn since to tell the guest, or if you
    wait outside that block for what was started in it.
    """

    retry_safe = False
    """False: it may have had its effect."""


class MountError(SandboxError):
    """A directory of `SandboxConfig.mounts` can't be read, is too large or could not be mounted. No sandbox was opened."""


class WarmupError(SandboxError):
    """The code of `SandboxConfig.warmup` failed; the message has its traceback. No sandbox was opened."""


class SnapshotError(SandboxError):
    """A sandbox's state could not be saved, and nothing is left of the attempt. The sandbox lives on, unless the message says otherwise."""


class TemplateError(SandboxError):
    """Root of the errors of templates. The stored ones are as they were."""


class UnknownTemplateError(TemplateError):
    """No template has that key or name; the message lists those that exist."""


class TemplateExistsError(TemplateError):
    """A template of that name is there already; choose another name, or say ``replace=True``."""


class TemplateUnusableError(TemplateError):
    """A saved sandbox can't be restored: it is damaged, or belongs to another QEMU, processor, image or version.

    The message says what differs. Only saving the sandbox once more makes it again.
    """


class NetworkUnavailableError(SandboxError):
    """The guest could not set up its side of the network. Nothing was opened, and the sandbox lives on without one."""


class RunRefusedError(SandboxError):
    """The guest did not start the run, for instance because the image has no interpreter of that language.

    If the directory for the run can't be entered, it is also an `OSError`: `FileNotFoundError`, `NotADirectoryError` or
    `PermissionError`, with that directory as its `filename`.
    """

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno: int | None = errno  # as OSError has it, which some of these are
        """The guest's reason as an error number, or 0."""


class _DirectoryRefusedError(RunRefusedError, OSError):
    """The directory for a run can't be changed to; the subclasses are what `OSError` makes of such an errno."""

    def __init__(self, errno: int, strerror: str, filename: str) -> None:
        OSError.__init__(self, errno, strerror, filename)


class _DirectoryNotFoundError(_DirectoryRefusedError, FileNotFoundError):
    pass


class _DirectoryIsNoneError(_DirectoryRefusedError, NotADirectoryError):
    pass


class _DirectoryForbiddenError(_DirectoryRefusedError, PermissionError):
    pass


def directory_refused(number: int, reason: str, directory: str) -> RunRefusedError:
    """Return the error of a run whose directory can't be changed to, which is an `OSError`, too."""
    kinds = {
        errno.ENOENT: _DirectoryNotFoundError,
        errno.ENOTDIR: _DirectoryIsNoneError,
        errno.EACCES: _DirectoryForbiddenError,
        errno.EPERM: _DirectoryForbiddenError,
    }
    return kinds.get(number, _DirectoryRefusedError)(number, reason, directory)


class WorkspaceConflictError(SandboxError):
    """A directory of the guest's can't be brought back without losing what was changed on the host.

    Nothing of it was brought back, unless the host's directory was changed meanwhile. It is safe to try again.
    """

    def __init__(
        self,
        remote: str,
        local: str,
        changes: Sequence[WorkspaceChange],
        conflicts: Sequence[WorkspaceChange],
    ) -> None:
        shown = "\n".join(f"  {change}" for change in conflicts[:_SHOWN_CONFLICTS])
        more = f"\n  and {len(conflicts) - _SHOWN_CONFLICTS} more" if len(conflicts) > _SHOWN_CONFLICTS else ""
        super().__init__(
            f"{remote!r:.200} can't be brought back to {local!r:.200} as it is. on_conflict='skip' leaves these out, and 'overwrite' takes the "
            f"guest's version where both were changed:\n{shown}{more}"
        )
        self.changes: tuple[WorkspaceChange, ...] = tuple(changes)
        """All that was to be done; those with a `WorkspaceChange.conflict` can't be."""


class OutputLimitError(SandboxError):
    """A run printed or displayed more than `SandboxConfig.max_output_bytes`, and was stopped."""

    retry_safe = False
    """False: it may have had its effect."""

    def __init__(
        self, message: str, *, stdout_bytes: bytes = b"", stderr_bytes: bytes = b"", displays: tuple[Display, ...] = ()
    ) -> None:
        super().__init__(message)
        self.stdout_bytes = stdout_bytes
        """Standard output that was not delivered yet, at most the limit."""
        self.stderr_bytes = stderr_bytes
        """The same of standard error."""
        self.displays = displays
        """Displays that were not delivered yet."""


mark_public(__name__, globals())
