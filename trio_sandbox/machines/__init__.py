"""How a sandbox comes by its machine."""

from __future__ import annotations

from .._metadata import mark_public
from ._admission import Admission as Admission, AdmissionStatistics as AdmissionStatistics
from ._blame import RESTORE_FAILURES as RESTORE_FAILURES
from ._budget import charge_mib as charge_mib, memory_rooms as memory_rooms
from ._dependents import Dependents as Dependents
from ._fit import check_image as check_image, check_known as check_known, fit as fit
from ._fork import check_count as check_count, open_together as open_together
from ._guard import MemoryGuard as MemoryGuard
from ._images import Disks as Disks, HostImages as HostImages
from ._launcher import Launcher as Launcher
from ._layer_builder import LayerBuilder as LayerBuilder
from ._ledger import Ledger as Ledger, LedgerEntry as LedgerEntry, open_ledger as open_ledger
from ._leftovers import remove_leftovers as remove_leftovers
from ._machines import HeldMachine as HeldMachine, hold_machine as hold_machine
from ._memory import MemoryStatistics as MemoryStatistics, Room as Room, Stalls as Stalls
from ._named import (
    NamedTemplate as NamedTemplate,
    NamedTemplateStore as NamedTemplateStore,
    check_template_name as check_template_name,
)
from ._progress_log import ProgressLog as ProgressLog
from ._roster import (
    NoteMachine as NoteMachine,
    Roster as Roster,
    ignore_machine as ignore_machine,
    list_sandbox as list_sandbox,
    open_roster as open_roster,
)
from ._running import (
    RunningSandbox as RunningSandbox,
    kill_sandbox as kill_sandbox,
    running_sandboxes as running_sandboxes,
)
from ._saved import (
    SavedSandbox as SavedSandbox,
    remove_saved_sandbox as remove_saved_sandbox,
    saved_sandboxes as saved_sandboxes,
)
from ._saved_cargo import Images as Images, SavedCargo as SavedCargo, SavedExchange as SavedExchange
from ._statistics import HostStatistics as HostStatistics
from ._templates import (
    Template as Template,
    TemplateStore as TemplateStore,
    place_templates as place_templates,
    sync_files as sync_files,
)
from ._warm import WarmPool as WarmPool, WarmStatistics as WarmStatistics
from ._warm_vm import WarmVms as WarmVms

mark_public(__name__, globals())
del mark_public
