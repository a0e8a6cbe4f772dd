"""A sandbox provider for inspect_ai: ``sandbox="trio"`` in an eval. Needs the extra ``inspect``.

inspect_ai runs in asyncio or in Trio, and may begin and end a sample in different tasks. Under asyncio this uses
`trio_sandbox.aio`, whose objects have the methods that those for Trio have, so that all but the opening is the same code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import PurePosixPath
from typing import Any, Final, Generic, Literal, TypeVar, final, overload

import anyio
import anyio.lowlevel
import attrs
import trio
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    sandboxenv,
)
from pydantic import BaseModel

from .. import Host, Network, OutputLimitError, Sandbox, SandboxClosedError, aio, open_host

T = TypeVar("T")

#: Exit status of what can't be found, as of a shell.
_NOT_FOUND: Final = 127


class TrioSandboxConfig(BaseModel, frozen=True):
    """What a sample's sandbox is: ``SandboxEnvironmentSpec("trio", TrioSandboxConfig(memory_mib=1024))``."""

    image: str = "python"
    """The name of an image; the text in ``sandbox=("trio", "node")`` is one as well."""
    memory_mib: int = 512
    """Memory, in MiB."""
    vcpus: int = 1
    """Virtual CPUs."""
    network: tuple[str, ...] = ()
    """Hosts that may be reached, as for `Network.allow`."""


@sandboxenv(name="trio")
@final
class TrioSandboxEnvironment(SandboxEnvironment):
    """One sandbox, a virtual machine, for one sample. Relative paths start at the home directory of user 1000."""

    def __init__(self, sandbox: Sandbox | aio.Sandbox, close: Callable[[], Any]) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._close = close

    # --- Opening and closing ---

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        """Open what the samples share, and build the image if need be."""
        host = await _SharedHost.acquire()
        await host.prepare(_config(config).image)

    @classmethod
    async def task_cleanup(cls, task_name: str, config: SandboxEnvironmentConfigType | None, cleanup: bool) -> None:
        """Close what the samples shared. There is nothing that could be kept, whatever *cleanup* says."""
        await _SharedHost.release()

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Open a sandbox. If there is no memory for it now, it waits until other samples are over."""
        wanted = _config(config)
        host = await _SharedHost.acquire()
        try:
            opening = _Kept(
                host.open_sandbox(
                    wanted.image,
                    memory_mib=wanted.memory_mib,
                    vcpus=wanted.vcpus,
                    network=Network.allow(*wanted.network) if wanted.network else Network.none(),
                    max_output_bytes=SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
                )
            )
            sandbox = await opening.enter()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _SharedHost.release()
            raise
        return {"default": cls(sandbox, opening.leave)}

    @classmethod
    async def sample_cleanup(  # noqa: ASYNC910 - there is one environment
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """Close the sandbox: its virtual machine is destroyed."""
        with anyio.CancelScope(shield=True):  # noqa: ASYNC912 - each block bounds its own end
            for environment in environments.values():
                await environment.as_type(TrioSandboxEnvironment)._close()
                await _SharedHost.release()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """Read a `TrioSandboxConfig` from a log."""
        return TrioSandboxConfig(**config)

    # --- What samples do ---

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,  # noqa: A002 - the interface's name
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,  # noqa: ASYNC109 - the interface's
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command. A virtual machine loses no commands, so that one which took too long is not tried again."""
        stdin = input.encode() if isinstance(input, str) else input or b""
        try:
            with anyio.fail_after(timeout):
                variables = None if env is None else {**await self._sandbox.environment(user), **env}
                done = await self._sandbox.run_process(
                    cmd,
                    stdin=stdin,
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                    env=variables,
                    cwd=await self._directory(cwd),
                    user=user,
                )
        except OutputLimitError as exc:
            output = (exc.stdout_bytes + exc.stderr_bytes).decode("utf-8", "replace")
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, output) from exc
        except SandboxClosedError as exc:
            raise SandboxUnavailableError(str(exc)) from exc
        except (PermissionError, TimeoutError):
            raise
        except (OSError, LookupError) as exc:
            as_whom = "" if user is None else f" (as user {user!r})"
            return ExecResult(False, _NOT_FOUND, "", f"{exc}{as_whom}\n")  # noqa: ASYNC910 - the guest said so
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        stdout, stderr = ((data or b"").decode("utf-8", "replace") for data in (done.stdout, done.stderr))
        return ExecResult(status == 0, status, stdout, stderr)

    async def _directory(self, cwd: str | None) -> str | None:
        if cwd is None or PurePosixPath(cwd).is_absolute():
            return cwd  # noqa: ASYNC910 - most need not ask
        return str(await self._sandbox.path(cwd).absolute())

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file; directories are made as needed."""
        path = self._sandbox.path(file)
        await path.parent.mkdir(parents=True, exist_ok=True)
        if await path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), file)
        await path.write_bytes(contents.encode() if isinstance(contents, str) else contents)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...
    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...
    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Read a file as it is."""
        path = self._sandbox.path(file)
        if await path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), file)
        limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        if (await path.stat()).st_size > limit:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        data = await path.read_bytes()
        if len(data) > limit:  # it has grown meanwhile
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode() if text else data


