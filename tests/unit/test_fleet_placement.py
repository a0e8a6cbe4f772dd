"""Which node gets a sandbox, and who waits."""

from __future__ import annotations

import pytest

from trio_sandbox import HostConfig, SandboxConfig, constants
from trio_sandbox.fleet._placement import Claim, Demand, Placement, demand_of, most_of


def placement(
    *nodes: tuple[str, int], policy: str = "spread", slots: int = 100, largest: Demand | None = None
) -> Placement:
    made = Placement(policy, largest)  # type: ignore[arg-type]
    for name, memory in nodes:
        made.add(name, Demand(memory, 8, slots))
    return made


def ask(placement: Placement, memory: int = 1, **more: object) -> Claim:
    claim = Claim(Demand(memory, 1), **more)  # type: ignore[arg-type]
    placement.submit(claim)
    placement.settle()
    return claim


def test_a_sandbox_takes_its_memory_and_that_of_qemu() -> None:
    demand = demand_of(SandboxConfig(memory_mib=512, vcpus=2))
    assert demand == Demand(512 + constants.VM_OVERHEAD_MIB, 2, 1)


def test_with_overcommit_it_counts_with_a_part_and_a_node_has_to_have_the_whole() -> None:
    config = SandboxConfig(memory_mib=256, vcpus=2)
    assert demand_of(config, 4) == Demand(90, 2, 1)
    assert demand_of(config).memory_mib == 360
    fleet = placement(("a", 359), ("b", 360))
    assert [ask(fleet, 90, whole_mib=360).node for _ in range(5)] == ["b", "b", "b", "b", None]
    assert "takes 361 MiB" in str(ask(fleet, 90, whole_mib=361).error)
    small = placement(("a", 359), largest=most_of(HostConfig(memory_budget_mib=360)))
    assert ask(small, 90, whole_mib=360).error is None
    assert "`HostConfig.memory_budget_mib` is 360 MiB" in str(ask(small, 90, whole_mib=361).error)


@pytest.mark.parametrize(("policy", "nodes"), [("spread", ["b", "a", "b"]), ("pack", ["a", "a", "b"])])
def test_where_sandboxes_go(policy: str, nodes: list[str]) -> None:
    fleet = placement(("a", 20), ("b", 25), policy=policy)
    assert [ask(fleet, 10).node for _ in nodes] == nodes


def test_who_packs_prefers_a_node_that_has_the_template() -> None:
    fleet = placement(("a", 20), ("b", 30), policy="pack")
    fleet.close("a")
    assert ask(fleet, 5, template="x").node == "b"
    fleet.add("a", Demand(20, 8, 100))
    assert [ask(fleet, 5, template=key).node for key in "xxy"] == ["b", "b", "b"], "b has the least left by now"
    assert [ask(fleet, 5, template=key).node for key in "xxy"] == ["b", "b", "a"]


def test_who_spreads_prefers_it_among_equals() -> None:
    fleet = placement(("a", 10), ("b", 10))
    for key in "xy":
        ask(fleet, 5, template=key)
    assert [ask(fleet, 5, template=key).node for key in "yx"] == ["b", "a"]


def test_first_come_first_served() -> None:
    fleet = placement(("a", 10), ("b", 10))
    held = [ask(fleet, 8), ask(fleet, 8)]
    large, small = ask(fleet, 10), ask(fleet, 2)
    assert (large.node, small.node) == (None, None), "a small one does not overtake"
    fleet.withdraw(held[1])
    assert fleet.settle() == [large, small]
    assert (large.node, small.node) == ("b", "a")


def test_who_waits_holds_up_others_only_where_it_could_go() -> None:
    fleet = placement(("a", 10), ("b", 20))
    held = [ask(fleet, 20), ask(fleet, 5)]
    assert [claim.node for claim in held] == ["b", "a"]
    large, saved = ask(fleet, 15), ask(fleet, 8, refuse=frozenset("b"))
    small = [ask(fleet, 5), ask(fleet, 1, refuse=frozenset("a"))]
    assert [claim.node for claim in (large, saved, *small)] == [None] * 4, "b is kept for the first, and a for the next"
    fleet.withdraw(saved)
    assert fleet.settle() == [small[0]]
    assert small[0].node == "a", "where the first could never go"
    fleet.withdraw(held[0])
    assert fleet.settle() == [large, small[1]]
    assert (large.node, small[1].node) == ("b", "b")


def test_who_gives_up_waiting_lets_others_on() -> None:
    fleet = placement(("a", 10))
    ask(fleet, 8)
    large, small = ask(fleet, 10), ask(fleet, 2)
    fleet.withdraw(large)
    assert fleet.settle() == [small]
    fleet.withdraw(large)
    assert fleet.waiting == ()


@pytest.mark.parametrize("what", ["memory", "vcpus", "slots"])
def test_what_never_fits(what: str) -> None:
    fleet = placement(("a", 10), ("b", 20), slots=3)
    demand = {"memory": Demand(21, 1), "vcpus": Demand(1, 9), "slots": Demand(1, 1, 4)}[what]
    claim = Claim(demand)
    fleet.submit(claim)
    assert fleet.settle() == [claim]
    assert claim.error is not None
    assert "b has 20 MiB, 8 vCPUs and room for 3 sandboxes" in str(claim.error)
    assert fleet.waiting == ()


