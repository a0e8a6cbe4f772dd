"""Make public objects say the module that users import them from."""

from __future__ import annotations

from typing import Final

#: The names of `trio_sandbox`, by the modules that they are imported from when somebody asks for them.
PUBLIC: Final[dict[str, tuple[str, ...]]] = {
    "_config": (
        "HostConfig",
        "Progress",
        "SandboxConfig",
        "SandboxFields",
        "Timeouts",
    ),
    "_display": ("Display",),
    "_errors": (
        "BalloonError",
        "CapacityError",
        "ConfinementRequiredError",
        "DeadlinePassedError",
        "DrainingError",
        "FleetError",
        "GuestProtocolError",
        "HardwareRequiredError",
        "ImageBuildError",
        "ImageCorruptError",
        "ImageError",
        "ImageMissingError",
        "LinkError",
        "LinkProtocolError",
        "MissingProgramError",
        "MountError",
        "NetworkUnavailableError",
        "NodeLostError",
        "OciError",
        "OutcomeUnknownError",
        "OutputLimitError",
        "PackagesError",
        "QemuStorageDaemonError",
        "QMPClosedError",
        "QMPCommandError",
        "QMPConnectError",
        "QMPError",
        "QMPProtocolError",
        "RunRefusedError",
        "SandboxClosedError",
        "SandboxError",
        "SandboxHibernatedError",
        "SnapshotError",
        "TemplateError",
        "TemplateExistsError",
        "TemplateUnusableError",
        "UnknownImageError",
        "UnknownTemplateError",
        "VmBootError",
        "VmDiedError",
        "VmError",
        "WarmupError",
        "WheelMissingError",
        "WorkspaceConflictError",
        "WrongNodeError",
    ),
    "_image": ("Image",),
    "_network": (
        "Network",
        "NetworkRule",
    ),
    "_workspace_change": ("WorkspaceChange",),
    "_results": (
        "ProcessFailedError",
        "ProcessUsage",
        "RunFailedError",
        "RunOutput",
        "RunTimings",
        "RunResult",
    ),
    "client": (
        "GuestInput",
        "GuestOutput",
        "GuestProcess",
        "GuestTerminal",
        "OutputChunk",
        "RunEvents",
        "Terminal",
    ),
    "host": (
        "Host",
        "open_host",
        "open_sandbox",
    ),
    "machines": (
        "AdmissionStatistics",
        "HostStatistics",
        "MemoryStatistics",
        "SavedSandbox",
        "WarmStatistics",
        "remove_saved_sandbox",
        "saved_sandboxes",
    ),
    "network": (
        "NetworkEvent",
        "NetworkStatistics",
        "NetworkWatch",
    ),
    "sandbox": (
        "Checkpoint",
        "FileChange",
        "FileChanges",
        "GuestFile",
        "GuestPath",
        "GuestTextFile",
        "Sandbox",
        "SandboxStatistics",
        "TransferStatistics",
        "Usage",
    ),
}
#: The same by name.
ORIGINS: Final = {name: module for module, names in PUBLIC.items() for name in names}
#: Modules that ``import trio_sandbox`` is enough for.
ROOMS: Final = ("aio", "blocking", "constants", "fleet", "qemu", "sessions", "testing")


def fix_module_metadata(module: str, namespace: dict[str, object]) -> None:
    """Set `__module__` of what *namespace* re-exports, so that tracebacks and docs show the public path."""
    for name, value in namespace.items():
        defined_in: object = getattr(value, "__module__", None)
        if not name.startswith("_") and isinstance(defined_in, str) and defined_in.startswith("trio_sandbox."):
            try:
                value.__module__ = module
            except AttributeError:  # an alias of types, a constant: nothing to show
                continue


def mark_public(module: str, namespace: dict[str, object]) -> None:
    """Have what `trio_sandbox` exports of *module*, whose names are in *namespace*, say that it is of `trio_sandbox`."""
    names = PUBLIC[module.removeprefix("trio_sandbox.")]
    fix_module_metadata("trio_sandbox", {name: namespace[name] for name in names})


def version() -> str:
    """Return the installed version, or "0+unknown" when run from a tree that was never installed."""
    import importlib.metadata  # slow, and few ask

    try:
        return importlib.metadata.version("trio-sandbox")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
