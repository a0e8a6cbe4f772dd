"""The storage daemon: QEMU's block layer in a process of its own, which makes overlays for us.

An overlay takes four commands: `blockdev-add` opens the empty file that we made, `blockdev-create`
starts a job that writes the qcow2 structures into it, `job-dismiss` and `blockdev-del` clear up.
The daemon never opens a base: what it has to know of one, we read from the header ourselves. So
it never parses what a guest wrote.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import attrs
import trio

from .._config import Timeouts
from .._entries import open_block
from .._errors import QemuStorageDaemonError, QMPClosedError, QMPCommandError, QMPError
from .._nurseries import open_services
from .._observe import part_logger
from ._process import InheritedFds, OwnedProcess, describe_exit, minimal_environment, run_owned
from ._qcow2 import FileIdentity, Qcow2FormatError, Qcow2Info, Qcow2InfoCache
from ._qmp import QMPChannel, open_qmp
from ._runtime import private_directory

_log = part_logger("storage_daemon")

#: Creations that the daemon works on at a time; more wait their turn, first come, first served.
#: It works on one after the other anyway. This many have fewer events under way than a
#: subscriber's buffer holds (six each), so none gets lost.
_CONCURRENT_CREATIONS: Final = 32
#: Seconds to wait for the exit of a process that has closed its monitor.
_EXIT_SECONDS: Final = 0.25
#: `sockaddr_un.sun_path` less its final zero.
_SOCKET_PATH_BYTES: Final = 107


@attrs.define(eq=False)
class _Job:
    """A job of the daemon's, as its events tell of it."""

    concluded: trio.Event = attrs.field(factory=trio.Event)
    failed: bool = False

    def take(self, status: str) -> None:
        if status == "aborting":
            self.failed = True
        elif status == "concluded":
            self.concluded.set()


