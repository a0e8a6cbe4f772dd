"""Numbers about a host."""

from __future__ import annotations

from typing import final

import attrs

from ._admission import AdmissionStatistics
from ._warm import WarmStatistics


@final
@attrs.frozen
class HostStatistics:
    """Numbers about one host."""

    sandboxes_open: int
    """Sandboxes that are open now."""
    sandboxes_opened: int
    """Sandboxes opened since the host was opened."""
    admission: AdmissionStatistics
    """Memory and virtual CPUs: what is taken, what there is, and who waits."""
    warm: WarmStatistics
    """VMs of `HostConfig.warm`, which are kept ready."""
