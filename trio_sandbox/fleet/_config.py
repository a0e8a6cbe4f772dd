"""How a fleet works: frozen values."""

from __future__ import annotations

from typing import Literal

import attrs

from .._checks import check_flag, check_seconds, one_of


@attrs.frozen(kw_only=True)
class FleetConfig:
    """How a fleet works; every field has a default that suits most."""

    placement: Literal["spread", "pack"] = attrs.field(default="spread", validator=one_of("spread", "pack"))
    """Where a sandbox is opened that fits on several nodes: "spread" takes the node with the most memory left, and of equal ones one that
    has opened the same image and configuration, so that it need not boot; "pack" takes such a node first, and then the one with the
    least memory left."""
    connections: Literal["program", "node"] = attrs.field(default="program", validator=one_of("program", "node"))
    """Where connections of guests (`SandboxConfig.network`) are made from: "program" resolves names and connects on the machine of this
    program; "node" has the sandbox's node do so, which then reaches what that machine reaches. Policies, secrets, limits and events stay
    with this program either way, and so all bytes go through it. With "node", a rule's `private` is about the node's networks, and
    `HostConfig.proxy` is what the node connects to; a function in `NetworkRule.to` is called here."""
    autoscaling: bool = attrs.field(default=False, validator=check_flag)
    """Whether Ray's autoscaler adds nodes, and larger ones than those that are there: a sandbox that fits on none of them then waits for one
    that it fits on, in place of a `CapacityError`. Only nodes with Ray's resource ``trio_sandbox`` are used, and there need be none at first.
    Put a deadline of your own around what waits: nobody can say whether such a node comes."""
    lease: float = attrs.field(default=4.0, validator=check_seconds)
    """Seconds that the network between two machines may be silent, before each side counts the other as lost: a node then ends the
    sandboxes that it has for this program, and this program says of them that the node is lost. The kernels of both machines ask
    each other, so a program that is busy is not lost. A program that ends, however, is noticed at once."""
    start_timeout: float = attrs.field(default=60.0, validator=check_seconds)
    """Seconds for a node to open its host and be connected to."""
    end_timeout: float = attrs.field(default=30.0, validator=check_seconds)
    """Seconds for a node to end a sandbox whose block is left. After that the block is left all the same, and the node continues to end it."""
