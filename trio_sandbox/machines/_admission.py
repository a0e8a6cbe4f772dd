"""Admission: sandboxes wait, first come, first served, until there is memory and processor for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .. import constants
from .._config import HostConfig, SandboxConfig
from .._errors import CapacityError
from ._budget import Limit, cpu_limit, disk_shortage, memory_limit


@final
@attrs.frozen
class Resources:
    """What is given out: an amount of each kind."""

    memory_mib: int
    vcpus: int
    disk_mib: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.memory_mib + other.memory_mib, self.vcpus + other.vcpus, self.disk_mib + other.disk_mib)

    def __mul__(self, count: int) -> Resources:
        return Resources(self.memory_mib * count, self.vcpus * count, self.disk_mib * count)

    def __sub__(self, other: Resources) -> Resources:
        return self + other * -1

    def fits(self, room: Resources) -> bool:
        """Tell whether there is enough of every kind in *room*."""
        return self.memory_mib <= room.memory_mib and self.vcpus <= room.vcpus and self.disk_mib <= room.disk_mib


_NOTHING: Final = Resources(0, 0)


@final
@attrs.define(eq=False)
class Claim:
    """One request for an amount; it is itself only."""

    amount: Resources
    granted: bool = False


@final
class Budget:
    """Who gets how much of a total, and who waits: no I/O, no tasks.

    Nobody overtakes: what waits at the head of the queue holds up even those that would fit, or else
    a large claim could wait for ever while small ones come and go.
    """

    def __init__(self, total: Resources) -> None:
        self.total = total
        self._in_use = _NOTHING
        self._granted: set[Claim] = set()
        self._waiting: OrderedDict[Claim, None] = OrderedDict()

    @property
    def in_use(self) -> Resources:
        """The sum of what is granted."""
        return self._in_use

    @property
    def waiting(self) -> int:
        """How many claims wait."""
        return len(self._waiting)

    @property
    def demand(self) -> Resources:
        """The sum of what is granted and what is waited for."""
        return sum((claim.amount for claim in self._waiting), self._in_use)

    @trio.lowlevel.enable_ki_protection
    def submit(self, claim: Claim) -> None:
        """Grant *claim* now, or put it at the end of the queue. It must be able to fit `total`."""
        assert claim.amount.fits(self.total), "what never fits would hold up everybody for ever"
        self._waiting[claim] = None
        self._grant()

    @trio.lowlevel.enable_ki_protection
    def take(self, claim: Claim) -> None:
        """Grant *claim* now, whether there is room or not: for what is in use in any case."""
        claim.granted = True
        self._granted.add(claim)
        self._in_use += claim.amount

    @trio.lowlevel.enable_ki_protection
    def withdraw(self, claim: Claim) -> list[Claim]:
        """Take back what *claim* got, or its place in the queue, if any; return the claims granted by that."""
        if claim in self._granted:
            self._granted.remove(claim)
            self._in_use -= claim.amount
        else:
            self._waiting.pop(claim, None)
        return self._grant()

    @trio.lowlevel.enable_ki_protection
    def split(self, claim: Claim, parts: Sequence[Claim]) -> None:
        """Put *parts*, which come to the same, in the place of *claim*, which is granted."""
        self._granted.remove(claim)
        self._granted.update(parts)

    def _grant(self) -> list[Claim]:
        granted: list[Claim] = []
        while self._waiting:
            claim = next(iter(self._waiting))
            if not (self._in_use + claim.amount).fits(self.total):
                break
            del self._waiting[claim]
            self._granted.add(claim)
            self._in_use += claim.amount
            claim.granted = True
            granted.append(claim)
        return granted


@final
@attrs.frozen(kw_only=True)
class AdmissionStatistics:
    """Numbers about what a host's sandboxes may have together."""

    memory_mib_reserved: int
    """What open sandboxes may use, in MiB: their RAM, and QEMU's own memory besides."""
    memory_mib_budget: int
    """What they may use at most, in MiB."""
    vcpus_reserved: int
    """The virtual CPUs of open sandboxes."""
    vcpu_budget: int
    """The virtual CPUs that there may be at most."""
    disk_mib_reserved: int = 0
    """What sandboxes may write to their disks, in MiB, those that hibernate included; 0 without `HostConfig.disk_budget_mib`."""
    disk_mib_budget: int | None = None
    """What they may write at most, in MiB: `HostConfig.disk_budget_mib`."""
    tasks_waiting: int
    """Tasks in `Host.open_sandbox` that wait until others have closed theirs."""


