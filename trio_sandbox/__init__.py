"""Run untrusted code in throw-away QEMU virtual machines, the Trio way.

    async with open_sandbox("python") as sandbox:
        result = await sandbox.run("print(6 * 7)")

When the block exits, the VM is destroyed. Cancelling the caller stops the guest code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._metadata import ORIGINS as _ORIGINS, ROOMS as _ROOMS, version as _version

if TYPE_CHECKING:
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
        DrainingError as DrainingError,
        FleetError as FleetError,
        GuestProtocolError as GuestProtocolError,
        HardwareRequiredError as HardwareRequiredError,
        ImageBuildError as ImageBuildError,
        ImageCorruptError as ImageCorruptError,
        ImageError as ImageError,
        ImageMissingError as ImageMissingError,
        LinkError as LinkError,
        LinkProtocolError as LinkProtocolError,
        MissingProgramError as MissingProgramError,
        MountError as MountError,
        NetworkUnavailableError as NetworkUnavailableError,
        NodeLostError as NodeLostError,
        OciError as OciError,
        OutcomeUnknownError as OutcomeUnknownError,
        OutputLimitError as OutputLimitError,
        PackagesError as PackagesError,
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
        WheelMissingError as WheelMissingError,
        WorkspaceConflictError as WorkspaceConflictError,
        WrongNodeError as WrongNodeError,
    )
    from ._image import Image as Image
    from ._network import Network as Network, NetworkRule as NetworkRule
    from ._results import (
        ProcessFailedError as ProcessFailedError,
        ProcessUsage as ProcessUsage,
        RunFailedError as RunFailedError,
        RunOutput as RunOutput,
        RunResult as RunResult,
        RunTimings as RunTimings,
    )
    from ._workspace_change import WorkspaceChange as WorkspaceChange
    from .client import (
        GuestInput as GuestInput,
        GuestOutput as GuestOutput,
        GuestProcess as GuestProcess,
        GuestTerminal as GuestTerminal,
        OutputChunk as OutputChunk,
        RunEvents as RunEvents,
        Terminal as Terminal,
    )
    from .host import (
        Host as Host,
        open_host as open_host,
        open_sandbox as open_sandbox,
    )
    from .machines import (
        AdmissionStatistics as AdmissionStatistics,
        HostStatistics as HostStatistics,
        MemoryStatistics as MemoryStatistics,
        SavedSandbox as SavedSandbox,
        WarmStatistics as WarmStatistics,
        remove_saved_sandbox as remove_saved_sandbox,
        saved_sandboxes as saved_sandboxes,
    )
    from .network import (
        NetworkEvent as NetworkEvent,
        NetworkStatistics as NetworkStatistics,
        NetworkWatch as NetworkWatch,
    )
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

    __version__: str
else:
    __all__ = tuple(_ORIGINS)

    def __getattr__(name: str) -> object:
        """Import what is asked for when it is: a program that needs little, such as ``trio-sandbox --help``, starts at once."""
        import importlib

        if name in _ORIGINS:
            value = getattr(importlib.import_module(f".{_ORIGINS[name]}", __name__), name)
        elif name in _ROOMS:
            value = importlib.import_module(f".{name}", __name__)
        elif name == "__version__":
            value = _version()
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_ORIGINS, *_ROOMS, "__version__"})


del TYPE_CHECKING
