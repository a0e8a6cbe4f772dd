"""The guest channel: framed, multiplexed streams between the host and the agent in a guest.

Used on both sides, so it imports the standard library and Trio only.
"""

from __future__ import annotations

from ._answers import receive_all as receive_all, receive_up_to as receive_up_to
from ._channel import (
    Channel as Channel,
    ChannelStatistics as ChannelStatistics,
    StreamHandler as StreamHandler,
    open_channel as open_channel,
)
from ._connection import PIECE_SIZE as PIECE_SIZE
from ._errors import (
    ChannelError as ChannelError,
    PeerGoneError as PeerGoneError,
    PeerSilentError as PeerSilentError,
    StreamLimitError as StreamLimitError,
    StreamResetError as StreamResetError,
    WireError as WireError,
)
from ._framing import (
    MAX_STREAMS as MAX_STREAMS,
    PROTOCOL_VERSION as PROTOCOL_VERSION,
    Role as Role,
    encode_json as encode_json,
)
from ._port import DirectStream as DirectStream, PortStream as PortStream
from ._records import (
    DEFAULT_RECORD_LIMIT as DEFAULT_RECORD_LIMIT,
    DISPLAY as DISPLAY,
    JSON as JSON,
    MIME_TYPE as MIME_TYPE,
    STDERR as STDERR,
    STDOUT as STDOUT,
    RecordDecoder as RecordDecoder,
    RecordStream as RecordStream,
    encode_record as encode_record,
)
from ._stream import ChannelStream as ChannelStream
