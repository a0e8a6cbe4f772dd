"""The warm pool: machines that are up and idle, for sandboxes that are still to come.

They are spare. A sandbox of their configuration takes one over; one that would have to wait for the memory or
the processors that they hold makes them go. Nothing here knows what a machine is: see `Warmable`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Final, Generic, Protocol, TypeVar, final

import attrs
import trio

from .._config import SandboxConfig
from .._errors import SandboxError
from .._image import AnyImage
from .._nurseries import Services, open_services
from .._observe import part_logger
from ._admission import Admission
from ._claims import NOTHING, Resources
from ._machines import HeldMachine

_log = part_logger("warm")

#: Seconds before another try to open what could not be opened; twice as many each time, up to the second number.
_BACKOFF: Final = (1.0, 60.0)
#: Seconds without refills after machines had to go: who needed the room is likely to be followed by others.
_CALM: Final = 2.0
#: Seconds without refills after a sandbox was opened: for its first answer, which a machine that starts would delay.
_FIRST_STEPS: Final = 0.2

#: Seconds between two looks at what other hosts have given out, where that is anything.
_LOOK: Final = 2.0

WarmKey = tuple[AnyImage, SandboxConfig]
VmT = TypeVar("VmT")


class Warmable(Protocol[VmT]):
    """What a pool needs to know of machines."""

    async def prepare(self, image: AnyImage) -> None:
        """Have all ready that the machines of *image* share, however long that takes."""
        ...

    def open(self, image: AnyImage, config: SandboxConfig) -> AbstractAsyncContextManager[VmT]:
        """Open a machine for a block."""
        ...

    async def settle(self, vm: VmT) -> None:
        """Do with a new machine what makes its first answer come soon, and its waiting cost little."""
        ...

    async def wake(self, vm: VmT) -> None:
        """Prove that an idle machine is fit for use, and make it so; an error if it is not, and soon."""
        ...


@final
@attrs.frozen(kw_only=True)
class WarmStatistics:
    """Numbers about `HostConfig.warm`: VMs that are kept ready."""

    ready: int = 0
    """VMs that are ready now."""
    hits: int = 0
    """Sandboxes that got one."""
    misses: int = 0
    """Sandboxes of a configuration in the pool that found no VM ready, and were opened as usual."""
    dropped: int = 0
    """VMs that were dead or stuck when they were checked out."""
    evicted: int = 0
    """VMs that were closed so that a sandbox need not wait for their memory or processors."""
    refills: int = 0
    """VMs that were opened for the pool."""
    refill_failures: int = 0
    """Those that could not be opened; the log says why."""
    last_refill_seconds: float | None = None
    """Seconds that opening the last one took, until it was ready; None before the first."""
    total_refill_seconds: float = 0.0
    """Seconds that opening all of them took."""


@attrs.define(eq=False)
class _Spare(Generic[VmT]):
    """A machine of the pool from the start of its opening, until it is a sandbox's, or gone."""

    key: WarmKey
    held: HeldMachine[VmT]
    opening: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    let_go: bool = False


class _NoRoomError(Exception):
    """Somebody else was faster."""


