"""What a node and its user say to each other: values in, bytes out, and back. No I/O.

A message is four bytes of length, big-endian, and a pickle. Only values of ours, of a few plain kinds and exceptions can be in it: an
unpickler that is asked for anything else refuses. Nothing of a guest's is ever a message: what a guest says stays bytes in a stream.
"""

from __future__ import annotations

import importlib
import io
import pickle
import struct
import sys
from typing import Any, Final, cast

import attrs

from .._config import Progress, SandboxConfig
from .._errors import LinkProtocolError, SandboxError, arguments_of, remake_error
from .._image import AnyImage
from ..host import HostStatistics
from ..image import Cargo
from ..machines import AdmissionStatistics, SavedCargo
from ..qemu import Accelerator
from ..sandbox import Usage

_LENGTH: Final = struct.Struct(">I")
#: Bytes before a message, which say how long it is.
HEAD_BYTES: Final = _LENGTH.size
#: Bytes that one message may have: a configuration with a long warm-up, or 64 KiB of a console, fits many times.
MAX_MESSAGE: Final = 8 * 2**20
#: Exceptions behind an exception that travel with it, one being the cause of the other.
_MOST_CAUSES: Final = 8
#: What may be in a message besides the frozen classes of this library and exceptions.
_PLAIN: Final = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "Path"),  # what Python 3.13 calls them
    ("pathlib._local", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "timezone"),
    ("datetime", "timedelta"),
    ("trio_sandbox._secrets", "Secrets"),  # of each rule of a network, and empty: others can't be pickled
}


# --- Where to ask ---


@attrs.frozen
class NodeAddress:
    """Where a node listens, and how to be sure that it is that node. It travels by whatever has started the node."""

    name: str
    """What to call it, in messages to people."""
    host: str
    port: int
    fingerprint: bytes
    """SHA-256 of its certificate."""
    secret: bytes = attrs.field(repr=False)
    """What its user has to say, once."""


# --- What is asked ---


@attrs.frozen
class Open:
    """Open a sandbox, and keep it until the stream that this came on ends."""

    image: AnyImage
    config: SandboxConfig | None
    template: str | None


@attrs.frozen
class Fork:
    """Open copies of a sandbox, and keep them until the stream that this came on ends."""

    sandbox: int
    count: int


@attrs.frozen
class Prepare:
    """See to it that an image is there."""

    image: AnyImage


@attrs.frozen
class Lend:
    """Let another node have an image that is there, until the stream that this came on ends."""

    image: AnyImage


@attrs.frozen
class LendSaved:
    """Let another node have a saved sandbox, until the stream that this came on ends."""

    name: str
    marker: bytes
    """Its own: there may be another of that name by now."""


@attrs.frozen
class Fetch:
    """Have an image that another node has lent."""

    image: AnyImage
    source: NodeAddress
    lent: Lent


@attrs.frozen
class FetchSaved:
    """Have a saved sandbox that another node has lent, and what it stands on."""

    source: NodeAddress
    lent: Lent


@attrs.frozen
class Piece:
    """Send a file that was lent, from there on: said from node to node."""

    entry: int
    """The number of what it belongs to; see `entries_of`."""
    name: str
    offset: int = 0


@attrs.frozen
class Deliver:
    """Keep the tree that comes, its records as bytes and b"" at its end, until the stream that this came on ends."""


@attrs.frozen
class Call:
    """Ask about what is on the node's disk, and answer with what comes of it; see `Stock`."""

    operation: str
    arguments: tuple[Any, ...] = ()


@attrs.frozen
class Ask:
    """Call a method of one sandbox's keeper, and answer with what it returns."""

    sandbox: int
    operation: str
    arguments: tuple[Any, ...] = ()


# --- What is answered ---


@attrs.frozen
class Offer:
    """A machine that is there to be connected to."""

    machine: int
    """Its number on that node."""
    secret: bytes = attrs.field(repr=False)
    """What who connects has to say, once."""
    accelerator: Accelerator
    pid: int


@attrs.frozen
class Opened:
    """A sandbox is open."""

    sandbox: int
    """Its number on that node."""
    image: AnyImage
    config: SandboxConfig
    language: str
    command: tuple[str, ...]
    """What the image runs unless it is told otherwise."""
    offer: Offer
    status: Status
    """What it is like at first."""


@attrs.frozen
class OpenedTogether:
    """All sandboxes that were asked for are open."""

    sandboxes: tuple[Opened, ...]


@attrs.frozen
class Ended:
    """A machine has ended by itself."""

    machine: int
    failure: Exception


@attrs.frozen(kw_only=True)
class Status:
    """What a sandbox is like now; said when it has changed, once a second at most."""

    sandbox: int
    usage: Usage | None
    clock_error: float | None
    last_pause: float | None
    console: str | None
    """The end of its console; None: as said before."""
    qmp_log: str | None
    """The end of the conversation with its QEMU; None: as said before."""


@attrs.frozen
class Delivered:
    """A tree is there."""

    path: str
    """Where, on the node."""


@attrs.frozen
class Lent:
    """An image, or a saved sandbox, can be fetched."""

    cargo: Cargo | SavedCargo
    """What it consists of."""
    secrets: tuple[bytes, ...] = attrs.field(repr=False)
    """What who connects has to say, each once."""


@attrs.frozen
class Answered:
    """What was asked for is done."""

    value: Any = None


@attrs.frozen
class Failure:
    """What was asked for failed."""

    error: Exception


@attrs.frozen
class Unresolved:
    """A name has no addresses: what `socket.gaierror` says."""

    number: int
    why: str


