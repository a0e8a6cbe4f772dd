"""Which QEMU is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, final

import attrs

from .._errors import SandboxError
from ._process import describe_exit, minimal_environment, require_program, run_owned

QEMU: Final = "qemu-system-x86_64"


@final
@attrs.frozen
class QemuBuild:
    """One installed QEMU; another one at the same path is not equal to it."""

    path: str
    size: int
    modified_ns: int
    version: tuple[int, ...]
    """For instance ``(7, 2, 22)``."""

    def __str__(self) -> str:
        return f"{self.path} {'.'.join(str(number) for number in self.version)}"

    @property
    def takes_kvm_as_descriptor(self) -> bool:
        """``-accel kvm,device=/dev/fdset/N``: since 9.0."""
        return self.version >= (9, 0)

    @property
    def opens_memory_read_only(self) -> bool:
        """A machine with a private copy of its RAM's file opens that for reading only, if told so: since 8.2. See `_read_only_open`."""
        return self.version >= (8, 2)


def parse_version(text: str) -> tuple[int, ...]:
    """Read what ``--version`` printed.

    Raises:
      ValueError: if there is no version in it.
    """
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise ValueError(f"no version in {text!r}")
    return tuple(int(number) for number in match.groups(default="0"))


def locate_qemu() -> QemuBuild:
    """Find QEMU, its version left empty.

    Raises:
      MissingProgramError: if it is not installed.
    """
    path = require_program(QEMU)
    status = os.stat(path)
    return QemuBuild(path, status.st_size, status.st_mtime_ns, ())


async def inspect_qemu(environment: Mapping[str, str]) -> QemuBuild:
    """Find QEMU, and run it for its version.

    Args:
      environment: `Runtime.environment`.

    Raises:
      MissingProgramError: if it is not installed.
      SandboxError: if it does not run.
    """
    build = locate_qemu()
    process = await run_owned([build.path, "--version"], environment={**minimal_environment(), **environment})
    try:
        return attrs.evolve(build, version=parse_version(process.output()))
    except ValueError as exc:
        how = describe_exit(process.returncode or 0)
        raise SandboxError(f"{build.path} --version {how} and printed {process.output()!r}") from exc