def test_what_never_fits_does_not_wait_for_its_turn() -> None:
    fleet = placement(("a", 10))
    ask(fleet, 10)
    first, impossible = ask(fleet, 5), ask(fleet, 11)
    assert first.node is None
    assert impossible.error is not None
    assert fleet.waiting == (first,)


def test_slots_run_out_before_memory_does() -> None:
    fleet = placement(("a", 100), slots=2)
    claims = [ask(fleet) for _ in range(3)]
    assert [claim.node for claim in claims] == ["a", "a", None]


def test_a_node_that_is_drained_gets_nothing_more() -> None:
    fleet = placement(("a", 10), ("b", 8))
    fleet.close("a")
    held = ask(fleet, 8)
    assert held.node == "b"
    waiting, impossible = ask(fleet, 8), ask(fleet, 9)
    assert waiting.node is None
    assert impossible.error is not None
    fleet.close("b")
    assert fleet.settle() == [waiting]
    assert "no node is there" in str(waiting.error)


def test_a_node_that_is_lost_gives_its_share_to_nobody() -> None:
    fleet = placement(("a", 10))
    held = ask(fleet, 10)
    waiting = ask(fleet, 10)
    fleet.add("b", Demand(10, 8, 1))
    assert fleet.settle() == [waiting]
    assert waiting.node == "b"
    fleet.remove("a")
    fleet.withdraw(held)
    later = ask(fleet, 10)
    assert (later.node, later.error) == (None, None)
    fleet.withdraw(waiting)
    assert fleet.settle() == [later]


def test_copies_count_where_they_are() -> None:
    fleet = placement(("a", 10), ("b", 9))
    fleet.take("a", Demand(2, 1) * 3)
    assert ask(fleet, 4).node == "b"
    fleet.give_back("a", Demand(2, 1) * 3)
    assert ask(fleet, 10).node == "a"


def test_some_nodes_are_better_and_some_will_not_do() -> None:
    fleet = placement(("a", 20), ("b", 99), ("c", 500))
    asked = [ask(fleet, 10, prefer=frozenset("a"), refuse=frozenset("c")).node for _ in range(3)]
    assert asked == ["a", "a", "b"], "who has no room is not waited for"
    lost = ask(fleet, 1, prefer=frozenset("c"), refuse=frozenset("abc"))
    assert "no node is there that has what was saved" in str(lost.error)


@pytest.mark.parametrize("policy", ["spread", "pack"])
def test_a_node_that_fails_is_the_last_choice_until_it_does_not(policy: str) -> None:
    fleet = placement(("a", 10), ("b", 10), policy=policy)
    failed = ask(fleet, 5)
    assert failed.node == "a"
    fleet.judge("a", failing=True)
    fleet.withdraw(failed)
    assert [ask(fleet, 5).node for _ in range(3)] == ["b", "b", "a"]
    fleet.add("c", Demand(9, 8, 100))
    assert ask(fleet, 1).node == "c"
    fleet.judge("a", failing=False)
    assert ask(fleet, 1).node == ("c" if policy == "spread" else "a"), "the one has 8 left, the other 5"
    fleet.judge("nowhere", failing=True)


# --- More nodes may come ---


def test_what_fits_on_no_node_waits_for_a_larger_one_and_holds_nobody_up() -> None:
    fleet = placement(("a", 10), largest=most_of(HostConfig()))
    large = ask(fleet, 11)
    assert (large.node, large.error, fleet.has_place_for(large)) == (None, None, False)
    assert ask(fleet, 10).node == "a"
    waits = ask(fleet, 10)
    assert fleet.wants() == (large.demand, waits.demand)
    fleet.add("b", Demand(20, 8, 100))
    assert fleet.settle() == [large]
    assert (large.node, waits.node) == ("b", None)


def test_the_first_node_is_waited_for() -> None:
    fleet = placement(largest=most_of(HostConfig()))
    waits = ask(fleet, 10)
    fleet.add("a", Demand(10, 8, 1))
    assert fleet.settle() == [waits]
    fleet.close("a")
    assert ask(fleet, 10).error is None


def test_what_the_configuration_forbids_fits_on_no_node_that_may_come() -> None:
    fleet = placement(("a", 10), largest=most_of(HostConfig(memory_budget_mib=1500, vcpu_budget=4)))
    assert ask(fleet, 1500).error is None
    assert "`HostConfig.memory_budget_mib` is 1500 MiB. Nothing" in str(ask(fleet, 1501).error)
    claim = Claim(Demand(1501, 5))
    fleet.submit(claim)
    assert claim in fleet.settle()
    assert "is 1500 MiB and `HostConfig.vcpu_budget` is 4 vCPUs" in str(claim.error)


def test_what_was_saved_can_be_brought_to_a_node_that_comes_as_long_as_one_has_it() -> None:
    fleet = placement(("a", 10), largest=most_of(HostConfig()))
    waits = ask(fleet, 11, prefer=frozenset("a"))
    assert (waits.error, fleet.wants()) == (None, (waits.demand,))
    fleet.remove("a")
    assert fleet.settle() == [waits]
    assert "no node is there that has what was saved" in str(waits.error)