@attrs.frozen
class NodeStatus:
    """What a node is like now; said once a second, if it has changed."""

    statistics: HostStatistics
    draining: bool
    progress: tuple[Progress, ...] = ()
    """The newest of what its long work has said since then."""


def is_sound(status: NodeStatus) -> bool:
    """Tell whether what a node says of itself can be reckoned with: classes are checked when it comes, and their fields are not."""
    match status:
        case NodeStatus(
            HostStatistics(admission=AdmissionStatistics(memory_mib_budget=int(), vcpu_budget=int())),
            bool(),
            tuple(progress),
        ):
            return all(map(_is_progress, progress))
        case _:
            return False


def _is_progress(value: object) -> bool:
    match value:
        case Progress(stage=str(), message=str(), fraction=None | int() | float()):
            return True
        case _:
            return False


# --- Bytes ---


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, BaseException):
            return _rebuild, _describe(obj)
        # Somebody's own kinds of them, an enumeration's members for instance: the other side does not know those.
        if isinstance(obj, str):
            return _same, (str.__str__(obj),)
        if isinstance(obj, int):
            return _same, (int.__int__(obj),)
        if isinstance(obj, float):
            return _same, (float.__float__(obj),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, name: str, /) -> Any:
        if module_name == __name__ and name in (_rebuild.__name__, _same.__name__):
            return globals()[name]
        if "." not in name:
            if (module_name, name) in _PLAIN:
                return getattr(importlib.import_module(module_name), name)
            # Nothing is imported because a message says so: what our messages have in them, both sides have imported.
            root, module = module_name.partition(".")[0], sys.modules.get(module_name)
            if root in ("trio_sandbox", "trio", "builtins") and module is not None:
                found: object = getattr(module, name, None)
                if isinstance(found, type):
                    kind = cast("type[object]", found)
                    if issubclass(kind, Exception) or (root == "trio_sandbox" and _is_value(kind)):
                        return kind
        raise LinkProtocolError(f"a message has a {module_name}.{name} in it, which is none of ours")


def _same(value: object) -> object:
    """Return *value*: what stands for a subclass of text or of a number."""
    return value


def _is_value(kind: type[object]) -> bool:
    """Tell whether it is a frozen class of ours: to make one does nothing else. A host, say, is none."""
    ours = kind.__module__.partition(".")[0] == "trio_sandbox"
    return ours and attrs.has(kind) and kind.__setattr__ is NodeAddress.__setattr__


def encode(message: object) -> bytes:
    """Return the bytes of a message.

    Raises:
      ValueError: if it is too large.

    """
    buffer = io.BytesIO()
    buffer.write(_LENGTH.pack(0))
    _Pickler(buffer, protocol=5).dump(message)
    length = buffer.tell() - _LENGTH.size
    if length > MAX_MESSAGE:
        raise ValueError(f"a message to another node is {length} bytes long, and may have {MAX_MESSAGE}")
    buffer.seek(0)
    buffer.write(_LENGTH.pack(length))
    return buffer.getvalue()


class Decoder:
    """Makes messages of the bytes of a stream, however they are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes, and return the messages that are whole now.

        Raises:
          LinkProtocolError: if they are no messages.

        """
        self._buffer += data
        messages: list[Any] = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + length_of(self._buffer[: _LENGTH.size])
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            messages.append(_decode(body))
        return messages


def length_of(head: bytes | bytearray) -> int:
    """Return the length of the message behind the first `HEAD_BYTES` of one.

    Raises:
      LinkProtocolError: if it is too long.

    """
    length: int
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE:
        raise LinkProtocolError(f"a message of {length} bytes, and {MAX_MESSAGE} are allowed")
    return length


def decode_all(data: bytes) -> list[Any]:
    """Return the messages that bytes are, all of them whole. Errors are those of `Decoder.feed`."""
    return Decoder().feed(data)


def _decode(body: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(body)).load()
    except LinkProtocolError:
        raise
    except Exception as exc:
        raise LinkProtocolError(f"a message that can't be read: {exc!r:.200}") from exc


def _describe(error: BaseException, depth: int = 0) -> tuple[object, ...]:
    """Return what `_rebuild` takes: an exception of ours or of Python's as it is, any other as what it says."""
    kind, args, state = type(error), arguments_of(error), dict(getattr(error, "__dict__", {}))
    root = kind.__module__.partition(".")[0]
    known = root == "trio_sandbox" or (root in ("builtins", "trio") and isinstance(error, Exception))
    if not known or not _travels((args, state)):
        kind, args, state = SandboxError, (f"{kind.__name__}: {error}",), {}
    notes = state.pop("__notes__", [])
    cause = error.__cause__ if depth < _MOST_CAUSES else None
    return kind, args, state, list(notes), None if cause is None else _Described(_describe(cause, depth + 1))


@attrs.frozen
class _Described:
    parts: tuple[Any, ...]


def _travels(value: object) -> bool:
    try:
        _decode(encode(value)[_LENGTH.size :])
    except Exception:  # noqa: BLE001 - whatever an exception of somebody else's holds
        return False
    return True


def _rebuild(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any], notes: list[str], cause: _Described | None
) -> BaseException:
    """Make an exception of what `_describe` said."""
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LinkProtocolError(f"{kind!r:.100} is no exception")
    error = remake_error(kind, args)
    error.__dict__.update(state)
    for note in notes:
        error.add_note(note)
    if cause is not None:
        error.__cause__ = _rebuild(*cause.parts)
    return error
