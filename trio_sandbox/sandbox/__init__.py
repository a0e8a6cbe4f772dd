"""What a user holds."""

from __future__ import annotations

from .._metadata import mark_public
from ._checkpoints import Checkpoint as Checkpoint, Checkpoints as Checkpoints
from ._file import GuestFile as GuestFile
from ._install import Installer as Installer, LocalInstaller as LocalInstaller
from ._life import ImageFacts as ImageFacts, Life as Life
from ._lifecycle import Lifecycle as Lifecycle
from ._network import SandboxNetwork as SandboxNetwork
from ._observed import ObservedSandbox as ObservedSandbox
from ._open import BinaryMode as BinaryMode, TextMode as TextMode
from ._path import GuestPath as GuestPath
from ._requests import GuestRequests as GuestRequests
from ._sandbox import Sandbox as Sandbox, SandboxStatistics as SandboxStatistics
from ._slot import Slot as Slot
from ._text import GuestTextFile as GuestTextFile
from ._transaction import transaction as transaction
from ._transfer import TransferStatistics as TransferStatistics
from ._usage import Usage as Usage
from ._watch import ChangeKind as ChangeKind, FileChange as FileChange, FileChanges as FileChanges
from ._workspace import OnConflict as OnConflict

mark_public(__name__, globals())
del mark_public
