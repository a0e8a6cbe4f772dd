"""Making a Debian file tree with mmdebstrap, as root or as an ordinary user."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from .._errors import ImageBuildError
from ..qemu._process import InheritedFds, run_owned
from ._apt_progress import AptProgress

#: What apt and its methods take from the environment. Everything else of the user's stays out.
_KEPT_VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LOG_BYTES = 64 * 2**10
#: Lines of mmdebstrap's output that go into an error message.
_LOG_LINES = 25


@attrs.frozen(kw_only=True)
class Bootstrap:
    """One run of mmdebstrap."""

    suite: str
    variant: str
    packages: tuple[str, ...]
    hooks: tuple[str, ...]
    """Shell scripts, with the tree as ``$1``, and mmdebstrap's own commands such as ``tar-in``; run in turn when the tree is complete."""

    @property
    def hook_option(self) -> str:
        """mmdebstrap runs customize hooks for every variant but "extract", whose last ones are the extract hooks."""
        return "--extract-hook" if self.variant == "extract" else "--customize-hook"


@asynccontextmanager
async def open_scratch(staging: Path, environment: Mapping[str, str]) -> AsyncGenerator[Path]:
    """Yield a directory where mmdebstrap may make its tree, and remove it and what is in it."""
    # TODO
    scratch = staging / "scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def run_mmdebstrap(
    bootstrap: Bootstrap,
    *,
    scratch: Path,
    inherited: InheritedFds,
    environment: Mapping[str, str],
    report: Callable[[str, float | None], object],
) -> None:
    """Make the tree, run the hooks in it, and throw it away.

    Raises:
      ImageBuildError: if mmdebstrap fails; the last of its output is in the message.
      MissingProgramError: if mmdebstrap is not installed.
    """
    progress = AptProgress(report)
    mode = "root" if os.geteuid() == 0 else "unshare"
    process = await run_owned(
        [
            "mmdebstrap",
            "--verbose",
            f"--mode={mode}",
            f"--variant={bootstrap.variant}",
            f"--include={','.join(bootstrap.packages)}",
            "--format=null",
            *(f"{bootstrap.hook_option}={hook}" for hook in bootstrap.hooks),
            bootstrap.suite,
            "/dev/null",
        ],
        environment=build_environment({**environment, "TMPDIR": os.fspath(scratch)}),
        inherited=inherited,
        tail_bytes=_LOG_BYTES,
        on_output=progress.feed,
    )
    if process.returncode != 0:
        raise build_error("mmdebstrap", process.output())


def build_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of every program that takes part in a build."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LC_ALL": "C.UTF-8", **kept, **extra}


def build_error(program: str, output: str) -> ImageBuildError:
    """Return the error for a failed *program*, with the end of its output."""
    tail = "\n".join(output.splitlines()[-_LOG_LINES:])
    return ImageBuildError(f"{program} failed; nothing was stored. The last of its output:\n{tail}")
