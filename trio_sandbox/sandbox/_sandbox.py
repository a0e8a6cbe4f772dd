"""A sandbox, as its user holds it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import date
from os import PathLike
from pathlib import Path
from typing import final

import attrs

from .._config import SandboxConfig, Timeouts
from .._errors import PackagesError, SnapshotError
from .._image import DEFAULT_IMAGE, AnyImage, Image
from .._image_steps import PackagesStep
from .._network import Network
from .._refused import refuse
from ..network import NetworkStatistics, NetworkWatch
from ._checkpoints import Checkpoint
from ._install import Installer
from ._life import ImageFacts, Life
from ._network import SandboxNetwork
from ._observed import operation
from ._requests import GuestRequests
from ._slot import Slot
from ._usage import Usage


@final
@attrs.frozen
class SandboxStatistics:
    """Numbers about one sandbox."""

    runs: int
    """Runs that were started."""
    processes: int
    """Processes that were started."""
    tasks_waiting_run: int
    """Tasks that wait for the interpreter, which another run holds."""
    qemu_pid: int | None
    """The process id of its QEMU on the host, for accounting; None where there is none (any more)."""
    checkpoints: int = 0
    """Checkpoints that it can go back to."""
    reverts: int = 0
    """How often it went back to one, failed transactions included."""
    hibernations: int = 0
    """How often it fell asleep."""
    hibernated: bool = False
    """Whether it is asleep."""
    last_pause: float | None = None
    """Seconds that its guest stood still when its state was last saved, for a fork, a checkpoint, for sleep or under a name."""
    clock_error: float | None = None
    """Seconds that the guest's clock was off at most when it was last compared with the host's; None: not yet, since the
    sandbox was opened, reverted or its state saved."""


@final
class Sandbox(GuestRequests):
    """A virtual machine of your own, for the block that opened it. Made by `open_sandbox`."""

    def __init__(
        self,
        slot: Slot,
        image: AnyImage,
        config: SandboxConfig,
        timeouts: Timeouts,
        lifecycle: Life[Sandbox] | None = None,
        built: ImageFacts | None = None,
        network: SandboxNetwork | None = None,
        installer: Installer | None = None,
        staging: Path | None = None,
        node: str | None = None,
    ) -> None:
        language, command = ("python", ()) if built is None else (built.language, built.command)
        super().__init__(slot, config, timeouts, language, command)
        self._node = node
        self._installer = installer
        self._staging = staging
        self._lifecycle_or_none = lifecycle
        self._own_network = network
        self._image = image

    def __repr__(self) -> str:
        state = "open"
        if self._lifecycle_or_none is not None and self._lifecycle_or_none.hibernated:
            state = "hibernated"
        elif self._slot.machine.failure is not None:
            state = f"failed: {self._slot.machine.failure!s:.100}"
        elif self._slot.machine.closed:
            state = "closed"
        return f"<trio_sandbox.Sandbox {self._image!r}, {self._config.memory_mib} MiB: {state}>"

    @property
    def id(self) -> str:
        """A random name of its own, the same for as long as its block lasts: `sandbox_id` in spans and in records of the log."""
        return self._slot.id

    @property
    def image(self) -> str | Image:
        """The image it was opened with: its name, or the `Image` if that has steps."""
        return self._image

    @property
    def config(self) -> SandboxConfig:
        """The configuration it was opened with."""
        return self._config

    @property
    def node(self) -> str | None:
        """The name of the node that its VM is on, if a fleet has opened it; None for a VM on this machine. See `trio_sandbox.fleet`."""
        return self._node

    @property
    def failure(self) -> Exception | None:
        """Why its VM is gone, if it has ended by itself or by an error; None while it is there, or asleep. `revert` can bring it back."""
        return None if self._slot.shut else self._slot.machine.failure

    @property
    def accelerator(self) -> str:
        """What runs the guest: "kvm", or "tcg", which QEMU does not count as a security boundary."""
        return self._slot.machine.accelerator.name

    @property
    def confinement(self) -> str:
        """What confines the QEMU that runs the guest, in words; for people, not for programs."""
        return self._slot.machine.accelerator.confinement.describe()

    def console(self) -> str:
        """Return the end of what the guest's kernel and agent printed to the console, at most 64 KiB."""
        return self._slot.machine.console()

    def qmp_log(self) -> str:
        """Return the end of the conversation between this library and QEMU, at most 16 KiB, for error reports."""
        return self._slot.machine.qmp_log()

    def statistics(self) -> SandboxStatistics:
        """Return numbers about the sandbox as it is now."""
        pid = None if self._slot.machine.closed or self._slot.machine.failure is not None else self._slot.machine.pid
        numbers = SandboxStatistics(self._runs, self._processes, self._interpreter.tasks_waiting, pid)
        life = self._lifecycle_or_none
        if life is None:
            return numbers
        return attrs.evolve(
            numbers,
            checkpoints=life.checkpoints,
            reverts=life.reverts,
            hibernations=life.hibernations,
            hibernated=life.hibernated,
            last_pause=life.last_pause,
            clock_error=life.clock_error,
        )

    def usage(self) -> Usage:
        """Return what the sandbox uses of the host: processor time, memory, disk, network.

        The host counts, so the guest can't lie. It takes a fraction of a millisecond, and can be asked at any time.

        Raises:
          SandboxError: if the sandbox has no virtual machine, as in tests without one.

        """
        return self._lifecycle.usage()

    @property
    def _network(self) -> SandboxNetwork:
        return self._own_network or self._lifecycle.network

    @property
    def _lifecycle(self) -> Life[Sandbox]:
        if self._lifecycle_or_none is None:
            raise SnapshotError("the state of this sandbox's machine can't be saved")
        return self._lifecycle_or_none

    @asynccontextmanager
    async def network(self, network: Network) -> AsyncGenerator[NetworkWatch]:
        """Apply another network policy, for a block.

            async with sandbox.network(Network.allow("api.github.com")):
                await sandbox.run(code)

        Within the block it is the only policy; in nested blocks the innermost applies. When the block exits, the connections
        that it allowed are closed, and the policy from before applies again. It stays in force when the sandbox is reverted
        or sleeps, and copies of the sandbox get it.

        Cancelled while entering: the policy from before applies.

        Args:
          network: The policy.

        Returns:
          What `watch_network` returns, for this block.

        Raises:
          TypeError: if *network* is not a `Network`.
          NetworkUnavailableError: if the guest can't have a network.
          SandboxClosedError: if the sandbox is closed or its VM gone.

        """
        if not isinstance(network, Network):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`network` must be a Network, such as Network.allow('pypi.org'), not {network!r}")
        async with self._network.block(network) as watch:
            yield watch

    @contextmanager
    def watch_network(self) -> Generator[NetworkWatch]:
        """Follow the sandbox's connections during a block: an async iterator of `NetworkEvent`.

            with sandbox.watch_network() as events:
                async for event in events:
                    print(event.host, event.port, event.outcome, event.error)

        There is an event for each connection, when it ends, and for each name and connection that is refused. The last 1000
        are kept for a slow reader; `NetworkWatch.lost` counts the others.
        """
        with self._network.watch() as watch:
            yield watch

    def network_statistics(self) -> NetworkStatistics:
        """Return numbers about the sandbox's connections as they are now."""
        return self._network.statistics()

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncGenerator[tuple[Sandbox, ...]]:
        """Open *count* copies of the sandbox as it is now, with memory, processes and files, for a block.

            async with sandbox.fork(4) as children:
                for child in children:
                    nursery.start_soon(explore, child)

        The copies are sandboxes like this one, independent of it and of each other, and can be forked again. They have host
        names, randomness and a clock of their own. This one keeps running. Its guest stands still for some 30 ms, or longer
        the more memory it has written; its runs and processes notice nothing else. Runs and processes of `open_process` that
        are under way stay with it: in the copies a run is interrupted, and a process killed. Background work of earlier runs
        lives on in all.

        If there is not enough memory or processor for all of them, it waits its turn, as `Host.open_sandbox` does. When the
        block exits, the copies are destroyed. Cancelled at any point, it leaves nothing of them, and this sandbox as it is.

        Args:
          count: How many copies, at least 1.

        Raises:
          TypeError, ValueError: if *count* is not such a number; nothing was done.
          CapacityError: at once, if so many can never fit beside this one and those that it was forked from; or if the
            host's disk is nearly full. The sandbox lives on.
          SnapshotError: if the state can't be saved, or there is no room for a copy. The sandbox lives on, unless the
            message says otherwise.
          VmBootError: if a copy did not come up; the others were destroyed.
          SandboxHibernatedError: if the sandbox hibernates.
          SandboxClosedError: if the sandbox is closed or its VM gone.

        """
        async with AsyncExitStack() as stack:
            with operation("fork", self.id):
                children = await stack.enter_async_context(self._lifecycle.fork(count))
            for child in children:
                child._bases.update(self._bases)
            yield children

    async def checkpoint(self) -> Checkpoint:
        """Keep the state of the sandbox as it is now: memory, processes and files. `revert` goes back to it.

        The sandbox keeps running; its guest stands still for some 30 ms. There may be any number of checkpoints. Each takes
        as much of the host's disk as the guest uses of its memory, until it is discarded or the sandbox ends.

        Cancelled: there is no checkpoint.

        Raises:
          SnapshotError: if the state can't be saved. The sandbox lives on, unless the message says otherwise.
          SandboxHibernatedError: if the sandbox hibernates.
          SandboxClosedError: if the sandbox is closed or its VM gone.

        """
        with operation("checkpoint", self.id):
            return await self._lifecycle.checkpoint()

    async def revert(self, checkpoint: Checkpoint | None = None) -> None:
        """Go back to a checkpoint: memory, processes and files are what they were then. What came after it is lost.

        You can revert any number of times, even if the VM died. Reverting wakes a sleeping sandbox. A run that was under way
        at the time of the checkpoint is interrupted, and processes of `open_process` are gone. The clock and randomness are
        current; the host name and the machine id are new.

        Requests that are under way now raise `OutcomeUnknownError`, whose cause says that the sandbox was reverted.
        Requests that come meanwhile wait, and are then served by the reverted sandbox.

        Cancelled: the sandbox was reverted, or is as it was.

        Args:
          checkpoint: Which one; None: the newest.

        Raises:
          ValueError: if there is none, or it was discarded or is another sandbox's.
          SnapshotError: if it could not be restored; the sandbox is as it was.
          SandboxClosedError: if the sandbox is closed.

        """
        with operation("revert", self.id):
            await self._lifecycle.revert(checkpoint)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        """Undo everything that happens in the sandbox if the block raises or is cancelled; keep it otherwise.

            async with sandbox.transaction():
                await sandbox.run_process(["rm", "-r", "/home/user/work"])
                await sandbox.run("check_everything()", check=True)

        Code that fails raises nothing by itself: say ``check=True``. The block's exception passes unchanged. Blocks may be nested. They
        are not isolated: what other tasks do in the sandbox meanwhile is undone as well.

        Cancelling does not stop the undoing, which takes at most `Timeouts.boot`. If it fails, the sandbox is closed, since
        its state would be wrong; its next requests say so.

        Raises:
          Exception: entering the block, what `checkpoint` raises.

        """
        async with self._lifecycle.transaction():
            yield

    @refuse("timeout")
    async def install(self, *requirements: str | PathLike[str], exclude_newer: str | date | None = None) -> None:
        """Install Python packages that the sandbox's code can import at once, as `Image.packages` adds them to an image.

        They are chosen and fetched on the host: the guest needs no network, and none of their code runs on the host.
        Versions from the image's own steps stay. They go to ``/usr/local``, in a container image to where its Python has
        packages, and belong to the guest's user. A running interpreter keeps what it has already imported. For more than one
        sandbox an `Image` is faster.

        Cancelled or failed while the guest unpacks them: some of the files are there.

        Args:
          *requirements: As those of `Image.packages`.
          exclude_newer: As that of `Image.packages`.

        Raises:
          TypeError, ValueError, OSError: as `Image.packages`; nothing was sent.
          PackagesError: if they can't be chosen or fetched, or the image has no Python; nothing was sent.
          ModuleNotFoundError: if the extra ``packages`` is not installed; nothing was sent.
          ProcessFailedError: if the guest can't unpack them, for instance since its disk is full, or its Python fails.
          Exception: what `run_process` raises.

        """
        (step,) = Image(DEFAULT_IMAGE).packages(*requirements, exclude_newer=exclude_newer).steps
        assert isinstance(step, PackagesStep)
        await self._install(step)

    async def _install(self, step: PackagesStep) -> None:
        if self._installer is None:
            raise PackagesError("packages can't be installed in this sandbox: it has no image")
        await self._installer.install(self, step)

    async def save(self, name: str, *, replace: bool = False) -> None:
        """Save the state of the sandbox as it is now; ``open_sandbox(template=name)`` restores it.

        The sandbox keeps running. The saved state stays in the cache directory until ``trio-sandbox template rm`` removes
        it. It works only with the same QEMU, processor, image and version of this library, and can't be made again from
        anything else. It holds the guest's memory, including secrets in it.

        Cancelled, or killed: nothing is saved, and an older state of that name is still there.

        Args:
          name: 1 to 64 letters, digits, dots, hyphens and underscores of ASCII, the first a letter or digit.
          replace: Whether to replace an older state of that name.

        Raises:
          TypeError, ValueError: for what can't be a name; nothing was done.
          TemplateExistsError: if that name is taken and *replace* is False; nothing was done.
          TemplateError: if the cache directory can't be written, or others may write to it; nothing was done.
          OSError: if there is no room for it.
          Exception: what `checkpoint` raises.

        """
        with operation("save", self.id):
            await self._lifecycle.save(name, replace=replace)

    async def hibernate(self) -> None:
        """Put the sandbox to sleep: its state goes to the host's disk, and its process and memory are freed.

        Its share of `HostConfig.memory_budget_mib` is free for others; that of `HostConfig.disk_budget_mib` is not. Requests
        raise `SandboxHibernatedError` until `resume`. If it fell asleep by `SandboxConfig.hibernate_after`, it stays asleep,
        and requests no longer wake it up.

        Nothing may be under way: no run, process, open file or connection, and no process or thread that an earlier run left
        in the background. So nothing is lost.

        Cancelled: the sandbox is asleep, or as it was.

        Raises:
          trio.BusyResourceError: if something is under way; the sandbox is as it was.
          SnapshotError: if the state can't be saved. The sandbox lives on, unless the message says otherwise.
          OSError: if there is no room for it; the sandbox lives on.
          SandboxClosedError: if the sandbox is closed or its VM gone.

        """
        with operation("hibernate", self.id):
            await self._lifecycle.hibernate()

    async def resume(self) -> None:
        """Wake the sandbox up: it continues where it fell asleep. Nothing happens if it is awake.

        It waits for its share of the host like `Host.open_sandbox`, first come, first served.
        Cancelled: it is awake, or still asleep.

        Raises:
          SnapshotError: if it did not wake up, for instance because other processes hold the memory; it is still asleep.
          SandboxClosedError: if the sandbox is closed.

        """
        with operation("resume", self.id):
            await self._lifecycle.resume()
