"""Who gets how much, and who waits: every order of claims and withdrawals."""

from __future__ import annotations

import attrs
import hypothesis.strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trio_sandbox.machines._claims import Budget, Claim, Resources

TOTAL = Resources(memory_mib=100, vcpus=8, disk_mib=10)

amounts = st.builds(
    Resources,
    memory_mib=st.one_of(st.integers(1, TOTAL.memory_mib), st.sampled_from([1, 50, 100])),
    vcpus=st.one_of(st.integers(1, TOTAL.vcpus), st.sampled_from([1, 8])),
    disk_mib=st.one_of(st.integers(0, TOTAL.disk_mib), st.sampled_from([0, 10])),
)


#: What this budget and others may have given out together.
TOGETHER = Resources(memory_mib=120, vcpus=8, disk_mib=15)


def settle(budget: Budget) -> list[Claim]:
    """Grant all that can be granted."""
    granted: list[Claim] = []
    while (claim := budget.next) is not None and budget.fits_together(budget.in_use + claim.amount):
        budget.grant(claim)
        granted.append(claim)
    return granted


class BudgetMachine(RuleBasedStateMachine):
    """Claims come, leave while they wait or after they were granted, and leave again."""

    claims = Bundle("claims")
    gone = Bundle("gone")

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(TOTAL, TOGETHER)
        self.present: list[Claim] = []  # in the order of their coming
        self.told: set[Claim] = set()  # those that know that they were granted

    @rule(target=claims, amount=amounts)
    def submit(self, amount: Resources) -> Claim:
        claim = Claim(amount)
        self.budget.submit(claim)
        self.present.append(claim)
        self.settle()
        return claim

    @rule(memory_mib=st.integers(0, 150), disk_mib=st.integers(0, 20))
    def others_take(self, memory_mib: int, disk_mib: int) -> None:
        self.budget.others = Resources(memory_mib, 0, disk_mib)
        self.settle()

    def settle(self) -> None:
        before = self.budget.in_use
        woken = settle(self.budget)
        assert not self.told & set(woken), "told twice"
        self.told |= set(woken)
        # What others take after we have given out is their fault.
        assert before == self.budget.in_use or self.budget.fits_together(self.budget.in_use)

    @rule(target=gone, claim=consumes(claims))
    def withdraw(self, claim: Claim) -> Claim:
        self.present.remove(claim)
        self.budget.withdraw(claim)
        self.settle()
        return claim

    @rule(claim=gone)
    def withdraw_again(self, claim: Claim) -> None:
        before = self.budget.in_use, self.budget.waiting
        self.budget.withdraw(claim)
        assert (self.budget.in_use, self.budget.waiting) == before

    @rule(amount=amounts)
    def withdraw_what_never_came(self, amount: Resources) -> None:
        before = self.budget.in_use, self.budget.waiting
        self.budget.withdraw(Claim(amount))
        assert (self.budget.in_use, self.budget.waiting) == before

    @invariant()
    def never_over_budget(self) -> None:
        granted = [claim for claim in self.present if claim.granted]
        assert self.budget.in_use == sum((claim.amount for claim in granted), Resources(0, 0))
        assert self.budget.in_use.fits(TOTAL)

    @invariant()
    def first_come_first_served(self) -> None:
        granted = [claim.granted for claim in self.present]
        assert granted == sorted(granted, reverse=True), "somebody was overtaken"
        assert self.budget.waiting == granted.count(False)

    @invariant()
    def nobody_waits_without_need(self) -> None:
        head = next((claim for claim in self.present if not claim.granted), None)
        if head is not None:
            wanted = self.budget.in_use + head.amount
            assert not wanted.fits(TOTAL) or not (wanted + self.budget.others).fits(TOGETHER)

    @invariant()
    def every_grant_was_told(self) -> None:
        assert {claim for claim in self.present if claim.granted} <= self.told

    def teardown(self) -> None:
        for claim in list(self.present):
            self.withdraw(claim)
        assert (self.budget.in_use, self.budget.waiting) == (Resources(0, 0), 0)


TestBudget = BudgetMachine.TestCase


def test_every_kind_must_fit() -> None:
    budget = Budget(TOTAL)
    budget.submit(Claim(Resources(memory_mib=60, vcpus=1)))
    settle(budget)
    much_memory, many_vcpus = Claim(Resources(memory_mib=41, vcpus=1)), Claim(Resources(memory_mib=1, vcpus=8))
    for claim in (much_memory, many_vcpus):
        budget.submit(claim)
        assert settle(budget) == []
        budget.withdraw(claim)
    both = Claim(Resources(memory_mib=40, vcpus=7))
    budget.submit(both)
    assert settle(budget) == [both]
    assert both.granted


def test_claims_of_the_same_amount_are_not_the_same() -> None:
    amount = Resources(1, 1)
    assert Claim(amount) != Claim(amount)
    assert attrs.evolve(amount) == amount


def test_room_is_what_neither_claims_nor_others_take() -> None:
    budget = Budget(TOTAL, TOGETHER)
    budget.others = Resources(memory_mib=50, vcpus=0)
    assert budget.has_room_for(Resources(70, 1))
    assert not budget.has_room_for(Resources(71, 1))
    budget.submit(Claim(Resources(60, 1)))
    assert not budget.has_room_for(Resources(11, 1)), "what waits counts"
    assert settle(budget)
    assert budget.has_room_for(Resources(10, 1))
    assert budget.has_room_for(Resources(-30, 0))