@final
class WarmPool(Generic[VmT]):
    """Keeps machines ready while `serve` runs.

    Args:
      wanted: How many of which.
      admission: Who gets which share of the host.
      machines: What they are.

    Raises:
      CapacityError: if one of *wanted* can never fit, even alone.

    """

    def __init__(self, wanted: Mapping[WarmKey, int], admission: Admission, machines: Warmable[VmT]) -> None:
        self._wanted = {key: count for key, count in wanted.items() if count}
        self._amounts = {key: admission.amount(key[1]) for key in self._wanted}
        self._admission = admission
        self._machines = machines
        self._idle: dict[WarmKey, deque[_Spare[VmT]]] = {key: deque() for key in self._wanted}
        self._refill: _Spare[VmT] | None = None
        self._leaving: set[_Spare[VmT]] = set()
        self._users_opening = 0
        self._not_before: dict[WarmKey | None, float] = {}
        self._failures: dict[WarmKey, int] = dict.fromkeys(self._wanted, 0)
        self._changed = trio.Event()
        self._hits = self._misses = self._dropped = self._evicted = self._refills = self._refill_failures = 0
        self._last_seconds: float | None = None
        self._total_seconds = 0.0
        admission.on_wait = self._give_way
        admission.on_release = self._change
        whole = _sum(amount for key, amount in self._amounts.items() for _ in range(self._wanted[key]))
        if not whole.fits(admission.total):
            _log.warning(
                "`HostConfig.warm` asks for %s, of %s that there are: it will never be full", whole, admission.total
            )

    def statistics(self) -> WarmStatistics:
        """Return the numbers as they are now."""
        return WarmStatistics(
            ready=self._ready(),
            hits=self._hits,
            misses=self._misses,
            dropped=self._dropped,
            evicted=self._evicted,
            refills=self._refills,
            refill_failures=self._refill_failures,
            last_refill_seconds=self._last_seconds,
            total_refill_seconds=self._total_seconds,
        )

    # --- For those who want a machine ---

    @contextmanager
    def user_opens(self) -> Generator[None]:
        """Begin no refill during the block: whoever waits for a sandbox gets the processors."""
        self._users_opening += 1
        try:
            yield
        finally:
            self._users_opening -= 1
            self._pause(_FIRST_STEPS)

    @asynccontextmanager
    async def checkout(self, image: AnyImage, config: SandboxConfig) -> AsyncGenerator[HeldMachine[VmT] | None]:
        """Yield a machine that is the block's alone, with its share of the host; None if there is none.

        It is closed with the block, however that is left, and never comes back into the pool.
        """
        held = await self._take((image, config))
        try:
            yield held
        finally:
            if held is not None:
                await held.close()  # noqa: ASYNC102 - it shields itself, and the machine's cleanup is bounded

    async def _take(self, key: WarmKey) -> HeldMachine[VmT] | None:
        if key not in self._wanted:
            await trio.lowlevel.checkpoint()
            return None
        idle = self._idle[key]
        while idle:
            spare = idle.popleft()
            fit = False
            try:
                await self._machines.wake(spare.held.vm)
                fit = True
            except (SandboxError, OSError) as exc:
                self._dropped += 1
                _log.warning("an idle VM could not be used any more: %s", exc)
            finally:
                if not fit:
                    self._let_go(spare)
            if fit:
                self._hits += 1
                self._change()
                return spare.held  # noqa: ASYNC910 - waking it was one
        self._misses += 1
        await trio.lowlevel.checkpoint()
        return None

    # --- Giving way ---

    def _give_way(self) -> None:
        """Have as many machines closed as those that wait for admission need."""
        while self._ready() and not self._suffices():
            # The one that waits longest of the configuration that has most: others keep theirs.
            fullest = max(self._idle.values(), key=len)
            self._evict(fullest.popleft())
        if not self._suffices():
            self._stop_refill()

    def give_back(self) -> bool:
        """Have one machine closed, the one that is about to be opened if there is no other; tell whether there was any.

        That is for want of memory: it may be less than the budget says.
        """
        if self._leaving:
            return True  # what they have comes free now
        if self._ready():
            self._evict(max(self._idle.values(), key=len).popleft())
            return True
        return self._stop_refill()

    def _stop_refill(self) -> bool:
        if self._refill is None:
            return False
        self._refill.opening.cancel(reason="somebody needs what this machine would take")
        self._evict(self._refill)
        self._refill = None
        return True

    def _suffices(self) -> bool:
        leaving = _sum(self._amounts[spare.key] for spare in self._leaving)
        return self._admission.has_room_for(NOTHING - leaving)

    def _evict(self, spare: _Spare[VmT]) -> None:
        self._evicted += 1
        self._pause(_CALM)
        self._let_go(spare)

    def _let_go(self, spare: _Spare[VmT]) -> None:
        spare.let_go = True
        self._leaving.add(spare)
        spare.held.give_up()

    def _ready(self) -> int:
        return sum(map(len, self._idle.values()))

    # --- Refilling ---

    def _pause(self, seconds: float) -> None:
        """Begin no refill of any kind for so long."""
        self._not_before[None] = max(self._not_before.get(None, 0.0), trio.current_time() + seconds)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep the pool full, one machine after the other. With the end of this all machines are closed."""
        try:
            async with open_services("open_host()") as services:
                task_status.started()
                for image in sorted({image for image, _ in self._wanted}, key=str):
                    await self._prepare(image)
                while True:
                    changed = self._changed
                    shared = self._admission.look()
                    key = self._next()
                    if key is not None:
                        await self._open(key, services)
                        continue
                    with trio.move_on_at(self._next_time()), trio.move_on_after(_LOOK if shared else math.inf):
                        await changed.wait()
        finally:
            for idle in self._idle.values():
                idle.clear()

    async def _prepare(self, image: AnyImage) -> None:  # noqa: ASYNC910 - preparing is one
        """Wait for *image*; where that fails, opening a machine will say so, and be tried again."""
        try:
            await self._machines.prepare(image)
        except (SandboxError, OSError) as exc:
            _log.warning("image %r is not ready for the pool: %s", image, exc)

    def _next(self) -> WarmKey | None:
        """Return what to open now, if anything."""
        now = trio.current_time()
        if self._users_opening or now < self._not_before.get(None, now):
            return None
        for key, count in self._wanted.items():
            if (
                len(self._idle[key]) < count
                and now >= self._not_before.get(key, now)
                and self._admission.has_room_for(self._amounts[key])
                and self._admission.has_memory_for(self._amounts[key])
            ):
                return key
        return None

    def _next_time(self) -> float:
        """Return when what had to be put off may be tried again."""
        now = trio.current_time()
        return min((moment for moment in self._not_before.values() if moment > now), default=math.inf)

    async def _open(self, key: WarmKey, services: Services) -> None:
        begun = trio.current_time()
        spare = self._refill = _Spare(key, HeldMachine(self._machine(key), contained=True))
        try:
            with spare.opening:
                await services.start(self._keep, spare)
        except _NoRoomError:
            return  # noqa: ASYNC910 - starting a service is one
        except Exception as exc:  # noqa: BLE001 - whatever it is, the host's sandboxes should not die of it
            self._failed(key, exc)
            return  # noqa: ASYNC910 - as above
        finally:
            self._refill = None
        if spare.let_go:
            return
        self._idle[key].append(spare)
        self._failures[key] = 0
        self._refills += 1
        self._last_seconds = trio.current_time() - begun
        self._total_seconds += self._last_seconds

    def _failed(self, key: WarmKey, exc: Exception) -> None:
        self._refill_failures += 1
        self._failures[key] += 1
        first, longest = _BACKOFF
        pause = min(first * 2 ** min(self._failures[key] - 1, 30), longest)
        self._not_before[key] = trio.current_time() + pause
        expected = isinstance(exc, (SandboxError, OSError))
        _log.warning(
            "no VM of image %r could be opened for the pool; next try in %g s: %s",
            key[0],
            pause,
            exc,
            exc_info=None if expected else exc,
        )

    async def _keep(self, spare: _Spare[VmT], *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await spare.held.serve(task_status=task_status)
        finally:
            self._leaving.discard(spare)
            self._change()
        if spare.let_go:
            # Nobody else asks how it ended.
            try:
                await spare.held.close()
            except Exception as exc:  # noqa: BLE001 - as above
                _log.warning("a VM of the pool did not end well: %s", exc, exc_info=exc)

    @asynccontextmanager
    async def _machine(self, key: WarmKey) -> AsyncGenerator[VmT]:
        image, config = key
        with self._admission.reserve(config) as fits:
            if not fits:
                raise _NoRoomError
            async with self._machines.open(image, config) as vm:
                await self._machines.settle(vm)
                yield vm


def _sum(amounts: Iterable[Resources]) -> Resources:
    return sum(amounts, NOTHING)
