"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date
from os import PathLike
from typing import final

import trio_sandbox

from .. import (
    Image,
    Network,
    NetworkEvent,
    NetworkStatistics,
    RunOutput,
    RunResult,
    SandboxConfig,
    SandboxStatistics,
    Terminal,
    TransferStatistics,
    Usage,
    WorkspaceChange,
)
from .._refused import refuse
from ..client import Stderr
from ..portal import plain, plain_all, start_service
from ..sandbox import OnConflict
from ._door import AioDoor
from ._paths import AnyGuestPath, FileChanges, GuestPath
from ._processes import GuestConnection, GuestProcess, RunEvents


@final
class Checkpoint(AioDoor[trio_sandbox.Checkpoint]):
    """An earlier state of a sandbox, for `Sandbox.revert`. Made by `Sandbox.checkpoint`."""

    __slots__ = ()

    @property
    def discarded(self) -> bool:
        """Whether it was discarded: the sandbox can't go back to it any more."""
        return self._now(lambda: self._inner.discarded)

    def discard(self) -> None:
        """Free its space on the host's disk; the end of the sandbox does so, too. Doing it again does nothing."""
        self._now(self._inner.discard)


@final
class NetworkWatch(AioDoor[trio_sandbox.NetworkWatch]):
    """The events of a sandbox's network, as they happen: an async iterator of `NetworkEvent`.

    See `trio_sandbox.NetworkWatch`.
    """

    __slots__ = ()

    @property
    def lost(self) -> int:
        """How many events were dropped, the oldest first, because nobody took them; the last 1000 are kept."""
        return self._now(lambda: self._inner.lost)

    def __aiter__(self) -> NetworkWatch:
        return self

    async def __anext__(self) -> NetworkEvent:
        return await self._next(self._inner.__anext__)


