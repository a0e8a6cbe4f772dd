"""Ray's placement groups, as far as a fleet asks for them."""

from __future__ import annotations

import attrs


@attrs.frozen
class Group:
    """A placement group: the MiB that it has beside a slot, and the nodes that it may not be on."""

    memory_mib: int
    others: str = ""


@attrs.define(eq=False)
class Groups:
    """Those that there are: `ray.util`, and `ray` as well."""

    there: list[Group] = attrs.field(factory=list[Group])
    calls: int = 0
    fails: bool = False

    @property
    def util(self) -> Groups:
        return self

    def placement_group(
        self, bundles: list[dict[str, int]], bundle_label_selector: list[dict[str, str]] | None = None
    ) -> Group:
        (bundle,) = bundles
        assert bundle.pop("trio_sandbox") == 1
        memory_mib, rest = divmod(bundle.pop("memory"), 2**20)
        assert (rest, bundle) == (0, {})
        group = Group(memory_mib, bundle_label_selector[0]["ray.io/node-id"] if bundle_label_selector else "")
        self.calls += 1
        self.there.append(group)
        return group

    def remove_placement_group(self, group: Group) -> None:
        self.calls += 1
        if self.fails:
            raise OSError("no head")
        self.there.remove(group)