@final
class QemuStorageDaemon:
    """A storage daemon, from before its start to after its end; `open_storage_daemon` runs it.

    An object is used for one run of the program. The constructor starts nothing.
    """

    def __init__(
        self,
        *,
        directory: str | os.PathLike[str],
        timeouts: Timeouts | None = None,
        environment: Mapping[str, str] | None = None,
        program: str = "qemu-storage-daemon",
    ) -> None:
        self._directory = Path(os.path.abspath(directory))
        self._timeouts = Timeouts() if timeouts is None else timeouts
        self._environment = {} if environment is None else dict(environment)
        self._program = program
        self._socket_path = self._directory / f"storage-{secrets.token_hex(4)}.sock"
        self._scope = trio.CancelScope()
        self._process: OwnedProcess | None = None
        self._lost: QMPError | None = None
        self._channel: QMPChannel | None = None
        self._why_not_started = "it has not been opened"
        self._entered = False
        self._ended = trio.Event()
        self._bases = Qcow2InfoCache()
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count()
        self._turns = trio.CapacityLimiter(_CONCURRENT_CREATIONS)

    def __repr__(self) -> str:
        state = f"running with PID {self.pid}" if self.started else f"not started: {self._why_not_started}"
        return f"<QemuStorageDaemon: {state}>"

    @property
    def started(self) -> bool:
        """Whether it takes requests: from the start of its block until it is stopped or has died."""
        return self._channel is not None

    @property
    def pid(self) -> int | None:
        """The process id; None while no process runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    @property
    def socket_path(self) -> Path:
        """The path of a QMP socket, which exists while it runs.

        For looking inside, one client at a time: what we do ourselves goes another way.
        """
        return self._socket_path

    @property
    def directory(self) -> Path:
        """The directory of its socket."""
        return self._directory

    async def stop(self) -> None:
        """End the process, and wait until it is gone; bounded by `Timeouts.process_exit`, then it is killed.

        No error if it was never started, is stopped already, or has died. Requests that are under
        way fail. Cancelled, the process ends all the same; only the wait for it is cut short.
        """
        self._scope.cancel(reason="QemuStorageDaemon.stop()")
        if self._entered:
            await self._ended.wait()
        else:
            await trio.lowlevel.checkpoint()

    def read_base(self, base: str) -> tuple[FileIdentity, Qcow2Info]:
        """Give identity and header of the image at the absolute path *base*; remembered while it stays the same.

        Raises:
          QemuStorageDaemonError: if it is missing, can't be read or is not qcow2.

        """
        # Blocks the Trio thread for a stat(), and for an open() and one read of 64 KiB of a file
        # that is new to us: microseconds on a local disk, less than a thread would cost.
        try:
            return self._bases.read(base)
        except Qcow2FormatError as exc:
            raise QemuStorageDaemonError(f"can't use the base {base}: {exc}") from exc
        except OSError as exc:
            raise QemuStorageDaemonError(f"Failed to get image info of the base {base}: {exc.strerror or exc}") from exc

    async def create_overlay(self, base: str | os.PathLike[str], overlay: str | os.PathLike[str]) -> None:
        """Make a qcow2 overlay: an empty disk of the base's size that reads through to the base.

        Any number of tasks may call this at once. An error or a cancellation leaves no file, and
        neither job nor node in the daemon; a daemon that can't be made to clear up is killed.

        The overlay is for this run of the machine: after a crash of the host it may be damaged,
        since nothing waits for the disk to have it.

        Args:
          base: The backing file, a qcow2 image. Recorded as an absolute path, symlinks unresolved.
          overlay: The path of the file to make. Its directory exists, it does not.

        Raises:
          QemuStorageDaemonError: if the daemon is not started or dies meanwhile; if the base is
            missing, can't be read or is not qcow2; if the overlay exists or can't be written; or
            if it took longer than `Timeouts.overlay` (then `trio.TooSlowError` is the cause).
            `error_class` is QEMU's where QEMU refused a command.
          ValueError: if a path is not valid UTF-8, which QMP can't express, or has a zero byte.

        Source: QMP ``blockdev-add``, ``blockdev-create`` (QEMU's qapi/block-core.json).

        """
        base_path, overlay_path = absolute_path(base), absolute_path(overlay)
        await trio.lowlevel.checkpoint()
        self._require_started()
        try:
            with trio.fail_after(self._timeouts.overlay):
                async with self._turns:
                    await self._create_overlay(base_path, overlay_path)
            return
        except trio.TooSlowError as exc:
            raise QemuStorageDaemonError(
                f"making the overlay {overlay_path} took more than {self._timeouts.overlay:g} s"
            ) from exc
        except QMPCommandError as exc:
            raise QemuStorageDaemonError(
                f"can't make the overlay {overlay_path}: {exc}", error_class=exc.error_class
            ) from exc
        except QMPError as exc:
            lost = exc
        await self._ended.wait()  # The process is being reaped; then we can say how it ended.
        raise QemuStorageDaemonError(
            f"can't make the overlay {overlay_path}: the storage daemon is gone: {self._why_not_started}"
        ) from lost

    def _require_started(self) -> QMPChannel:
        if self._channel is None:
            raise QemuStorageDaemonError(f"the storage daemon is not started: {self._why_not_started}")
        return self._channel

    async def _create_overlay(self, base: str, overlay: str) -> None:
        channel = self._require_started()
        _, info = self.read_base(base)
        number = next(self._numbers)
        node, job_id = f"n{number}", f"j{number}"
        # Making the file ourselves keeps QEMU from ever writing into one that exists, and spares
        # it a job. It blocks for one open() in a directory, as does `os.unlink` below.
        with new_file(overlay) as fd:
            os.close(fd)
            job = self._jobs[job_id] = _Job()
            try:
                await channel.execute(
                    "blockdev-add",
                    # "no-flush": see the docstring; fdatasync would take most of the time.
                    {"driver": "file", "filename": overlay, "node-name": node, "cache": {"no-flush": True}},
                )
                await channel.execute(
                    "blockdev-create",
                    {
                        "job-id": job_id,
                        "options": {
                            "driver": "qcow2",
                            "file": node,
                            "size": info.virtual_size,
                            "backing-file": base,
                            "backing-fmt": "qcow2",
                        },
                    },
                )
                await job.concluded.wait()
                if job.failed:
                    raise QemuStorageDaemonError(
                        f"can't make the overlay {overlay}: {await _job_error(channel, job_id)}"
                    )
                await channel.execute("job-dismiss", {"id": job_id})
                await channel.execute("blockdev-del", {"node-name": node})
            except BaseException:
                await self._clear_up(channel, node, job_id)  # noqa: ASYNC102 # it shields and bounds itself
                raise
            finally:
                del self._jobs[job_id]

    async def _clear_up(  # noqa: ASYNC910 # `create_overlay` has had its checkpoint
        self, channel: QMPChannel, node: str, job_id: str
    ) -> None:
        """Leave neither job nor node in the daemon, wherever the creation of an overlay got to."""
        cleared = False
        try:
            with trio.move_on_after(self._timeouts.process_exit, shield=True):
                # QEMU runs commands in order, so what was sent before has had its effect by now.
                if await _job(channel, job_id) is not None:
                    await self._jobs[job_id].concluded.wait()
                    await channel.execute("job-dismiss", {"id": job_id})
                nodes: list[dict[str, Any]] = await channel.execute("query-named-block-nodes", {"flat": True})
                if any(each["node-name"] == node for each in nodes):
                    await channel.execute("blockdev-del", {"node-name": node})
                cleared = True
        except QMPClosedError:
            cleared = True  # The daemon is gone, and they with it.
        except QMPError:
            _log.exception("the storage daemon could not clear up an overlay that failed")
        if not cleared:
            _log.error("the storage daemon (PID %s) is stuck and gets killed", self.pid)
            if self._process is not None:
                self._process.kill()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run the program until it ends or `stop` is called; for `open_storage_daemon` only."""
        self._entered = True
        try:
            with self._scope, InheritedFds() as inherited, _listening(self._socket_path, inherited) as listener_fd:
                client, server_fd = inherited.socketpair()
                with client:
                    argv = [
                        self._program,
                        # Ours: connected before it runs, so that nothing has to be polled.
                        f"--chardev=socket,id=ours,fd={server_fd}",
                        "--monitor=chardev=ours",
                        # For whoever wants to look inside while it runs.
                        f"--chardev=socket,id=path,fd={listener_fd},server=on,wait=off",
                        "--monitor=chardev=path",
                    ]
                    await self._run(argv, inherited, client, task_status)
        finally:
            self._channel = None
            self._why_not_started = self._describe_end()
            self._ended.set()

    async def _run(
        self, argv: list[str], inherited: InheritedFds, client: socket.socket, task_status: trio.TaskStatus[None]
    ) -> None:
        async with open_services("open_storage_daemon()") as services:
            process: OwnedProcess = await services.start(
                partial(
                    run_owned,
                    argv,
                    environment={**minimal_environment(), **self._environment},
                    inherited=inherited,
                    grace=self._timeouts.process_exit,
                )
            )
            self._process = process
            try:
                async with open_qmp(client, timeouts=self._timeouts) as channel:
                    await self._follow_jobs(channel, task_status)
            finally:
                for job in self._jobs.values():
                    job.concluded.set()  # Their next command says what has happened.
                # Who hangs up is mostly about to exit, and its own status and last words say more
                # than that our SIGTERM came first.
                with trio.move_on_after(_EXIT_SECONDS):
                    await process.wait()  # noqa: ASYNC102 # cancelled, it needs no more waiting

    async def _follow_jobs(self, channel: QMPChannel, task_status: trio.TaskStatus[None]) -> None:
        with channel.subscribe("JOB_STATUS_CHANGE") as events:
            self._channel = channel
            task_status.started()
            async for event in events:
                job = self._jobs.get(event.data["id"])
                if job is not None:
                    job.take(event.data["status"])
        self._lost = await channel.wait_closed()

    def _describe_end(self) -> str:
        if self._scope.cancel_called or self._process is None or self._process.returncode is None:
            return "it was stopped"
        what = "" if self._lost is None or isinstance(self._lost, QMPClosedError) else f"{self._lost}; "
        return f"{what}it {describe_exit(self._process.returncode)}{_quote(self._process.output())}"

    @property
    def last_words(self) -> str:
        """What the process printed last, for messages; empty if nothing."""
        return "" if self._process is None else self._process.output()


@open_block
async def open_storage_daemon(
    *,
    directory: str | os.PathLike[str] | None = None,
    timeouts: Timeouts | None = None,
    environment: Mapping[str, str] | None = None,
    program: str = "qemu-storage-daemon",
) -> AsyncGenerator[QemuStorageDaemon]:
    """Run a storage daemon for the length of a block.

    Both ends of the block are checkpoints; cancelled at either, the process ends. It dying does
    not cancel the block: requests fail then.

    Args:
      directory: An existing directory of ours alone, where the socket is made; None: a new one, in TMPDIR or else /var/tmp,
        which is removed with the block.
      timeouts: `Timeouts.storage_daemon_start` bounds the start, `overlay` each creation,
        `process_exit` the end before it is killed.
      environment: What the process gets besides a minimal environment, for instance `Runtime.environment`.
      program: The program, as a name to look for or a path.

    Raises:
      MissingProgramError: if the program is not installed.
      QemuStorageDaemonError: if it can't be started, ends at once, or does not answer in time
        (then `trio.TooSlowError` is the cause).
      SandboxError: if there is no place for a directory; the message says what to set.

    """
    timeouts = Timeouts() if timeouts is None else timeouts
    bound = timeouts.storage_daemon_start
    async with AsyncExitStack() as stack:
        place = stack.enter_context(private_directory()) if directory is None else directory
        daemon = QemuStorageDaemon(directory=place, timeouts=timeouts, environment=environment, program=program)
        services = await stack.enter_async_context(open_services("open_storage_daemon()"))
        try:
            with trio.fail_after(bound):
                await services.start(daemon.serve)
        except trio.TooSlowError as exc:
            raise QemuStorageDaemonError(
                f"{program} did not answer within {bound:g} s{_quote(daemon.last_words)}"
            ) from exc
        except (QMPError, OSError) as exc:
            raise QemuStorageDaemonError(f"{program} could not be started: {exc}{_quote(daemon.last_words)}") from exc
        try:
            yield daemon
        finally:
            with trio.CancelScope(shield=True):  # noqa: ASYNC102 # bounded by the process's own grace
                await daemon.stop()


@contextmanager
def _listening(path: Path, inherited: InheritedFds) -> Generator[int]:
    """Make a listening socket at *path* for the child to inherit, and remove the path in the end."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise QemuStorageDaemonError(
            f"the path of a socket may have {_SOCKET_PATH_BYTES} bytes, and {path} has more: use a shorter directory"
        )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        try:
            listener.listen(1)
            fd = inherited.add(os.dup(listener.fileno()))
            listener.close()
            yield fd
        finally:
            path.unlink(missing_ok=True)


def absolute_path(path: str | os.PathLike[str]) -> str:
    """Make *path* absolute without resolving symlinks, and check that QMP can express it."""
    # Not `os.path.abspath`, which takes "link/.." for nothing. The working directory may be gone by now.
    text = os.fsdecode(path)
    if not os.path.isabs(text):
        text = os.path.join(os.getcwd(), text)
    if "\0" in text:
        raise ValueError(f"a path can't have a zero byte: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"QMP can only express paths in UTF-8, not {text!r}") from exc
    return text


@contextmanager
def new_file(path: str) -> Generator[int]:
    """Make a file that did not exist, and remove it if the block raises.

    Raises:
      QemuStorageDaemonError: if it exists or can't be made.

    """
    try:
        # Not for others to read: it will hold what a guest writes.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)  # there are umasks that would keep us out ourselves
    except OSError as exc:
        raise QemuStorageDaemonError(f"can't create the overlay {path}: {exc.strerror or exc}") from exc
    try:
        yield fd
    except BaseException:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError:
            _log.exception("can't remove the unfinished overlay %s", path)
        raise


async def _job(channel: QMPChannel, job_id: str) -> dict[str, Any] | None:
    jobs: list[dict[str, Any]] = await channel.execute("query-jobs")
    return next((job for job in jobs if job["id"] == job_id), None)


async def _job_error(channel: QMPChannel, job_id: str) -> str:
    job = await _job(channel, job_id)
    return "the job is gone" if job is None else str(job.get("error", "unknown error"))


def _quote(output: str) -> str:
    return f"; it said: {output.strip()}" if output.strip() else ""
