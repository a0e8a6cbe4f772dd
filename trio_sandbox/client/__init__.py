"""One request to a guest's agent: what is said, how it fails, what bounds it; runs and processes."""

from __future__ import annotations

from .._metadata import mark_public
from ._ask import ask as ask
from ._failures import (
    Machine as Machine,
    check_open as check_open,
    guest_failures as guest_failures,
    open_stream as open_stream,
)
from ._file_session import (
    ERROR as ERROR,
    REPLY as REPLY,
    FileSession as FileSession,
    encode_request as encode_request,
    join_request as join_request,
    parse_error as parse_error,
)
from ._functions import Functions as Functions, HostFunctions as HostFunctions, check_functions as check_functions
from ._messages import (
    NO_INTERPRETER as NO_INTERPRETER,
    Failed as Failed,
    Mounted as Mounted,
    check_user as check_user,
    code_request as code_request,
    process_request as process_request,
)
from ._output import RunTrace as RunTrace
from ._process import (
    GuestInput as GuestInput,
    GuestOutput as GuestOutput,
    GuestProcess as GuestProcess,
    Stderr as Stderr,
    open_process as open_process,
    receive_message as receive_message,
)
from ._run import (
    OutputChunk as OutputChunk,
    RunEvents as RunEvents,
    collect as collect,
    open_run as open_run,
    takes_input as takes_input,
)
from ._run_process import run_process as run_process
from ._terminal import GuestTerminal as GuestTerminal, Terminal as Terminal

mark_public(__name__, globals())
del mark_public
