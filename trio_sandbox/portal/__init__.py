"""What the doors for programs without Trio have in common: a Trio loop in a thread of its own."""

from __future__ import annotations

from ._door import Door as Door, plain as plain, plain_all as plain_all
from ._portal import Portal as Portal
from ._work import (
    Block as Block,
    Call as Call,
    Delivery as Delivery,
    Work as Work,
    enter_now as enter_now,
    start_service as start_service,
)
