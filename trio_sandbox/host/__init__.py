"""What a user holds: hosts, sandboxes, runs and processes."""

from __future__ import annotations

from ._admission import AdmissionStatistics as AdmissionStatistics
from ._file import GuestFile as GuestFile, GuestTextFile as GuestTextFile
from ._host import Host as Host, HostStatistics as HostStatistics, open_host as open_host, open_sandbox as open_sandbox
from ._lifecycle import Checkpoint as Checkpoint
from ._named import NamedTemplate as NamedTemplate, NamedTemplateStore as NamedTemplateStore
from ._path import GuestPath as GuestPath
from ._process import GuestInput as GuestInput, GuestOutput as GuestOutput, GuestProcess as GuestProcess
from ._run import OutputChunk as OutputChunk, RunEvents as RunEvents, RunResult as RunResult
from ._sandbox import Sandbox as Sandbox, SandboxStatistics as SandboxStatistics
from ._slot import Slot as Slot
from ._templates import Template as Template, TemplateStore as TemplateStore
from ._terminal import GuestTerminal as GuestTerminal, Terminal as Terminal
from ._transfer import TransferStatistics as TransferStatistics
from ._warm import WarmStatistics as WarmStatistics
from ._watch import FileChange as FileChange, FileChanges as FileChanges
