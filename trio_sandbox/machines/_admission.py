"""Admission: sandboxes wait, first come, first served, until there is memory and processor for them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .. import constants
from .._config import HostConfig, SandboxConfig
from .._errors import CapacityError
from .._observe import measure, part_logger, span
from ._budget import Limit, charge_mib, cpu_limit, disk_room, disk_shortage, memory_limit
from ._claims import NOTHING, Budget, Claim, Resources
from ._ledger import Ledger, LedgerEntry, reckon
from ._measured import MeasuredMemory
from ._memory import Level, MemoryStatistics

_log = part_logger("admission")

#: Seconds between two looks at what other processes have given out, or at the memory that is left, while that holds somebody up.
_LOOK: Final = 0.2


@final
@attrs.frozen(kw_only=True)
class AdmissionStatistics:
    """How much a host's sandboxes have reserved, and how much they may reserve."""

    memory_mib_reserved: int
    """What open sandboxes may use, in MiB: their RAM, and QEMU's own memory besides; divided by `memory_overcommit`."""
    memory_mib_budget: int
    """What they may use at most, in MiB."""
    vcpus_reserved: int
    """The virtual CPUs of open sandboxes."""
    vcpu_budget: int
    """The virtual CPUs that they may have at most."""
    disk_mib_reserved: int = 0
    """What sandboxes may write to their disks, in MiB, those that hibernate included; 0 without `HostConfig.disk_budget_mib`."""
    disk_mib_budget: int | None = None
    """What they may write at most, in MiB: `HostConfig.disk_budget_mib`."""
    memory_mib_elsewhere: int = 0
    """What this user's other hosts on this machine have reserved, those of other processes included, in MiB. It counts against what all of
    them may have together; see `HostConfig.memory_budget_mib`."""
    disk_mib_elsewhere: int = 0
    """The same of what their sandboxes may write to the disk that this host's are on."""
    tasks_waiting: int
    """Tasks in `Host.open_sandbox` that wait their turn."""
    memory_overcommit: float = 1.0
    """`HostConfig.memory_overcommit`."""
    memory: MemoryStatistics | None = None
    """The memory that is really left; None if `memory_overcommit` is 1, and nobody looks."""


def _ignore() -> None:
    """Take no notice."""


def _memory(config: HostConfig) -> Limit | None:
    """Return the budget that was set by hand, if one was."""
    if config.memory_budget_mib is None:
        return None
    return Limit(config.memory_budget_mib, "HostConfig.memory_budget_mib")


