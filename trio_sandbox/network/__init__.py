"""The host's side of a guest's connections: what it may reach, and how it gets there."""

from __future__ import annotations

from .._metadata import mark_public
from ._addresses import Private as Private
from ._connections import (
    NetworkEvent as NetworkEvent,
    NetworkStatistics as NetworkStatistics,
    NetworkWatch as NetworkWatch,
)
from ._dialer import Dialer as Dialer, HostDialer as HostDialer
from ._gateway import Gateway as Gateway
from ._proxy import Proxy as Proxy, find_proxy as find_proxy
from ._relay import Relay as Relay
from ._resolver import HostResolver as HostResolver, Resolver as Resolver, look_up as look_up
from ._trust import Trust as Trust, read_trust as read_trust

mark_public(__name__, globals())
del mark_public
