"""A workspace backend for Pydantic AI: an agent's files and commands are in a sandbox. Needs the extra ``pydantic-ai``.

async with aio.open_sandbox("python") as sandbox:
    workspace = Workspace(SandboxBackend(sandbox))
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from typing import Final, final

import anyio
from pydantic_ai.workspaces import (
    CommandResult,
    FileEntry,
    WorkspaceCommand,
    WorkspaceOutputLimitError,
    WorkspaceRef,
    WorkspaceTimeoutError,
    WorkspaceUnavailableError,
)
from pydantic_ai.workspaces.protocol import validate_timeout

from .. import OutcomeUnknownError, OutputLimitError, Sandbox, SandboxClosedError, aio

_NOT_FOUND: Final = 127


@final
class SandboxBackend:
    """An open sandbox, as Pydantic AI sees it: commands, files and links, as user 1000 in its home directory.

    Args:
      sandbox: One of `trio_sandbox.aio`; where AnyIO runs in Trio, one of `trio_sandbox`. Whoever opened it closes it.

    """

    def __init__(self, sandbox: Sandbox | aio.Sandbox) -> None:
        # Both have the same methods.
        self._sandbox = sandbox
        self._ref = WorkspaceRef(provider="trio-sandbox", id=secrets.token_hex(8))

    @property
    def ref(self) -> WorkspaceRef | None:
        """A name of its own. Nothing else can be attached by it: the sandbox ends with its block."""
        return self._ref

    async def working_dir(self) -> str:
        """Return the home directory."""
        async with _available():
            return str(await self._sandbox.path().resolve())

    async def run(
        self,
        command: WorkspaceCommand,
        *,
        shell: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface's
    ) -> CommandResult:
        """Run a command to its end; what it leaves in the background goes on."""
        validate_timeout(timeout)
        if isinstance(command, str) != shell:
            raise TypeError("a string needs shell=True, and a list of arguments shell=False")
        try:
            async with _available():
                with anyio.fail_after(timeout):
                    done = await self._sandbox.run_process(
                        command,
                        shell=shell,
                        capture_stdout=True,
                        capture_stderr=True,
                        check=False,
                        env=None if env is None else {**await self._sandbox.environment(), **env},
                    )
        except TimeoutError as exc:
            raise WorkspaceTimeoutError(f"the command took more than {timeout} seconds and was killed") from exc
        except OutputLimitError as exc:
            stdout, stderr = _text(exc.stdout_bytes), _text(exc.stderr_bytes)
            limit = self._sandbox.config.max_output_bytes
            raise WorkspaceOutputLimitError(str(exc), limit=limit, stdout=stdout, stderr=stderr) from exc
        except FileNotFoundError as exc:
            return CommandResult(exit_code=_NOT_FOUND, stdout="", stderr=f"{exc}\n")  # noqa: ASYNC910 - the guest said so
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return CommandResult(exit_code=status, stdout=_text(done.stdout), stderr=_text(done.stderr))

    async def read_bytes(self, path: str) -> bytes:
        """Read a file."""
        async with _available():
            return await self._sandbox.path(path).read_bytes()

    async def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file; directories are made as needed."""
        async with _available():
            file = self._sandbox.path(path)
            try:
                await file.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
            if await file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            await file.write_bytes(data)

    async def stat(self, path: str) -> FileEntry:
        """Say what a file or directory is."""
        async with _available():
            return await self._entry(path)

    async def _entry(self, path: str, *, follow_symlinks: bool = True) -> FileEntry:
        status = await self._sandbox.path(path).stat(follow_symlinks=follow_symlinks)
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        return FileEntry(name=PurePosixPath(path).name, path=path, is_dir=stat.S_ISDIR(status.st_mode), size=size)

    async def list_dir(self, path: str) -> Sequence[FileEntry]:
        """Say what is in a directory."""
        entries: list[FileEntry] = []
        async with _available():
            for child in await self._sandbox.path(path).iterdir():
                try:
                    entries.append(await self._entry(str(child)))
                except OSError:  # a link to nothing, or to itself
                    entries.append(await self._entry(str(child), follow_symlinks=False))
        return entries

    async def make_dir(self, path: str) -> None:
        """Make a directory, and those above it."""
        async with _available():
            await self._sandbox.path(path).mkdir(parents=True, exist_ok=True)

    async def remove(self, path: str) -> None:
        """Remove a file, a link, or a directory with all that is in it; not the home directory, nor one above it."""
        home = PurePosixPath(await self.working_dir())
        async with _available():
            target = self._sandbox.path(path)
            if not stat.S_ISDIR((await target.lstat()).st_mode):
                await target.unlink()
                return
            real = (await target.resolve()).pure
            if home.is_relative_to(real):
                raise ValueError(f"{path!r} is the working directory, or one above it")
            done = await self._sandbox.run_process(["rm", "-rf", "--", real], capture_stderr=True, check=False)
            if done.returncode:
                raise OSError(errno.EACCES, _text(done.stderr), path)

    async def exists(self, path: str) -> bool:
        """Whether it is there."""
        async with _available():
            return await self._sandbox.path(path).exists()

    async def realpath(self, path: str) -> str:
        """Return the path without links."""
        async with _available():
            return str(await self._sandbox.path(path).resolve())


@asynccontextmanager
async def _available() -> AsyncGenerator[None]:
    """Tell of a sandbox that is gone in Pydantic AI's words."""
    try:
        yield
    except (SandboxClosedError, OutcomeUnknownError) as exc:
        raise WorkspaceUnavailableError(str(exc)) from exc


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")
