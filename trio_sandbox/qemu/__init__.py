"""QEMU and its helpers: processes, QMP, storage daemon, overlays, machines, accelerators."""

from __future__ import annotations

from .._metadata import fix_module_metadata
from ._accelerator import Accelerator as Accelerator, detect_accelerator as detect_accelerator
from ._balloon import BalloonClient as BalloonClient
from ._build import QemuBuild as QemuBuild
from ._confinement import Confinement as Confinement, prove_confinement as prove_confinement
from ._machine import MachineConfig as MachineConfig, machine_identity as machine_identity
from ._overlay_pool import (
    OverlayPool as OverlayPool,
    OverlayPoolStatistics as OverlayPoolStatistics,
    open_overlay_pool as open_overlay_pool,
)
from ._owned import (
    MARKER as MARKER,
    is_marked as is_marked,
    is_own_directory as is_own_directory,
    make_marked as make_marked,
    mark as mark,
    remove_marked as remove_marked,
    remove_tree as remove_tree,
)
from ._process import (
    BoundedTail as BoundedTail,
    InheritedFds as InheritedFds,
    OwnedProcess as OwnedProcess,
    describe_exit as describe_exit,
    minimal_environment as minimal_environment,
    require_program as require_program,
    run_owned as run_owned,
)
from ._qcow2 import (
    HEAD_BYTES as HEAD_BYTES,
    Qcow2FormatError as Qcow2FormatError,
    Qcow2Info as Qcow2Info,
    check_strangers_header as check_strangers_header,
    forget_backing_file as forget_backing_file,
    read_qcow2_info as read_qcow2_info,
)
from ._qmp import QMPChannel as QMPChannel, QMPStatistics as QMPStatistics, open_qmp as open_qmp
from ._qmp_codec import QMPEvent as QMPEvent, QMPGreeting as QMPGreeting
from ._ram import FROZEN_MODE as FROZEN_MODE, copy_data as copy_data
from ._runtime import Runtime as Runtime, open_runtime as open_runtime
from ._snapshot import (
    SavedState as SavedState,
    Snapshot as Snapshot,
    copy_memory as copy_memory,
    link_file as link_file,
)
from ._storage_daemon import QemuStorageDaemon as QemuStorageDaemon, open_storage_daemon as open_storage_daemon
from ._usage import allocated_bytes as allocated_bytes
from ._vm import Vm as Vm
from ._vm_manager import (
    VmManager as VmManager,
    VmManagerStatistics as VmManagerStatistics,
    open_vm_manager as open_vm_manager,
)

fix_module_metadata(__name__, globals())
del fix_module_metadata
