"""What a user holds: hosts, sandboxes, runs and processes."""

from __future__ import annotations

from ._file import GuestFile as GuestFile, GuestTextFile as GuestTextFile
from ._admission import AdmissionStatistics as AdmissionStatistics
from ._host import Host as Host, HostStatistics as HostStatistics, open_host as open_host, open_sandbox as open_sandbox
from ._process import GuestInput as GuestInput, GuestOutput as GuestOutput, GuestProcess as GuestProcess
from ._run import OutputChunk as OutputChunk, RunEvents as RunEvents, RunResult as RunResult
from ._sandbox import Sandbox as Sandbox, SandboxStatistics as SandboxStatistics