@final
class Sandbox(AioDoor[trio_sandbox.Sandbox]):
    """A virtual machine of your own, for the block that opened it. Made by `open_sandbox`."""

    __slots__ = ()

    def path(self, *parts: AnyGuestPath, user: str | int | None = None) -> GuestPath:
        """Return a path in the guest, which works like a `trio.Path`.

        See `trio_sandbox.Sandbox.path`.
        """
        return GuestPath(self._portal, self._inner.path(*plain_all(parts), user=user))

    async def environment(self, user: str | int | None = None) -> dict[str, str]:
        """Return the environment variables that a user's processes get by default.

        See `trio_sandbox.Sandbox.environment`.
        """
        return await self._call(lambda: self._inner.environment(user))

    async def upload(
        self,
        local: str | PathLike[str],
        remote: AnyGuestPath,
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
    ) -> TransferStatistics:
        """Copy a file or a whole tree from the host into the guest.

        See `trio_sandbox.Sandbox.upload`.
        """
        return await self._call(lambda: self._inner.upload(local, plain(remote), user=user, progress=progress))

    async def download(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
        max_bytes: int = 8589934592,
        umask: int | None = None,
    ) -> TransferStatistics:
        """Copy a file or a whole tree from the guest to the host.

        See `trio_sandbox.Sandbox.download`.
        """
        return await self._call(
            lambda: self._inner.download(
                plain(remote), local, user=user, progress=progress, max_bytes=max_bytes, umask=umask
            )
        )

    def watch(self, path: AnyGuestPath, *, user: str | int | None = None) -> AbstractAsyncContextManager[FileChanges]:
        """Watch a file or directory in the guest, for a block.

        See `trio_sandbox.Sandbox.watch`.
        """
        return self._block(lambda: self._inner.watch(plain(path), user=user), FileChanges)

    async def push(
        self,
        local: str | PathLike[str],
        remote: AnyGuestPath,
        *,
        user: str | int | None = None,
        progress: Callable[[TransferStatistics], object] | None = None,
    ) -> TransferStatistics:
        """Copy a directory into the guest, as `upload` does, for work there that `pull` brings back.

        See `trio_sandbox.Sandbox.push`.
        """
        return await self._call(lambda: self._inner.push(local, plain(remote), user=user, progress=progress))

    async def pull(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        dry_run: bool = False,
        on_conflict: OnConflict = "raise",
        exclude: Iterable[str] = (".git",),
        max_bytes: int = 2147483648,
    ) -> tuple[WorkspaceChange, ...]:
        """Bring back the changes of a directory in the guest since `push` or the last `pull`: files added, changed, removed.

        See `trio_sandbox.Sandbox.pull`.
        """
        return await self._call(
            lambda: self._inner.pull(
                plain(remote),
                local,
                user=user,
                dry_run=dry_run,
                on_conflict=on_conflict,
                exclude=exclude,
                max_bytes=max_bytes,
            )
        )

    async def diff(
        self,
        remote: AnyGuestPath,
        local: str | PathLike[str],
        *,
        user: str | int | None = None,
        exclude: Iterable[str] = (".git",),
        max_bytes: int = 2147483648,
    ) -> str:
        """Return what `pull` would change on the host as a unified diff, which ``git apply`` and ``patch -p1`` take; "" if that is nothing.

        See `trio_sandbox.Sandbox.diff`.
        """
        return await self._call(
            lambda: self._inner.diff(plain(remote), local, user=user, exclude=exclude, max_bytes=max_bytes)
        )

    @property
    def language(self) -> str:
        """The language of runs that do not name one: what the image is for; "" for a container image without interpreters."""
        return self._now(lambda: self._inner.language)

    @property
    def last_output(self) -> RunOutput:
        """The end of the output of this task's last run, and how it ended, even if `run` gave no result."""
        return self._now(lambda: self._inner.last_output)

    def recent_runs(self) -> tuple[RunOutput, ...]:
        """Return the ends of the outputs of the last runs of all tasks, at most eight, the oldest first, for error reports."""
        return self._now(self._inner.recent_runs)

    @refuse("timeout", "input")
    def stream(
        self,
        code: str,
        *,
        language: str | None = None,
        stdin: bytes | bytearray | memoryview | bool = b"",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        functions: Mapping[str, Callable[..., object]] | None = None,
    ) -> AbstractAsyncContextManager[RunEvents]:
        """Run *code* like `run`, and give its output and displays as they come.

        See `trio_sandbox.Sandbox.stream`.
        """
        called = self._functions(functions)
        return self._block(
            lambda: self._inner.stream(code, language=language, stdin=stdin, env=env, cwd=plain(cwd), functions=called),
            RunEvents,
        )

    @refuse("timeout", "input")
    async def run(
        self,
        code: str,
        *,
        language: str | None = None,
        stdin: bytes | bytearray | memoryview = b"",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        functions: Mapping[str, Callable[..., object]] | None = None,
        check: bool = False,
    ) -> RunResult:
        """Run *code* in the sandbox's interpreter and wait for its end.

        See `trio_sandbox.Sandbox.run`.
        """
        called = self._functions(functions)
        return await self._call(
            lambda: self._inner.run(
                code, language=language, stdin=stdin, env=env, cwd=plain(cwd), functions=called, check=check
            )
        )

    @refuse("timeout")
    def open_process(
        self,
        command: Sequence[AnyGuestPath] | None = None,
        *,
        stdin: bool = True,
        stdout: bool = True,
        stderr: Stderr = "pipe",
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        user: str | int | None = None,
        pty: bool | Terminal = False,
    ) -> AbstractAsyncContextManager[GuestProcess]:
        """Start a process in the guest, for a block. When the block exits, the process is killed with all its descendants.

        See `trio_sandbox.Sandbox.open_process`.
        """
        return self._block(
            lambda: self._inner.open_process(
                plain_all(command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd=plain(cwd),
                user=user,
                pty=pty,
            ),
            GuestProcess,
        )

    @refuse("timeout", "input", "capture_output", "text", "encoding")
    async def run_process(
        self,
        command: Sequence[AnyGuestPath] | str | None = None,
        *,
        stdin: bytes | bytearray | memoryview = b"",
        capture_stdout: bool = False,
        capture_stderr: bool = False,
        stderr_to_stdout: bool = False,
        check: bool = True,
        shell: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: AnyGuestPath | None = None,
        user: str | int | None = None,
        pty: bool | Terminal = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a process in the guest to its end, like `trio.run_process` on the host.

        See `trio_sandbox.Sandbox.run_process`.
        """
        return await self._call(
            lambda: self._inner.run_process(
                plain_all(command),
                stdin=stdin,
                capture_stdout=capture_stdout,
                capture_stderr=capture_stderr,
                stderr_to_stdout=stderr_to_stdout,
                check=check,
                shell=shell,
                env=env,
                cwd=plain(cwd),
                user=user,
                pty=pty,
            )
        )

    @refuse("timeout")
    async def open_tcp_stream(self, port: int) -> GuestConnection:
        """Connect to a TCP server in the guest, at its 127.0.0.1 or else its ::1.

        See `trio_sandbox.Sandbox.open_tcp_stream`.
        """
        return GuestConnection(self._portal, await self._call(lambda: self._inner.open_tcp_stream(port)))

    @refuse("timeout")
    async def wait_port(self, port: int) -> None:
        """Wait until a server in the guest listens at *port*, where `open_tcp_stream` would reach it.

        See `trio_sandbox.Sandbox.wait_port`.
        """
        await self._call(lambda: self._inner.wait_port(port))

    def forward_port(self, guest_port: int, host_port: int = 0) -> AbstractAsyncContextManager[int]:
        """Listen at the host's 127.0.0.1 and carry each connection to *guest_port* of the guest, until cancelled.

        See `trio_sandbox.Sandbox.forward_port`.
        """
        return self._block(
            lambda: start_service(self._inner.forward_port, guest_port, host_port, kind=int), lambda _, value: value
        )

    @property
    def id(self) -> str:
        """A random name of its own, the same for as long as its block lasts: `sandbox_id` in spans and in records of the log."""
        return self._now(lambda: self._inner.id)

    @property
    def image(self) -> str | Image:
        """The image it was opened with: its name, or the `Image` if that has steps."""
        return self._now(lambda: self._inner.image)

    @property
    def config(self) -> SandboxConfig:
        """The configuration it was opened with."""
        return self._now(lambda: self._inner.config)

    @property
    def node(self) -> str | None:
        """The name of the node that its VM is on, if a fleet has opened it; None for a VM on this machine. See `trio_sandbox.fleet`."""
        return self._now(lambda: self._inner.node)

    @property
    def failure(self) -> Exception | None:
        """Why its VM is gone, if it has ended by itself or by an error; None while it is there, or asleep. `revert` can bring it back."""
        return self._now(lambda: self._inner.failure)

    @property
    def accelerator(self) -> str:
        """What runs the guest: "kvm", or "tcg", which QEMU does not count as a security boundary."""
        return self._now(lambda: self._inner.accelerator)

    @property
    def confinement(self) -> str:
        """What confines the QEMU that runs the guest, in words; for people, not for programs."""
        return self._now(lambda: self._inner.confinement)

    def console(self) -> str:
        """Return the end of what the guest's kernel and agent printed to the console, at most 64 KiB."""
        return self._now(self._inner.console)

    def qmp_log(self) -> str:
        """Return the end of the conversation between this library and QEMU, at most 16 KiB, for error reports."""
        return self._now(self._inner.qmp_log)

    def statistics(self) -> SandboxStatistics:
        """Return numbers about the sandbox as it is now."""
        return self._now(self._inner.statistics)

    def usage(self) -> Usage:
        """Return what the sandbox uses of the host: processor time, memory, disk, network.

        See `trio_sandbox.Sandbox.usage`.
        """
        return self._now(self._inner.usage)

    def network(self, network: Network) -> AbstractAsyncContextManager[NetworkWatch]:
        """Apply another network policy, for a block.

        See `trio_sandbox.Sandbox.network`.
        """
        return self._block(lambda: self._inner.network(network), NetworkWatch)

    def watch_network(self) -> AbstractAsyncContextManager[NetworkWatch]:
        """Follow the sandbox's connections during a block: an async iterator of `NetworkEvent`.

        See `trio_sandbox.Sandbox.watch_network`.
        """
        return self._block_now(self._inner.watch_network, NetworkWatch)

    def network_statistics(self) -> NetworkStatistics:
        """Return numbers about the sandbox's connections as they are now."""
        return self._now(self._inner.network_statistics)

    def fork(self, count: int) -> AbstractAsyncContextManager[tuple[Sandbox, ...]]:
        """Open *count* copies of the sandbox as it is now, with memory, processes and files, for a block.

        See `trio_sandbox.Sandbox.fork`.
        """
        return self._block(
            lambda: self._inner.fork(count), lambda portal, values: tuple(Sandbox(portal, each) for each in values)
        )

    async def checkpoint(self) -> Checkpoint:
        """Keep the state of the sandbox as it is now: memory, processes and files. `revert` goes back to it.

        See `trio_sandbox.Sandbox.checkpoint`.
        """
        return Checkpoint(self._portal, await self._call(self._inner.checkpoint))

    async def revert(self, checkpoint: Checkpoint | None = None) -> None:
        """Go back to a checkpoint: memory, processes and files are what they were then. What came after it is lost.

        See `trio_sandbox.Sandbox.revert`.
        """
        await self._call(lambda: self._inner.revert(plain(checkpoint)))

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """Undo everything that happens in the sandbox if the block raises or is cancelled; keep it otherwise.

        See `trio_sandbox.Sandbox.transaction`.
        """
        return self._block(self._inner.transaction, lambda _, value: value)

    @refuse("timeout")
    async def install(self, *requirements: str | PathLike[str], exclude_newer: str | date | None = None) -> None:
        """Install Python packages that the sandbox's code can import at once, as `Image.packages` adds them to an image.

        See `trio_sandbox.Sandbox.install`.
        """
        await self._call(lambda: self._inner.install(*requirements, exclude_newer=exclude_newer))

    async def save(self, name: str, *, replace: bool = False) -> None:
        """Save the state of the sandbox as it is now; ``open_sandbox(template=name)`` restores it.

        See `trio_sandbox.Sandbox.save`.
        """
        await self._call(lambda: self._inner.save(name, replace=replace))

    async def hibernate(self) -> None:
        """Put the sandbox to sleep: its state goes to the host's disk, and its process and memory are freed.

        See `trio_sandbox.Sandbox.hibernate`.
        """
        await self._call(self._inner.hibernate)

    async def resume(self) -> None:
        """Wake the sandbox up: it continues where it fell asleep. Nothing happens if it is awake.

        See `trio_sandbox.Sandbox.resume`.
        """
        await self._call(self._inner.resume)
