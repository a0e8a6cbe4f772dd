"""The public surface is what is listed here, and every part of it says what it does."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator

import pytest

import trio_sandbox

PUBLIC: dict[str, str] = {
    "trio_sandbox": """
        AdmissionStatistics BalloonError CapacityError Checkpoint ConfinementRequiredError DeadlinePassedError Display FileChange FileChanges GuestFile GuestInput GuestOutput
        GuestPath GuestProcess GuestProtocolError GuestTerminal GuestTextFile HardwareRequiredError Host
        HostConfig HostStatistics Image ImageBuildError ImageCorruptError ImageError ImageMissingError MemoryStatistics
        MissingProgramError MountError Network NetworkEvent NetworkRule NetworkStatistics NetworkUnavailableError NetworkWatch NodeLostError DrainingError FleetError LinkError LinkProtocolError WrongNodeError OciError OutcomeUnknownError OutputChunk OutputLimitError PackagesError ProcessFailedError ProcessUsage Progress QMPClosedError
        QMPCommandError QMPConnectError QMPError QMPProtocolError QemuStorageDaemonError RunEvents
        RunFailedError RunOutput RunRefusedError RunResult RunTimings Sandbox SandboxClosedError SandboxConfig SandboxError SandboxFields SandboxHibernatedError SandboxStatistics SavedSandbox
        SnapshotError TemplateError TemplateExistsError TemplateUnusableError Terminal Timeouts TransferStatistics UnknownImageError UnknownTemplateError Usage VmBootError VmDiedError
        VmError WarmStatistics WarmupError WheelMissingError WorkspaceChange WorkspaceConflictError open_host open_sandbox remove_saved_sandbox saved_sandboxes
    """,
    "trio_sandbox.aio": """
        Checkpoint FileChange FileChanges GuestConnection GuestFile GuestInput GuestOutput GuestPath GuestProcess GuestTerminal GuestTextFile Host
        NetworkWatch RunEvents Sandbox Session Sessions open_host open_sandbox open_sessions
    """,
    "trio_sandbox.fleet": """
        FleetConfig FleetHost FleetStatistics NodeReport NodeStatistics TemplateReport drain_node open_ray_host read_reports
    """,
    "trio_sandbox.blocking": """
        Checkpoint FileChange FileChanges GuestConnection GuestFile GuestInput GuestOutput GuestPath GuestProcess GuestTerminal GuestTextFile Host
        NetworkWatch RunEvents Sandbox Session Sessions open_host open_sandbox open_sessions Expiry fail_after move_on_after
    """,
    "trio_sandbox.sessions": """
        OpensSandboxes Session SessionEnd Sessions SessionsConfig SessionsStatistics open_sessions open_sessions_with
    """,
    "trio_sandbox.testing": "Answer Call open_scripted_sandbox",
    "trio_sandbox.constants": """
        ACCELERATOR_PROBE_TIMEOUT ADMISSION_TIMEOUT AGENT_SILENCE_TIMEOUT BALLOON_INFLATE_TARGET_MIB BALLOON_SPARE_MIB BALLOON_TIMEOUT BOOT_TIMEOUT BUILD_MEMORY_MIB CALLS_AT_ONCE
        CALLS_PER_SECOND CONNECT_TIMEOUT DEFAULT_MAX_CONNECTIONS DEFAULT_MAX_DOWNLOAD_BYTES DEFAULT_MAX_OUTPUT_BYTES DEFAULT_MAX_PULL_BYTES DEFAULT_MEMORY_MIB
        DEFAULT_TEMPLATE_BUDGET_MIB DISK_RESERVE_MIB DISK_RESERVE_SHARE IMAGE_DISK_MIB INTERRUPT_GRACE KILL_TIMEOUT MAXIMUM_CALL_BYTES MAXIMUM_CALL_VALUES
        MAXIMUM_CONNECTIONS MAXIMUM_DISPLAYS MAXIMUM_FUNCTIONS MAXIMUM_LINE_BYTES MAXIMUM_MEMORY_OVERCOMMIT MAXIMUM_MOUNTS MAXIMUM_READ_BYTES MAXIMUM_REQUEST_BYTES
        MAXIMUM_VALUE_BYTES MAXIMUM_VCPUS MEMORY_BUDGET_SHARE MINIMUM_DISK_MIB MINIMUM_MEMORY_MIB MOUNTS_DISK_BYTES OUTPUT_TAIL_BYTES OVERLAY_TIMEOUT
        PROCESS_EXIT_GRACE QMP_COMMAND_TIMEOUT QMP_CONNECT_TIMEOUT
        QMP_EVENT_BUFFER QMP_LINE_LIMIT RECLAIM_AFTER STORAGE_DAEMON_START_TIMEOUT VCPUS_PER_CORE VM_OVERHEAD_MIB
    """,
}


def surface(module: types.ModuleType) -> set[str]:
    """Give the names that a user of the module sees."""
    return {
        name
        for name in dir(module)
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name)) and name != "annotations"
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_the_surface_is_the_list(name: str) -> None:
    assert surface(importlib.import_module(name)) == set(PUBLIC[name].split())


def public_objects() -> Iterator[tuple[str, object]]:
    """Give every public class and function, and the public methods and properties of our classes, inherited ones too."""
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        for name in names.split():
            value: object = getattr(module, name)
            if not isinstance(value, (type, types.FunctionType)):
                continue
            yield f"{module_name}.{name}", value
            if isinstance(value, type):
                ours = [vars(base) for base in reversed(value.__mro__) if base.__module__.startswith("trio_sandbox")]
                for attribute, member in {name: member for members in ours for name, member in members.items()}.items():
                    if not attribute.startswith("_") and isinstance(
                        member, (types.FunctionType, property, classmethod, staticmethod)
                    ):
                        yield f"{module_name}.{name}.{attribute}", member


@pytest.mark.parametrize(("name", "value"), [pytest.param(*item, id=item[0]) for item in public_objects()])
def test_everything_public_has_a_docstring(name: str, value: object) -> None:
    # Of a class, its own: an inherited one would be about something else.
    text: object = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert isinstance(text, str)
    assert text.strip()


@pytest.mark.parametrize("name", PUBLIC["trio_sandbox"].split())
def test_public_objects_name_the_module_that_users_import(name: str) -> None:
    value = getattr(importlib.import_module("trio_sandbox"), name)
    assert value.__module__ == "trio_sandbox"


def test_every_exception_says_whether_a_retry_is_safe() -> None:
    module = importlib.import_module("trio_sandbox")
    exceptions: list[type[BaseException]] = [
        value
        for name in PUBLIC["trio_sandbox"].split()
        if isinstance(value := getattr(module, name), type) and issubclass(value, BaseException)
    ]
    assert len(exceptions) > 20
    for exception in exceptions:
        # A process that failed is what it is on the host: nothing is wrong with the sandbox.
        assert issubclass(exception, (trio_sandbox.SandboxError, trio_sandbox.ProcessFailedError))
        assert isinstance(exception.retry_safe, bool)
