"""Sandboxes for programs that use asyncio: the same objects, whose methods tasks of asyncio await.

    async with open_sandbox("python") as sandbox:
        result = await sandbox.run("print(6 * 7)")

Trio runs in a thread of its own meanwhile. Cancelling a task stops what the guest does for it, and waits until it has stopped.
"""

from __future__ import annotations

from .._metadata import fix_module_metadata
from ._files import GuestFile as GuestFile, GuestTextFile as GuestTextFile
from ._host import Host as Host, open_host as open_host, open_sandbox as open_sandbox
from ._paths import FileChange as FileChange, FileChanges as FileChanges, GuestPath as GuestPath
from ._processes import (
    GuestConnection as GuestConnection,
    GuestInput as GuestInput,
    GuestOutput as GuestOutput,
    GuestProcess as GuestProcess,
    GuestTerminal as GuestTerminal,
    RunEvents as RunEvents,
)
from ._sandbox import Checkpoint as Checkpoint, NetworkWatch as NetworkWatch, Sandbox as Sandbox
from ._sessions import Session as Session, Sessions as Sessions, open_sessions as open_sessions

fix_module_metadata(__name__, globals())
del fix_module_metadata
