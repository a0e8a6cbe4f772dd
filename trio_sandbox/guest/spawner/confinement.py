"""Where users' processes live, and as whom they start."""

from __future__ import annotations


class Confinement:
    """What a spawner shuts its processes off from. The default, nothing, is for tests of the agent."""

    __slots__ = ("cgroup", "directory", "group", "root", "user")

    def __init__(
        self,
        *,
        root: str | None = None,
        cgroup: str | None = None,
        user: int | None = None,
        group: int | None = None,
        directory: str | None = None,
    ) -> None:
        self.root: str | None = root
        """Directory to be the root of a PID and mount namespace of their own; None: stay where we are."""
        self.cgroup: str | None = cgroup
        """Directory of a cgroup v2 in which each process gets a group; None: KILL reaches no further than its session."""
        self.user: int | None = user
        """Who runs what does not say who it runs as; None: processes keep our identity, and none can be named."""
        self.group: int | None = group
        """That user's group; None: the one in the database."""
        self.directory: str | None = directory
        """Where processes start that do not say where; None: in their user's home."""
