"""Run untrusted code in throw-away QEMU virtual machines, the Trio way.

    async with open_sandbox("python") as sandbox:
        result = await sandbox.run("print(6 * 7)")

When the block exits, the VM is destroyed. Cancelling the caller stops the guest code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# The redundant aliases are what type checkers read as "exported".
from ._config import (
    HostConfig as HostConfig,
    Progress as Progress,
    SandboxConfig as SandboxConfig,
    SandboxFields as SandboxFields,
    Timeouts as Timeouts,
)
from ._display import Display as Display
from ._errors import (
    BalloonError as BalloonError,
    CapacityError as CapacityError,
    ConfinementRequiredError as ConfinementRequiredError,
    DeadlinePassedError as DeadlinePassedError,
    GuestProtocolError as GuestProtocolError,
    HardwareRequiredError as HardwareRequiredError,
    ImageBuildError as ImageBuildError,
    ImageCorruptError as ImageCorruptError,
    ImageError as ImageError,
    ImageMissingError as ImageMissingError,
    MissingProgramError as MissingProgramError,
    MountError as MountError,
    NetworkUnavailableError as NetworkUnavailableError,
    OutcomeUnknownError as OutcomeUnknownError,
    OutputLimitError as OutputLimitError,
    QemuStorageDaemonError as QemuStorageDaemonError,
    QMPClosedError as QMPClosedError,
    QMPCommandError as QMPCommandError,
    QMPConnectError as QMPConnectError,
    QMPError as QMPError,
    QMPProtocolError as QMPProtocolError,
    RunRefusedError as RunRefusedError,
    SandboxClosedError as SandboxClosedError,
    SandboxError as SandboxError,
    SandboxHibernatedError as SandboxHibernatedError,
    SnapshotError as SnapshotError,
    TemplateError as TemplateError,
    TemplateExistsError as TemplateExistsError,
    TemplateUnusableError as TemplateUnusableError,
    UnknownImageError as UnknownImageError,
    UnknownTemplateError as UnknownTemplateError,
    VmBootError as VmBootError,
    VmDiedError as VmDiedError,
    VmError as VmError,
    WarmupError as WarmupError,
)
from ._metadata import fix_module_metadata, version as _version
from ._network import Network as Network, NetworkRule as NetworkRule
from ._results import (
    ProcessFailedError as ProcessFailedError,
    RunFailedError as RunFailedError,
    RunOutput as RunOutput,
    RunResult as RunResult,
)
from .client import (
    GuestInput as GuestInput,
    GuestOutput as GuestOutput,
    GuestProcess as GuestProcess,
    GuestTerminal as GuestTerminal,
    OutputChunk as OutputChunk,
    RunEvents as RunEvents,
    Terminal as Terminal,
)
from .host import Host as Host, HostStatistics as HostStatistics, open_host as open_host, open_sandbox as open_sandbox
from .machines import AdmissionStatistics as AdmissionStatistics, WarmStatistics as WarmStatistics
from .network import NetworkEvent as NetworkEvent, NetworkStatistics as NetworkStatistics, NetworkWatch as NetworkWatch
from .sandbox import (
    Checkpoint as Checkpoint,
    FileChange as FileChange,
    FileChanges as FileChanges,
    GuestFile as GuestFile,
    GuestPath as GuestPath,
    GuestTextFile as GuestTextFile,
    Sandbox as Sandbox,
    SandboxStatistics as SandboxStatistics,
    TransferStatistics as TransferStatistics,
    Usage as Usage,
)

fix_module_metadata(__name__, globals())

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Find out the version when it is asked for: that takes a tenth of the time of importing all of this."""
        if name == "__version__":
            return _version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


del TYPE_CHECKING, fix_module_metadata
