"""The pytest plugin: a fresh virtual machine for each test that asks for one.

It is a package of its own because pytest imports it in every run, whatever that tests, and importing
anything below `trio_sandbox` would import all of it. Nothing of ours is imported until a test uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from trio_sandbox import HostConfig, Image, Sandbox

#: What a test opened, for its report; the last few are enough.
OPENED: pytest.StashKey[deque[Sandbox]] = pytest.StashKey()
#: Lines of the console, and as many of the monitor, that go into a report.
_REPORTED_LINES = 60
#: Runs, the last ones, and characters of each of their outputs.
_REPORTED_RUNS = 3
_REPORTED_CHARACTERS = 2000


class SandboxFactory(Protocol):
    """The type of the fixture `sandbox_factory`, for annotations."""

    def __call__(self, *, image: str | Image = ..., **fields: object) -> AbstractAsyncContextManager[Sandbox]:
        """Open one more sandbox for a block, like `trio_sandbox.Host.open_sandbox`.

        Args:
          image: The name of the image, or a `trio_sandbox.Image`.
          **fields: Those of `trio_sandbox.SandboxConfig`. What is not given is as the test's marker says.

        Raises:
          TypeError, ValueError: for a field that does not exist, or can't have that value.

        """
        ...


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker and the asynchronous fixtures known."""
    config.addinivalue_line(
        "markers",
        "sandbox(*, image='python', **fields): what the fixtures `sandbox` and `sandbox_factory` open; "
        "the fields are those of trio_sandbox.SandboxConfig.",
    )
    # Not before now: every plugin that is installed has been loaded, so this does not load another.
    if config.pluginmanager.hasplugin("trio"):
        from . import _fixtures

        config.pluginmanager.register(_fixtures, "trio_sandbox fixtures")
    else:
        config.pluginmanager.register(_WithoutPytestTrio(), "trio_sandbox fixtures")


class _WithoutPytestTrio:
    """What the asynchronous fixtures are where nothing can run them."""

    @pytest.fixture
    def sandbox_host(self) -> None:
        """Say that pytest-trio is needed."""
        pytest.fail("trio_sandbox's fixtures need pytest-trio, which is not installed, or switched off", pytrace=False)

    @pytest.fixture
    def sandbox(self, sandbox_host: None) -> None:
        """Say that pytest-trio is needed."""

    @pytest.fixture
    def sandbox_factory(self, sandbox_host: None) -> None:
        """Say that pytest-trio is needed."""


@pytest.fixture
def sandbox_host_config(pytestconfig: pytest.Config) -> HostConfig:
    """How the fixture `sandbox_host` works: a `trio_sandbox.HostConfig`. Override it, in any scope, for another."""
    from trio_sandbox import HostConfig

    from ._progress import show_on_terminal

    return HostConfig(progress=show_on_terminal(pytestconfig))


@pytest.fixture
def requires_hardware(sandbox_host_config: HostConfig) -> None:
    """Skip the test where no hardware accelerator ran a guest, as software emulation is no security boundary."""
    import trio

    from trio_sandbox import HardwareRequiredError

    from ._hardware import prove_hardware

    try:
        trio.run(prove_hardware, sandbox_host_config)
    except HardwareRequiredError as exc:
        pytest.skip(str(exc))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what a failed test's virtual machines said to its report."""
    report = yield
    # pytest-trio's fixtures begin and end within the call.
    if call.when == "call" and OPENED in item.stash:
        opened = item.stash[OPENED]
        del item.stash[OPENED]  # items live as long as the whole run
        if report.failed:
            for number, sandbox in enumerate(opened, 1):
                title = f"sandbox {number} ({sandbox.image!s}, {sandbox.config.memory_mib} MiB, {sandbox.accelerator})"
                report.sections.append((f"{title}: last runs", _describe_runs(sandbox)))
                report.sections.append((f"{title}: console", _tail(sandbox.console())))
                report.sections.append((f"{title}: QMP", _tail(sandbox.qmp_log())))
    return report


def _describe_runs(sandbox: Sandbox) -> str:
    from trio_sandbox._quote import quote_lines

    lines: list[str] = []
    for output in sandbox.recent_runs()[-_REPORTED_RUNS:]:
        exit_code = "" if output.exit_code is None else f", exit code {output.exit_code}"
        lines.append(f"a run of {output.language}: {output.outcome}{exit_code}")
        for name, text in (("stdout", output.stdout), ("stderr", output.stderr)):
            if text:
                lines.append(f"{name}:\n{quote_lines(text, _REPORTED_CHARACTERS)}")
    return "\n".join(lines) or "(none)"


def _tail(text: str) -> str:
    lines = text.splitlines()
    left_out = len(lines) - _REPORTED_LINES
    if left_out > 0:
        lines[:left_out] = [f"({left_out} lines left out)"]
    return "\n".join(lines) or "(empty)"
