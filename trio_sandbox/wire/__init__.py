"""The guest channel: framed, multiplexed streams between the host and the agent in a guest.

Used on both sides, so it imports the standard library and Trio only.
"""

from ._channel import Channel as Channel
from ._channel import ChannelStatistics as ChannelStatistics
from ._channel import StreamHandler as StreamHandler
from ._channel import open_channel as open_channel
from ._connection import Role as Role
from ._errors import ChannelError as ChannelError
from ._errors import PeerGoneError as PeerGoneError
from ._errors import PeerSilentError as PeerSilentError
from ._errors import StreamLimitError as StreamLimitError
from ._errors import StreamResetError as StreamResetError
from ._errors import WireError as WireError
from ._framing import PROTOCOL_VERSION as PROTOCOL_VERSION
from ._records import JSON as JSON
from ._records import STDERR as STDERR
from ._records import STDOUT as STDOUT
from ._records import RecordDecoder as RecordDecoder
from ._records import RecordStream as RecordStream
from ._records import encode_record as encode_record
from ._stream import ChannelStream as ChannelStream