@final
class Admission:
    """A limiter of several kinds of tokens, for sandboxes; FIFO.

    Args:
      config: The budgets.
      directory: Where the sandboxes' disks are; while its file system has less than the reserve left, nobody is admitted. None:
        nobody minds.
      ledger: Where this user's other hosts say what they have given out; None: they are not counted.

    """

    def __init__(self, config: HostConfig, directory: Path | None = None, ledger: Ledger | None = None) -> None:
        self._directory = directory
        self._ledger = ledger
        self._patience = config.timeouts.admission
        self._overcommit = config.memory_overcommit
        self._measured = MeasuredMemory(config.memory_overcommit) if config.memory_overcommit > 1 else None
        self._held_since: float | None = None
        self._disk_mib = config.disk_budget_mib
        self._vcpus = cpu_limit() if config.vcpu_budget is None else Limit(config.vcpu_budget, "HostConfig.vcpu_budget")
        self._disk = 0 if directory is None else os.stat(directory).st_dev
        disk_total = self._disk_mib or 0
        if ledger is None:
            self._memory = _memory(config) or memory_limit()
            memory_total = self._memory.amount
        else:
            found, others = memory_limit(), ledger.others()
            memory_total = reckon(found.amount, self._memory_of(others), [entry.memory_total for entry in others])
            self._memory = _memory(config) or Limit(memory_total, found.reason)
            if directory is not None and self._disk_mib is not None:
                others = [entry for entry in others if entry.disk == self._disk]
                disk_total = reckon(disk_room(directory), self._disk_of(others), [entry.disk_total for entry in others])
        self._entry = LedgerEntry(pid=os.getpid(), memory_total=memory_total, disk=self._disk, disk_total=disk_total)
        own = Resources(self._memory.amount, self._vcpus.amount, self._disk_mib or 0)
        # Who sets a budget by hand may know better than we do what there is.
        together = Resources(max(own.memory_mib, memory_total), self._vcpus.amount, max(own.disk_mib, disk_total))
        self._budget = Budget(own, together)
        self._events: dict[Claim, trio.Event] = {}
        self.on_wait: Callable[[], object] = _ignore
        """Called when a task has to wait, or one more."""
        self.on_release: Callable[[], object] = _ignore
        """Called when something came free, or a task waits no more."""
        self._publish(NOTHING)

    @property
    def total(self) -> Resources:
        """What there is to be given out here."""
        return self._budget.total

    @property
    def demand(self) -> Resources:
        """What is given out here and what is waited for, together."""
        return self._budget.demand

    def has_room_for(self, amount: Resources) -> bool:
        """Tell whether *amount* fits beside all that is given out and waited for, as far as is known of other hosts.

        Less than nothing is what is about to come free.
        """
        return self._budget.has_room_for(amount)

    def has_memory_for(self, amount: Resources) -> bool:
        """Look whether the memory that is really left holds *amount*; it does where nobody measures."""
        return self._measured is None or self._measured.holds(amount.memory_mib)

    def needs_memory(self) -> bool:
        """Look whether somebody should give memory back: for what there is, or for who waits."""
        if self._measured is None:
            return False
        self._measured.look()
        claim = self._budget.next
        return self._measured.watch.level is Level.SHORT or (
            claim is not None and self._lacks_memory(claim) is not None
        )

    def _lacks_memory(self, claim: Claim) -> str | None:
        """Say why there was too little memory for *claim* at the last look; None if there was enough, or nobody measures."""
        measured, wanted = self._measured, claim.amount.memory_mib
        return None if measured is None or measured.watch.admits(wanted) else measured.describe(wanted)

    def note_sleep(self) -> None:
        """Count a sandbox that was put to sleep for want of memory."""
        if self._measured is not None:
            self._measured.note_sleep()

    def look(self) -> bool:
        """Find out what other hosts have given out; tell whether there may be more or less room without that anybody here does something."""
        self._budget.others = self._read_others()
        return self._measured is not None or self._budget.others != NOTHING

    def statistics(self) -> AdmissionStatistics:
        """Return the numbers as they are now."""
        self.look()
        return AdmissionStatistics(
            memory_mib_reserved=self._budget.in_use.memory_mib,
            memory_mib_budget=self._budget.total.memory_mib,
            vcpus_reserved=self._budget.in_use.vcpus,
            vcpu_budget=self._budget.total.vcpus,
            disk_mib_reserved=self._budget.in_use.disk_mib,
            disk_mib_budget=self._disk_mib,
            memory_mib_elsewhere=self._budget.others.memory_mib,
            disk_mib_elsewhere=self._budget.others.disk_mib,
            tasks_waiting=self._budget.waiting,
            memory_overcommit=self._overcommit,
            memory=None if self._measured is None else self._measured.watch.statistics(),
        )

    @asynccontextmanager
    async def admit(self, config: SandboxConfig, *, idles: bool = True) -> AsyncGenerator[Callable[[], None]]:
        """Wait until a sandbox of *config* fits, and hold its share for the block.

        Yields what to call when its machine is up: what it takes shows then in the memory that is left.

        Cancelled while it waits, or in the block, it leaves nothing taken.

        Args:
          config: What it gets.
          idles: Whether it is idle most of the time, as `HostConfig.memory_overcommit` takes sandboxes to be; else it counts in full.

        Raises:
          CapacityError: at once, if it does not fit even when it is alone; or, when its turn has come, if the disk is nearly full, or if
            other hosts of this user hold what it waits for, or memory is tight, for longer than `Timeouts.admission`.

        """
        claim = Claim(self.amount(config, idles=idles))
        try:
            await self._wait_granted(claim)
            self._check_disk()
            yield partial(self._forget, claim)
        finally:
            self._withdraw(claim)

    @asynccontextmanager
    async def admit_again(self, config: SandboxConfig) -> AsyncGenerator[Callable[[], None]]:
        """Admit a sandbox that has its disk still, by `keep_disk`: as `admit`, but for that, and full disk or not."""
        claim = Claim(attrs.evolve(self.amount(config), disk_mib=0))
        try:
            await self._wait_granted(claim)
            yield partial(self._forget, claim)
        finally:
            self._withdraw(claim)

    @contextmanager
    def keep_disk(self, config: SandboxConfig) -> Generator[None]:
        """Hold the disk's part of a share for the block, beside the whole share that is given back in it."""
        claim = Claim(Resources(0, 0, self.amount(config).disk_mib))
        try:
            self._budget.take(claim)
            self._settle()
            yield
        finally:
            self._withdraw(claim)

    @contextmanager
    def reserve(self, config: SandboxConfig) -> Generator[bool]:
        """Hold the share of a sandbox of *config* for the block, if that makes nobody wait; yields whether it does.

        It fits beside all that others have or wait for, or it is not given.

        Raises:
          CapacityError: as `admit`, if the disk is nearly full, or if it does not fit even when it is alone.

        """
        claim = Claim(self.amount(config))
        try:
            if self.has_room_for(claim.amount) and self.has_memory_for(claim.amount):
                self._check_disk()
                self._budget.submit(claim)
                self._settle()
                if not claim.granted:
                    self._budget.withdraw(claim)  # another host was faster
            yield claim.granted
        finally:
            self._withdraw(claim)

    @asynccontextmanager
    async def admit_together(
        self, config: SandboxConfig, count: int, *, beside: int
    ) -> AsyncGenerator[list[AbstractContextManager[None]]]:
        """Wait until *count* sandboxes of *config* fit at once, and yield a share for each; cancelled as `admit`.

        To wait for one after the other could take for ever where others do the same.

        A share is given back when its own block is left, and at the latest with this one.

        Args:
          config: What each of them gets.
          count: How many.
          beside: How many like these the caller has, and keeps meanwhile.

        Raises:
          CapacityError: at once, if they can't ever fit together, and beside what the caller has; or as `admit`.

        """
        amount = self.amount(config)
        total = self._budget.total
        if not (amount * (count + beside)).fits(total):
            disk = (
                ""
                if self._disk_mib is None
                else f", and {amount.disk_mib * (count + beside)} MiB of the {self._disk_mib} MiB of `HostConfig.disk_budget_mib`"
            )
            raise CapacityError(
                f"{count} forks of a sandbox with {config.memory_mib} MiB of RAM and {config.vcpus} vCPUs can never fit beside the "
                f"{beside} that there are: together they take {amount.memory_mib * (count + beside)} MiB and "
                f"{amount.vcpus * (count + beside)} vCPUs, and all of this host's sandboxes may have {total.memory_mib} MiB "
                f"({self._memory.reason}) and {total.vcpus} ({self._vcpus.reason}){disk}; ask for fewer forks, or raise "
                "`HostConfig.memory_budget_mib` and `HostConfig.vcpu_budget`"
            )
        whole, parts = Claim(amount * count), [Claim(amount, granted=True) for _ in range(count)]
        try:
            await self._wait_granted(whole)
            self._check_disk()
            self._budget.split(whole, parts)
            yield [self._hold(part) for part in parts]
        finally:
            for claim in (whole, *parts):
                self._withdraw(claim)

    async def _wait_granted(self, claim: Claim) -> None:  # noqa: ASYNC910 - what it waits for is one
        """Submit *claim*, and wait for its turn; whoever does is to withdraw it in any case."""
        with span("admit", memory_mib=claim.amount.memory_mib):
            began = trio.current_time()
            await self._wait_turn(claim)
            measure("admission.duration", trio.current_time() - began)

    async def _wait_turn(self, claim: Claim) -> None:  # noqa: ASYNC910 - as above
        self._budget.submit(claim)
        self._settle()
        if claim.granted:
            await trio.lowlevel.checkpoint()
            return
        self._events[claim] = trio.Event()
        self.on_wait()
        since = trio.current_time()
        while not claim.granted:
            if self._budget.next is claim:
                await self._wait_held(claim, since)
            else:
                await self._events[claim].wait()
                self._events[claim] = trio.Event()

    async def _wait_held(self, claim: Claim, since: float) -> None:  # noqa: ASYNC910 - it is called for one that has to wait
        """Wait while *claim*, the next, is held up by nothing but what others have: other hosts, or who has the machine's memory.

        Its patience began when it came, and not before the last was granted: all who wait for the same lose it together.
        """
        _log.warning("a sandbox waits %s", self._say_why(claim))
        while not claim.granted and self._budget.next is claim:
            if trio.current_time() >= max(since, self._held_since or since) + self._patience:
                raise self._refusal(claim)
            await trio.sleep(_LOOK)
            self._settle()

    def _refusal(self, claim: Claim) -> CapacityError:
        if (lack := self._lacks_memory(claim)) is not None:
            return CapacityError(
                f"no sandbox was opened or woken up, because memory was tight for {self._patience:g} s: {lack}. Close sandboxes, or end other "
                "programs. Nothing was started, and it is safe to try again"
            )
        return CapacityError(
            f"no sandbox was opened, because there was no room for it within {self._patience:g} s: {self._describe_others(claim)}. "
            "Close sandboxes there, or end these processes; or give each host a share of its own with `HostConfig.memory_budget_mib` and "
            "`HostConfig.disk_budget_mib`. Nothing was started, and it is safe to try again"
        )

    def _say_why(self, claim: Claim) -> str:
        """Say what *claim*, the next, waits for."""
        lack = self._lacks_memory(claim)
        return f"for other processes: {self._describe_others(claim)}" if lack is None else f"for memory: {lack}"

    def _describe_others(self, claim: Claim) -> str:
        """Say what *claim* wants of what there is, and who has how much."""
        together, own = self._budget.together, self._budget.in_use
        others = [
            f"process {entry.pid} has "
            + self._say(entry.memory_reserved, entry.disk_reserved if entry.disk == self._disk else 0)
            for entry in ([] if self._ledger is None else self._ledger.others())
            if entry.memory_reserved or entry.disk_reserved
        ]
        return (
            f"it takes {self._say(claim.amount.memory_mib, claim.amount.disk_mib)}; all of this user's hosts together may have "
            f"{self._say(together.memory_mib, together.disk_mib)}; this one has {self._say(own.memory_mib, own.disk_mib)}; "
            + (", ".join(others) or "others have nothing any more")
        )

    def _say(self, memory_mib: int, disk_mib: int) -> str:
        return f"{memory_mib} MiB" + (f" and {disk_mib} MiB of the disk" if self._disk_mib else "")

    @trio.lowlevel.enable_ki_protection
    def _settle(self) -> None:
        """Grant what can be granted, and have other hosts know of it."""
        while (claim := self._budget.next) is not None:
            if not self.has_memory_for(claim.amount):
                break
            wanted = self._budget.in_use + claim.amount
            self._publish(wanted)  # before the look: one of two that do so at the same time sees the other
            self._budget.others = self._read_others()
            if not self._budget.fits_together(wanted):
                break
            self._budget.grant(claim)
            self._held_since = None
            if self._measured is not None:
                self._measured.grant(claim, claim.amount.memory_mib)
            self._wake(claim)
        self._publish(self._budget.in_use)
        if claim is None:
            self._held_since = None
        else:
            if self._held_since is None:
                self._held_since = trio.current_time()
            self._wake(claim)  # it is the next, and has to look out for what holds it

    def _wake(self, claim: Claim) -> None:
        if (event := self._events.get(claim)) is not None:
            event.set()

    def _publish(self, amount: Resources) -> None:
        if self._ledger is not None:
            self._ledger.publish(
                attrs.evolve(self._entry, memory_reserved=amount.memory_mib, disk_reserved=amount.disk_mib)
            )

    def _read_others(self) -> Resources:
        if self._ledger is None:
            return NOTHING
        others = self._ledger.others()
        return Resources(self._memory_of(others), 0, self._disk_of(others))

    @staticmethod
    def _memory_of(others: Iterable[LedgerEntry]) -> int:
        return sum(entry.memory_reserved for entry in others)

    def _disk_of(self, others: Iterable[LedgerEntry]) -> int:
        # Who does not count its own disks does not mind those of others.
        return sum(entry.disk_reserved for entry in others if entry.disk == self._disk) if self._disk_mib else 0

    @contextmanager
    def _hold(self, claim: Claim) -> Generator[None]:
        try:
            yield
        finally:
            self._withdraw(claim)

    def _forget(self, claim: Claim) -> None:
        """Count no more that *claim* was given something that need not show yet in the memory that is left."""
        if self._measured is not None:
            self._measured.watch.forget(claim)

    def _withdraw(self, claim: Claim) -> None:
        self._events.pop(claim, None)
        self._budget.withdraw(claim)
        self._forget(claim)
        self._settle()
        self.on_release()

    def amount(self, config: SandboxConfig, *, idles: bool = True) -> Resources:
        """Return the share of a sandbox of *config*; for *idles* see `admit`.

        Raises:
          CapacityError: if it does not fit even when it is alone.

        """
        wanted = config.memory_mib + constants.VM_OVERHEAD_MIB
        if wanted > self._memory.amount:
            raise CapacityError(
                f"a sandbox with {config.memory_mib} MiB of RAM takes {wanted} MiB, with QEMU's own {constants.VM_OVERHEAD_MIB} MiB, "
                f"and can never fit: all of this host's sandboxes together may have {self._memory.amount} MiB "
                f"({self._memory.reason}); ask for a smaller `SandboxConfig.memory_mib`, or raise `HostConfig.memory_budget_mib`"
            )
        if config.vcpus > self._vcpus.amount:
            raise CapacityError(
                f"a sandbox with {config.vcpus} vCPUs can never fit: all of this host's sandboxes together may have "
                f"{self._vcpus.amount} ({self._vcpus.reason}); ask for fewer `SandboxConfig.vcpus`, or raise `HostConfig.vcpu_budget`"
            )
        return Resources(
            charge_mib(config.memory_mib, self._overcommit) if idles else wanted,
            config.vcpus,
            self._amount_of_disk(config),
        )

    def _amount_of_disk(self, config: SandboxConfig) -> int:
        if self._disk_mib is None:
            return 0
        wanted = constants.IMAGE_DISK_MIB if config.disk_mib is None else config.disk_mib
        if wanted > self._disk_mib:
            what = (
                "as its `SandboxConfig.disk_mib` says"
                if config.disk_mib is not None
                else "without `SandboxConfig.disk_mib`"
            )
            raise CapacityError(
                f"a sandbox that may write {wanted} MiB to its disk, {what}, can never fit: all of this host's sandboxes together "
                f"may write {self._disk_mib} MiB (HostConfig.disk_budget_mib); ask for a smaller `SandboxConfig.disk_mib`, or raise that"
            )
        return wanted

    def _check_disk(self) -> None:
        shortage = None if self._directory is None else disk_shortage(self._directory)
        if shortage is not None:
            raise CapacityError(
                f"no sandbox is opened, because {shortage}; make room there, close sandboxes, or set `HostConfig.runtime_dir` to a "
                "directory of another disk. Nothing was started, and it is safe to try again"
            )