def _config(config: SandboxEnvironmentConfigType | None) -> TrioSandboxConfig:
    if config is None:
        return TrioSandboxConfig()
    if isinstance(config, TrioSandboxConfig):
        return config
    if isinstance(config, str):
        return TrioSandboxConfig(image=config)
    raise TypeError(
        f"the config of a sandbox of type 'trio' must be a TrioSandboxConfig or an image's name, not {config!r:.100}"
    )


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


@final
class _Kept(Generic[T]):
    """A block that one task enters and another leaves. Under Trio a task of its own does both, as the other door does anyway."""

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self._manager = manager
        self._leaving: anyio.Event | None = None
        self._done: anyio.Event | None = None
        self._error: BaseException | None = None

    async def enter(self) -> T:
        """Enter it. Cancelled, it is left again."""
        if not _in_trio():
            return await self._manager.__aenter__()
        self._leaving, self._done = anyio.Event(), anyio.Event()
        entered: list[T] = []
        ready = anyio.Event()
        scope = trio.CancelScope()

        async def keep() -> None:  # noqa: ASYNC910 - a task of its own
            assert self._leaving is not None
            assert self._done is not None
            try:
                with scope:
                    async with self._manager as value:
                        entered.append(value)
                        ready.set()
                        await self._leaving.wait()
            except Exception as exc:  # noqa: BLE001 - it is for who waits
                self._error = exc
            finally:
                ready.set()
                self._done.set()

        trio.lowlevel.spawn_system_task(keep)
        try:
            await ready.wait()
        except trio.Cancelled:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await self._done.wait()
            raise
        if not entered:
            assert self._error is not None
            raise self._error
        return entered[0]

    async def leave(self) -> None:
        """Leave it."""
        if self._leaving is None or self._done is None:
            await self._manager.__aexit__(None, None, None)
            return
        self._leaving.set()
        await self._done.wait()
        if self._error is not None:
            raise self._error


@final
@attrs.define(eq=False)
class _SharedHost:
    """The host of all the sandboxes of one event loop; open while somebody uses it."""

    opening: anyio.Lock = attrs.field(factory=anyio.Lock)
    users: int = 0
    block: _Kept[Any] | None = None
    host: Host | aio.Host | None = None

    @classmethod
    async def acquire(cls) -> Any:
        """Return the host, for both doors the same; `release` it later."""
        shared = _hosts.setdefault(anyio.lowlevel.current_token(), cls())
        shared.users += 1
        try:
            async with shared.opening:
                if shared.host is None:
                    shared.block = _Kept(open_host() if _in_trio() else aio.open_host())
                    shared.host = await shared.block.enter()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await cls.release()
            raise
        return shared.host

    @classmethod
    async def release(cls) -> None:  # noqa: ASYNC910 - as a rule there is nothing to do
        """Have the host closed if nobody else uses it."""
        token = anyio.lowlevel.current_token()
        shared = _hosts[token]
        shared.users -= 1
        if shared.users == 0:
            del _hosts[token]
            if shared.block is not None and shared.host is not None:
                await shared.block.leave()


#: By event loop.
_hosts: Final[dict[Any, _SharedHost]] = {}
