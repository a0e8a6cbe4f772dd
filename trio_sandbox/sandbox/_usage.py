"""What a sandbox takes of the host."""

from __future__ import annotations

from typing import final

import attrs


@final
@attrs.frozen(kw_only=True)
class Usage:
    """What a sandbox uses of its host, as the host counts it. Made by `Sandbox.usage`."""

    cpu_seconds: float
    """Processor time of its QEMU since it was opened, in seconds: the guest's, and what QEMU does for it. VMs that it had before it was reverted or slept count, too; a VM that died counts until its processor time was last read."""
    memory_bytes: int
    """Memory that its QEMU has for itself now, in bytes; 0 while it hibernates. What it shares with its template is not in it."""
    disk_bytes: int
    """What its disk takes on the host's disk now, in bytes: what the guest wrote since the sandbox was opened and has not
    removed, in units of 64 KiB. The saved memory of checkpoints and of a sandbox that hibernates is not in it."""
    network_bytes_sent: int
    """What the guest has sent to the outside since the sandbox was opened; see `Network`."""
    network_bytes_received: int
    """What it has received from there."""
