"""QEMU and its helpers: processes, QMP, storage daemon, overlays, machines, accelerators."""

from __future__ import annotations

from ._process import (
    BoundedTail as BoundedTail,
    InheritedFds as InheritedFds,
    OwnedProcess as OwnedProcess,
    describe_exit as describe_exit,
    minimal_environment as minimal_environment,
    require_program as require_program,
    run_owned as run_owned,
)
from ._runtime import Runtime as Runtime, open_runtime as open_runtime
from ._qmp import QMPChannel as QMPChannel
from ._qmp import QMPStatistics as QMPStatistics
from ._qmp import open_qmp as open_qmp
from ._qmp_codec import QMPEvent as QMPEvent
from ._qmp_codec import QMPGreeting as QMPGreeting
