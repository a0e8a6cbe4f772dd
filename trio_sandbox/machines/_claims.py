"""Who gets how much of a host, and who waits: values in, values out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, final

import attrs
import trio


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


NOTHING: Final = Resources(0, 0)


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

    Args:
      total: What there is to be given out here.
      together: What this budget and others may have given out together, at least *total*; None: nobody minds the others.

    """

    def __init__(self, total: Resources, together: Resources | None = None) -> None:
        self.total = total
        self.together = total if together is None else together
        self.others = NOTHING
        """What others have given out, as far as is known."""
        self._in_use = NOTHING
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

    @property
    def next(self) -> Claim | None:
        """The claim whose turn it is, if it fits `total` beside what is granted; whether others leave room for it is another question."""
        claim = next(iter(self._waiting), None)
        return claim if claim is not None and (self._in_use + claim.amount).fits(self.total) else None

    def fits_together(self, amount: Resources) -> bool:
        """Tell whether *amount* can be in use here beside what others have given out."""
        return (amount + self.others).fits(self.together)

    def has_room_for(self, amount: Resources) -> bool:
        """Tell whether there is room for *amount* beside all that is granted and waited for, and beside what others have given out."""
        wanted = self.demand + amount
        return wanted.fits(self.total) and self.fits_together(wanted)

    @trio.lowlevel.enable_ki_protection
    def submit(self, claim: Claim) -> None:
        """Put *claim* at the end of the queue. It must be able to fit `total`."""
        assert claim.amount.fits(self.total), "what never fits would hold up everybody for ever"
        self._waiting[claim] = None

    @trio.lowlevel.enable_ki_protection
    def grant(self, claim: Claim) -> None:
        """Grant *claim*, which is the `next`."""
        del self._waiting[claim]
        self.take(claim)

    @trio.lowlevel.enable_ki_protection
    def take(self, claim: Claim) -> None:
        """Grant *claim* now, whether there is room or not: for what is in use in any case."""
        claim.granted = True
        self._granted.add(claim)
        self._in_use += claim.amount

    @trio.lowlevel.enable_ki_protection
    def withdraw(self, claim: Claim) -> None:
        """Take back what *claim* got, or its place in the queue, if any."""
        if claim in self._granted:
            self._granted.remove(claim)
            self._in_use -= claim.amount
        else:
            self._waiting.pop(claim, None)

    @trio.lowlevel.enable_ki_protection
    def split(self, claim: Claim, parts: Sequence[Claim]) -> None:
        """Put *parts*, which come to the same, in the place of *claim*, which is granted."""
        self._granted.remove(claim)
        self._granted.update(parts)
