"""What becomes of a sandbox's machine besides requests: checkpoints, going back to one, being saved, and sleep."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from typing import Final, Generic, TypeVar, final

import trio

from .._config import SandboxConfig, Timeouts
from .._errors import (
    QemuStorageDaemonError,
    SandboxClosedError,
    SandboxError,
    SandboxHibernatedError,
    SnapshotError,
)
from .._nurseries import Services, hide_nursery
from .._observe import part_logger
from ..client import check_open
from ..image import BuiltImage
from ..machines import (
    RESTORE_FAILURES,
    Admission,
    HeldMachine,
    Launcher,
    NamedTemplateStore,
    NoteMachine,
    check_count,
    hold_machine,
    ignore_machine,
    open_together,
    sync_files,
)
from ..network import Gateway
from ..qemu import Snapshot, Vm, allocated_bytes
from ._checkpoints import Checkpoint, Checkpoints
from ._idle import check_idle, check_idle_gently, count_streams
from ._network import SandboxNetwork
from ._observed import operation
from ._slot import Slot
from ._transaction import transaction
from ._usage import Usage

#: What a fork is to its user: a sandbox of its own.
Child = TypeVar("Child")

_log = part_logger("sandbox")

#: Looks for idleness in the time after which a sandbox is to fall asleep.
_LOOKS: Final = 4
#: Seconds for a guest to say whether it is idle, where memory is tight: one that does not is left alone.
_DOZE_PATIENCE: Final = 2.0


@final
class Lifecycle(Generic[Child]):
    """Takes snapshots of a sandbox's machine, and puts machines restored from them into its slot. One thing at a time.

    Args:
      services: Those of the sandbox's block.
      held: The machine, which has its share of the host for as long as its block lasts.
      image: What its disk stands on.
      launcher: What takes snapshots and opens machines.
      admission: What gives a machine that wakes up its share of the host.
      named: Where to save.
      config: What the sandbox was opened with.
      timeouts: Bounds on going back when a transaction fails.
      open_child: Makes the sandbox of a machine restored from this one's, told what its own children have to fit beside, and
        what decides on its connections.
      gateway: What decides on the guest's connections.
      note_machine: Told of each machine that the sandbox gets besides *held*, and of its sleep.
      beside: How many sandboxes like this one there are, itself included, that are open for as long as it.
      id: The sandbox's own.

    """

    def __init__(
        self,
        services: Services,
        held: HeldMachine[Vm],
        *,
        image: BuiltImage,
        launcher: Launcher,
        admission: Admission,
        named: NamedTemplateStore,
        config: SandboxConfig,
        timeouts: Timeouts,
        open_child: Callable[[AbstractAsyncContextManager[Vm], int, Gateway], AbstractAsyncContextManager[Child]],
        gateway: Gateway,
        note_machine: NoteMachine = ignore_machine,
        beside: int = 1,
        id: str | None = None,  # noqa: A002 - as of `Slot`
    ) -> None:
        self.slot: Slot = Slot(held.vm, id)
        self.network: SandboxNetwork = SandboxNetwork(self.slot, gateway, timeouts.kill)
        """What the guest may reach."""
        self.reverts: int = 0
        """How often the sandbox went back to a checkpoint."""
        self.hibernations: int = 0
        """How often it fell asleep."""
        self.last_pause: float | None = None
        """Seconds that its guest stood still for the last snapshot."""
        self._services = services
        self._vm = held.vm
        self._held = held
        self._shareholder = held
        self._image = image
        self._launcher = launcher
        self._admission = admission
        self._named = named
        self._config = config
        self._timeouts = timeouts
        self._gateway = gateway
        self._note_machine = note_machine
        self._open_child = open_child
        self._beside = beside
        self._changing = trio.Lock()
        self._checkpoints: Checkpoints[Snapshot] = Checkpoints()
        self._asleep: Snapshot | None = None
        self._by_call = False
        self._closed = False
        self._disk = ExitStack()
        self._cpu = 0.0  # of machines that are not there any more
        self._layers = len(held.vm.config.layers)  # that are not what this sandbox wrote

    @property
    def hibernated(self) -> bool:
        """Whether the sandbox is asleep."""
        return self._asleep is not None

    @property
    def checkpoints(self) -> int:
        """How many checkpoints there are to go back to."""
        return len(self._checkpoints)

    @property
    def clock_error(self) -> float | None:
        """Seconds that the guest's clock is off at most; None: unknown."""
        return None if self.slot.shut else self._vm.clock.bound

    def usage(self) -> Usage:
        """What `Sandbox.usage` does."""
        asleep = self._asleep
        config = self._vm.config if asleep is None else asleep.config
        network = self.network.statistics()
        return Usage(
            cpu_seconds=self._cpu + (self._vm.cpu_seconds() if asleep is None else 0.0),
            memory_bytes=self._vm.own_memory() if asleep is None else 0,
            disk_bytes=allocated_bytes((*config.layers[self._layers :], config.overlay)),
            network_bytes_sent=network.bytes_sent,
            network_bytes_received=network.bytes_received,
        )

    # --- Going back ---

    async def checkpoint(self) -> Checkpoint:
        """What `Sandbox.checkpoint` does."""
        async with self._awake("a checkpoint"):
            snapshot = await self._snapshot("a checkpoint")
        return self._checkpoints.add(snapshot, snapshot.discard)

    async def revert(self, checkpoint: Checkpoint | None) -> None:
        """What `Sandbox.revert` does."""
        self.slot.home.check("reverting")
        async with self._changing:
            snapshot = self._checkpoints.find(checkpoint)
            self._check_not_closed("reverting")
            try:
                if self._asleep is not None:
                    await self._wake(snapshot)
                else:
                    await self._replace(snapshot)
            except RESTORE_FAILURES as exc:
                raise SnapshotError(f"the sandbox was not reverted, and is as it was: {exc}") from exc
            self.reverts += 1

    async def _replace(self, snapshot: Snapshot) -> None:
        """Open a machine restored from *snapshot*, and have it take the place of the one there is."""
        self.slot.shut_off(self._gate)
        try:
            held = await self._hold(
                self._launcher.open_restored(snapshot, self.network.handler, self.network.certificates)
            )
        except BaseException:
            self.slot.reopen()
            raise
        old, self._held, self._vm = self._held, held, held.vm
        self._cpu += old.vm.cpu_seconds()
        self._note_machine(held.vm)
        old.vm.retire("the sandbox was reverted to a checkpoint")
        self.slot.reopen(held.vm)
        # The share of the host is the same for all the machines of a sandbox, and with the first of them.
        if old is not self._shareholder:
            await old.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None]:
        """What `Sandbox.transaction` does."""
        async with transaction(self, self._timeouts.boot):
            yield

    # --- Being saved ---

    async def save(self, name: str, *, replace: bool) -> None:
        """What `Sandbox.save` does."""
        self.slot.home.check("saving")
        with self._named.make(name, memory_mib=self._config.memory_mib, replace=replace) as staged:
            async with self._awake("saving"):
                snapshot = await self._snapshot("saving")
            try:
                template = self._launcher.describe(name, self._image, snapshot)
                await trio.to_thread.run_sync(staged.fill, template)
            finally:
                snapshot.discard()

    # --- Being copied ---

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncGenerator[tuple[Child, ...]]:
        """What `Sandbox.fork` does."""
        count = check_count(count)
        await self.slot.resolve("forking")
        check_open(self._vm, "forking")
        async with self._admission.admit_together(self._config, count, beside=self._beside) as shares:
            async with self._awake("forking"):
                snapshot = await self._snapshot("forking")
            try:
                beside = self._beside + count
                openings = [self._open_copy(snapshot, share, beside) for share in shares]
                async with open_together(openings) as children:
                    snapshot.discard()
                    yield children
            finally:
                snapshot.discard()

    def _open_copy(
        self, snapshot: Snapshot, share: AbstractContextManager[None], beside: int
    ) -> AbstractAsyncContextManager[Child]:
        gateway = self._gateway.copy()
        return self._open_child(self._restored(snapshot, share, gateway), beside, gateway)

    @asynccontextmanager
    async def _restored(
        self, snapshot: Snapshot, share: AbstractContextManager[None], gateway: Gateway
    ) -> AsyncGenerator[Vm]:
        with share:
            async with AsyncExitStack() as stack:
                try:
                    vm = await stack.enter_async_context(
                        self._launcher.open_restored(snapshot, gateway.handler, gateway.certificates)
                    )
                except (QemuStorageDaemonError, OSError) as exc:
                    raise SnapshotError(f"a copy could not be opened; the sandbox lives on: {exc}") from exc
                yield vm

    # --- Sleep ---

    async def hibernate(self) -> None:
        """What `Sandbox.hibernate` does."""
        self.slot.home.check("hibernating")
        async with self._changing:
            self._check_not_closed("hibernating")
            if self._asleep is None:
                await self._fall_asleep(partial(check_idle, patience=self._timeouts.kill))
            self._by_call = True

    async def resume(self) -> None:
        """What `Sandbox.resume` does."""
        self.slot.home.check("resuming")
        async with self._changing:
            self._check_not_closed("resuming")
            if self._asleep is not None:
                await self._wake_or_say_why()

    async def serve_idleness(self, seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
        """Have the sandbox fall asleep whenever it was idle for so many *seconds*."""
        task_status.started()
        while True:  # noqa: ASYNC913 - it begins with a sleep
            try:
                await self._wait_idle(seconds)
                await self._sleep_until_asked(partial(check_idle, patience=self._timeouts.kill))
            except trio.BusyResourceError:
                pass
            except (SandboxError, OSError) as exc:
                _log.warning("an idle sandbox did not fall asleep: %s", exc)

    async def _sleep_until_asked(self, check: Callable[[Vm], Awaitable[None]]) -> None:
        async with self._changing:
            if self._asleep is None:
                await self._fall_asleep(check, until_asked=True)
                self._by_call = False

    @property
    def idle_since(self) -> float | None:
        """When it was last asked for something; None: it sleeps, or its owner needs it awake, or something is done with it now."""
        vm = self._vm
        if self._asleep is not None or self._changing.locked() or vm.failure is not None or self.slot.stays_awake():
            return None
        # Sleep would break off a connection of the guest's to the outside: that is for who has asked for sleep.
        return None if vm.guest.statistics().peer_streams else self.slot.last_request

    async def doze(self) -> bool:
        """Sleep until the next request, if nothing is under way; tell whether it does. It ends with the sandbox's block, if that is left meanwhile."""
        try:
            slept: bool = await self._services.start(self._doze)
        except trio.ClosedResourceError:
            return False  # noqa: ASYNC910 - starting a service is one
        return slept

    async def _doze(self, *, task_status: trio.TaskStatus[bool]) -> None:
        busy = True
        with trio.move_on_after(_DOZE_PATIENCE):  # of requests that come while it is asked, none waits
            busy = await count_streams(self._vm) > 0
        with suppress(trio.BusyResourceError):
            if not busy:
                await self._sleep_until_asked(partial(check_idle_gently, patience=_DOZE_PATIENCE))
        task_status.started(self._asleep is not None)

    async def serve_reclaiming(self, seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
        """Have the machine give memory back, once, whenever the sandbox was idle for so many *seconds*."""
        task_status.started()
        while True:  # noqa: ASYNC913 - as above
            try:
                await self._wait_idle(seconds)
                if await self._reclaim():
                    await self.slot.wait_request()
            except (SandboxError, OSError) as exc:
                _log.warning("an idle sandbox did not give memory back: %s", exc)

    async def _wait_idle(self, seconds: float) -> None:
        """Wait until nothing was asked of the sandbox for so many *seconds*, and nothing is under way."""
        busy_at = trio.current_time()
        while True:
            await trio.sleep(seconds / _LOOKS)
            now, vm = trio.current_time(), self._vm
            if self._asleep is not None or vm.failure is not None or self._changing.locked() or await count_streams(vm):
                busy_at = now
            elif now - max(busy_at, self.slot.last_request) >= seconds:
                return

    async def _reclaim(self) -> bool:
        """Have the machine give memory back; False if a request came meanwhile."""
        done = False

        async def end_with_request() -> None:
            await self.slot.wait_request()
            nursery.cancel_scope.cancel(reason="the sandbox is wanted")

        async with self._changing:
            if self._asleep is None:
                with hide_nursery("an idle sandbox"):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(end_with_request)
                        given = await self._vm.balloon.reclaim()
                        _log.debug("an idle sandbox gave %d MiB back", given)
                        done = True
                        nursery.cancel_scope.cancel(reason="done")
        return done

    async def _fall_asleep(self, check: Callable[[Vm], Awaitable[None]], *, until_asked: bool = False) -> None:
        vm = self._vm
        check_open(vm, "hibernating")
        self.slot.shut_off(self._gate)
        try:
            await check(vm)
            snapshot = await self._snapshot("hibernating")
            try:
                await trio.to_thread.run_sync(_put_to_disk, snapshot)
                self._check_not_closed("hibernating")  # a thread does not heed cancellation
                if until_asked and self._changing.statistics().tasks_waiting:
                    # Whoever asks now would have to wait for room to wake it up.
                    raise trio.BusyResourceError("a sandbox does not fall asleep that is asked for something meanwhile")
            except BaseException:
                snapshot.discard()
                raise
        except BaseException:
            self.slot.reopen()
            raise
        self._asleep = snapshot
        self._note_machine(None)
        self._cpu += vm.cpu_seconds()
        self.hibernations += 1
        # With the shareholder goes its share of the host; but the disk is there still.
        if self.hibernations == 1:
            self._disk.enter_context(self._admission.keep_disk(self._config))
        for held in (self._held, self._shareholder):
            await held.close()

    async def _gate(self, what: str) -> None:
        async with self._changing:
            if self._asleep is None:
                return
            if self._by_call:
                raise SandboxHibernatedError(
                    f"{what} was not sent: the sandbox hibernates; call `await sandbox.resume()`"
                )
            self._check_not_closed(what)
            with operation("resume", self.slot.id):
                await self._wake_or_say_why()

    async def _wake_or_say_why(self) -> None:
        assert self._asleep is not None
        try:
            await self._wake(self._asleep)
        except RESTORE_FAILURES as exc:
            raise SnapshotError(f"the sandbox did not wake up, and still hibernates: {exc}") from exc

    async def _wake(self, snapshot: Snapshot) -> None:
        """Have a machine restored from *snapshot* end the sleep."""
        asleep = self._asleep
        assert asleep is not None
        held = await self._hold(self._admitted(snapshot))
        self._held, self._shareholder, self._vm, self._asleep = held, held, held.vm, None
        self._note_machine(held.vm)
        self.slot.reopen(held.vm)
        asleep.discard()

    @asynccontextmanager
    async def _admitted(self, snapshot: Snapshot) -> AsyncGenerator[Vm]:
        async with (
            self._admission.admit_again(self._config) as note_up,
            self._launcher.open_restored(snapshot, self.network.handler, self.network.certificates) as vm,
        ):
            note_up()
            yield vm

    # --- All of them ---

    @asynccontextmanager
    async def _awake(self, what: str) -> AsyncGenerator[None]:
        """Hold the lock for a block in which the machine is there."""
        while True:
            await self.slot.resolve(what)
            async with self._changing:
                if self._asleep is None:
                    yield
                    return

    async def _snapshot(self, what: str) -> Snapshot:
        check_open(self._vm, what)
        self._check_not_closed(what)
        snapshot = await self._launcher.snapshot(self._vm)
        self.last_pause = snapshot.pause
        if self._closed:
            snapshot.discard()
            self._check_not_closed(what)
        return snapshot

    async def _hold(self, machine: AbstractAsyncContextManager[Vm]) -> HeldMachine[Vm]:
        try:
            return await hold_machine(self._services, machine)
        except trio.ClosedResourceError as exc:
            raise SandboxClosedError("the sandbox's block exited meanwhile") from exc

    def _check_not_closed(self, what: str) -> None:
        if self._closed:
            raise SandboxClosedError(f"{what} is not possible: the sandbox's block has exited; open another sandbox")

    def close(self) -> None:
        """Remove what was kept for later, and let requests find out that the block was left."""
        self._closed = True
        self._disk.close()
        self._checkpoints.discard_all()
        if self._asleep is not None:
            self._asleep.discard()
            self._asleep = None
        self.slot.reopen()


def _put_to_disk(snapshot: Snapshot) -> None:
    """Write a snapshot's files to the disk, and give back the memory that the kernel keeps them in. Takes a while."""
    paths = [path for path in (snapshot.saved.devices, snapshot.config.memory_file) if path is not None]
    sync_files(paths)
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