def _ignore() -> None:
    """Take no notice."""


@final
class Admission:
    """A limiter of several kinds of tokens, for sandboxes; FIFO.

    Args:
      config: The budgets.
      directory: Where the sandboxes' disks are; while its file system has less than the reserve left, nobody is admitted. None:
        nobody minds.

    """

    def __init__(self, config: HostConfig, directory: Path | None = None) -> None:
        self._directory = directory
        self._disk_mib = config.disk_budget_mib
        self._memory = (
            memory_limit()
            if config.memory_budget_mib is None
            else Limit(config.memory_budget_mib, "HostConfig.memory_budget_mib")
        )
        self._vcpus = cpu_limit() if config.vcpu_budget is None else Limit(config.vcpu_budget, "HostConfig.vcpu_budget")
        self._budget = Budget(Resources(self._memory.amount, self._vcpus.amount, self._disk_mib or 0))
        self._events: dict[Claim, trio.Event] = {}
        self.on_wait: Callable[[], object] = _ignore
        """Called when a task has to wait, or one more."""
        self.on_release: Callable[[], object] = _ignore
        """Called when something came free, or a task waits no more."""

    @property
    def total(self) -> Resources:
        """What there is to be given out."""
        return self._budget.total

    @property
    def demand(self) -> Resources:
        """What is given out and what is waited for, together; where that is more than `total`, tasks wait."""
        return self._budget.demand

    def statistics(self) -> AdmissionStatistics:
        """Return the numbers as they are now."""
        return AdmissionStatistics(
            memory_mib_reserved=self._budget.in_use.memory_mib,
            memory_mib_budget=self._budget.total.memory_mib,
            vcpus_reserved=self._budget.in_use.vcpus,
            vcpu_budget=self._budget.total.vcpus,
            disk_mib_reserved=self._budget.in_use.disk_mib,
            disk_mib_budget=self._disk_mib,
            tasks_waiting=self._budget.waiting,
        )

    @asynccontextmanager
    async def admit(self, config: SandboxConfig) -> AsyncGenerator[None]:
        """Wait until a sandbox of *config* fits, and hold its share for the block.

        Cancelled while it waits, or in the block, it leaves nothing taken.

        Raises:
          CapacityError: at once, if it does not fit even when it is alone; or, when its turn has come, if the disk is nearly full.

        """
        claim = Claim(self.amount(config))
        try:
            await self._wait_granted(claim)
            self._check_disk()
            yield
        finally:
            self._withdraw(claim)

    @asynccontextmanager
    async def admit_again(self, config: SandboxConfig) -> AsyncGenerator[None]:
        """Admit a sandbox that has its disk still, by `keep_disk`: as `admit`, but for that."""
        claim = Claim(attrs.evolve(self.amount(config), disk_mib=0))
        try:
            await self._wait_granted(claim)
            yield
        finally:
            self._withdraw(claim)

    @contextmanager
    def keep_disk(self, config: SandboxConfig) -> Generator[None]:
        """Hold the disk's part of a share for the block, beside the whole share that is given back in it."""
        claim = Claim(Resources(0, 0, self.amount(config).disk_mib))
        try:
            self._budget.take(claim)
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
        fits = (self.demand + claim.amount).fits(self.total)
        try:
            if fits:
                self._check_disk()
                self._budget.submit(claim)
            yield fits
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

    async def _wait_granted(self, claim: Claim) -> None:
        """Submit *claim*, and wait for its turn; whoever does is to withdraw it in any case."""
        self._budget.submit(claim)
        if claim.granted:
            await trio.lowlevel.checkpoint()
        else:
            event = self._events[claim] = trio.Event()
            self.on_wait()
            await event.wait()

    @contextmanager
    def _hold(self, claim: Claim) -> Generator[None]:
        try:
            yield
        finally:
            self._withdraw(claim)

    def _withdraw(self, claim: Claim) -> None:
        self._events.pop(claim, None)
        for granted in self._budget.withdraw(claim):
            self._events[granted].set()
        self.on_release()

    def amount(self, config: SandboxConfig) -> Resources:
        """Return the share of a sandbox of *config*.

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
        return Resources(wanted, config.vcpus, self._amount_of_disk(config))

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
