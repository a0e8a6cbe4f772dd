"""Everything that takes apart what a guest says, what QEMU says, or what a disk holds: the errors that it may raise, and examples.

Each is a function of bytes. What it raises besides its own errors is a fault, and so is what takes long or much memory. They are
tried with Hypothesis in `fake/test_parsers.py`, and by the million in the part `fuzz` of the soak.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

import attrs
import trio
import trio.lowlevel

from tests._oci import archive, directory, member
from trio_sandbox import GuestProtocolError, Network, QMPProtocolError, TemplateUnusableError
from trio_sandbox._quote import quote_guest, quote_lines, quote_tail
from trio_sandbox._stored_json import parse_json
from trio_sandbox.cli import _arguments
from trio_sandbox.client import Machine
from trio_sandbox.client._functions import BadCallError, CallDecoder, parse_arguments
from trio_sandbox.client._json import has_more_values
from trio_sandbox.client._messages import parse_message
from trio_sandbox.guest.agent.network import dns, packets
from trio_sandbox.guest.trees import TreeReader
from trio_sandbox.image._archive import archive_parts, read_archive
from trio_sandbox.image._manifest import Manifest, StoredFile
from trio_sandbox.image.oci._ext4 import UNIT, write_file_system
from trio_sandbox.image.oci._manifest import parse_container_image
from trio_sandbox.image.oci._merge import MergeError, Merger
from trio_sandbox.image.oci._tar import TarError, read_entries
from trio_sandbox.image.oci._tree import TreeError
from trio_sandbox.machines import _templates
from trio_sandbox.machines._named import NamedTemplateStore
from trio_sandbox.network import Gateway, HostResolver
from trio_sandbox.network._client_hello import ClientHello, NotNamedError
from trio_sandbox.network._http import HttpProxy, RequestRefusedError
from trio_sandbox.network._proxy import Proxy, _parse_status
from trio_sandbox.qemu._accelerator import _read_cache
from trio_sandbox.qemu._console import describe_end, excerpt
from trio_sandbox.qemu._qcow2 import Qcow2FormatError, check_strangers_header, parse_qcow2_header
from trio_sandbox.qemu._qmp_codec import QMPConnection, encode_command
from trio_sandbox.sandbox._changes import ChangesWriter, take_states
from trio_sandbox.sandbox._file import GuestFile
from trio_sandbox.sandbox._files import FileSession, parse_environment, parse_error, parse_path
from trio_sandbox.sandbox._path import GuestPath
from trio_sandbox.sandbox._plan import Entry
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.sandbox._status import parse_stat
from trio_sandbox.sandbox._transfer import _Target
from trio_sandbox.sandbox._walk import Walk
from trio_sandbox.sandbox._watch import FileChanges
from trio_sandbox.wire import ChannelStream, RecordStream, Role, WireError, encode_record
from trio_sandbox.wire._connection import Connection
from trio_sandbox.wire._framing import Kind, decode_json, frame
from trio_sandbox.wire._records import RecordDecoder


@attrs.frozen
class Parser:
    """One of them."""

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    """What it may raise, all of it documented."""
    examples: tuple[bytes, ...]
    """What it takes."""


HELLO = frame(Kind.HELLO, 0, b'{"version":1}')


# --- The channel ---


def _frames(role: Role, data: bytes) -> int:
    connection = Connection(role, {})
    own = connection.open_stream({})
    connection.ping(bytes(8))
    connection.next_write()
    for event in connection.receive(HELLO + data):
        if event is not None:
            connection.next_write()
    return own


def _records(data: bytes) -> list[object]:
    decoder = RecordDecoder(1 << 16)
    found: list[object] = []
    for start in range(0, len(data), 7):
        decoder.feed(data[start : start + 7])
        while (record := decoder.next_record()) is not None:
            found.append(record)
    return found


# --- Answers about files ---


class _Said:
    """A stream on which the guest has said something, and says nothing more."""

    has_news = False

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data[:1000], self._data[1000:]
        return data

    async def send_all(self, data: bytes, *, end: bool = False) -> None:
        await trio.lowlevel.checkpoint()

    def reset(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Retired:
    """What `guest_failures` needs of a machine."""

    failure = None

    def retire(self, reason: str) -> None:
        pass


def _session(data: bytes) -> FileSession:
    session = FileSession.__new__(FileSession)
    session.machine = cast("Machine", _Retired())
    session._records = RecordStream(cast("ChannelStream", _Said(data)))
    session._what = "a file"
    session.failed = False
    return session


def _run(function: Callable[[bytes], Awaitable[object]]) -> Callable[[bytes], object]:
    async def main(data: bytes) -> object:
        return await function(data)

    return lambda data: trio.run(main, data)


async def _list(data: bytes) -> object:
    return await Walk(_session(data)).entries(PurePosixPath("/x"))


async def _glob(data: bytes) -> object:
    return await Walk(_session(data)).glob(PurePosixPath("/x"), ["**", "*a?[b-c]*"])


async def _changes(data: bytes) -> None:
    changes = FileChanges(_session(data), GuestPath(cast("Slot", None), None, PurePosixPath("/x")))
    await changes.start()
    with contextlib.suppress(trio.EndOfChannel):
        while True:
            await changes.receive()


async def _file(data: bytes) -> object:
    file = GuestFile("x", "r+b", _session(data), 100)
    return await file.seek(3), await file.read(5), await file.readline(), await file.truncate(1)


def _download(data: bytes) -> object:
    with tempfile.TemporaryDirectory(prefix="trio-sandbox-test-") as directory:
        target = _Target(f"{directory}/new", 1 << 20, None)
        try:
            return target.take(data)
        finally:
            target.close()
            assert list(Path(directory).iterdir()) == []


def _pull(data: bytes) -> object:
    with tempfile.TemporaryDirectory(prefix="trio-sandbox-test-") as directory:
        base = {"known": Entry("file", "0", size=10), "sub": Entry("directory"), "sub/known": Entry("file", "0")}
        make = partial(ChangesWriter, tree=base, known={"known", "sub/known"})
        target = _Target(f"{directory}/new", 1 << 20, None, make)
        try:
            return target.take(data)
        finally:
            target.close()
            assert list(Path(directory).iterdir()) == []


def _changed_tree() -> bytes:
    records = [
        (b"d", b"700\0"),
        (b"s", b"known"),
        (b"f", b"600\0new\0content"),
        (b"t", b"1.2.3.4"),
        (b"d", b"700\0sub"),
    ]
    records += [(b"l", b"link\0known"), (b"s", b"known"), (b"u", b""), (b"u", b""), (b".", b""), (b"R", b"")]
    return b"".join(encode_record(*each) for each in records)


def _states(data: bytes) -> object:
    states: dict[str, bytes] = {}
    take_states(data, states, {"a": Entry("file"), "b/c": Entry("file"), "d": Entry("directory")})
    return states


def _tree() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory, "tree")
        (top / "sub").mkdir(parents=True)
        (top / "file").write_bytes(b"content")
        (top / "link").symlink_to("file")
        return b"".join(TreeReader(str(top)).batches()) + encode_record(b"R", b"")


# --- The network ---


def _request_for_network(data: bytes) -> object:
    header = decode_json(data, "header")
    gateway = Gateway(Network.allow("a.org"), HostResolver(), connect_timeout=1)
    serving = gateway.handle(cast("ChannelStream", None), header)
    cast("Any", serving).close()
    return header


def _hello(data: bytes) -> str | None:
    reader = ClientHello()
    for start in range(0, len(data), 50):
        name = reader.feed(data[start : start + 50])
        if name is not None:
            return name
    return None


class _Peer(trio.abc.Stream):
    """Says what it says, and then waits, or ends."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.heard = bytearray()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data[:max_bytes], self._data[max_bytes:] if max_bytes else b""
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.heard += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


_VALUE = b"VALUE-0123456789"


class _Server(_Peer):
    """A server, which answers when it was asked."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self.heard:
            await trio.lowlevel.checkpoint()
        return await super().receive_some(max_bytes)


async def _http(data: bytes) -> None:
    """The guest's requests, and behind a line of its own what the server answers."""
    asked, _, answered = data.partition(b"\n====\n")
    guest = _Peer(asked)
    proxy = HttpProxy(
        guest,
        _Server(answered),
        authorities=frozenset([b"a.org"]),
        values={b"trio-sandbox-0123456789abcdef0123": _VALUE},
        count=lambda sent, received: None,
    )
    try:
        with trio.move_on_after(0.05):  # requests that wait for an answer
            await proxy.run()
    finally:
        assert _VALUE not in guest.heard or _VALUE in asked


def _dns(data: bytes) -> object:
    query = dns.parse(data)
    if query is None:
        return None
    answer = dns.answer(query, dns.NXDOMAIN, why="because")
    assert answer[:2] == data[:2]
    return dns.parse_reverse_name(query.name), answer


def _syn(data: bytes) -> object:
    syn = packets.parse_syn(data)
    return None if syn is None else (packets.admit(syn), packets.refuse(syn, 111), packets.refuse(syn, 113))


# --- QEMU ---


def _qmp(data: bytes) -> object:
    connection = QMPConnection(line_limit=1 << 16)
    connection.receive(_GREETING)
    for command in ("a", "b"):
        connection.send(command, encode_command(command))
    return [connection.receive(data[start : start + 40]) for start in range(0, len(data), 40)]


_GREETING = b'{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}\r\n'


def _console(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    told = describe_end(1, text, text)
    assert told.isprintable()
    assert len(told) < 5000
    assert quote_guest(text).isprintable()
    assert quote_tail(text).isprintable()
    return excerpt(text), quote_lines(text)


# --- The disk ---


def _image_manifest(data: bytes) -> object:
    manifest = Manifest.from_value(parse_json(data))
    assert Manifest.from_value(parse_json(manifest.to_json().encode())) == manifest
    return manifest


@contextlib.contextmanager
def _directory() -> Generator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="trio-sandbox-test-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


_KEY = "0123456789abcdef01234567"


def _template(data: bytes) -> object:
    with _directory() as directory:
        (directory / _KEY).mkdir(mode=0o700)
        for name in ("memory", "devices", "overlay.qcow2"):
            (directory / _KEY / name).touch()
        (directory / _KEY / "template.json").write_bytes(data)
        return _templates._read(directory / _KEY)


def _saved(data: bytes) -> object:
    with _directory() as directory:
        (directory / "saved/mine~0123456789abcdef").mkdir(parents=True)
        for name in ("memory", "devices", "layer0.qcow2"):
            (directory / "saved/mine~0123456789abcdef" / name).touch()
        (directory / "saved/mine.json").write_bytes(data)
        store = NamedTemplateStore(directory)
        store.prune()
        assert store.names() == ["mine"]
        return store.find("mine")


def _verdict(data: bytes) -> object:
    with _directory() as directory:
        (directory / "accelerator.json").write_bytes(data)
        return _read_cache(directory, "k")


def _arguments_of_command_line(data: bytes) -> object:
    text = data.decode("utf-8", "surrogateescape").replace("\0", "")
    done: list[object] = []
    for function in (
        _arguments.memory_mib,
        _arguments.network_rule,
        _arguments.seconds,
        _arguments.counts,
        _arguments.measures,
        _arguments.variable,
        _arguments.upload,
        _arguments.download,
        _arguments.guest_directory,
        Proxy.parse,
    ):
        with contextlib.suppress(argparse.ArgumentTypeError, ValueError):
            done.append(function(text))
    return done


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_FINISHED = {"exit_code": 0, "value": "1", "restarted": False, "state_kept": True, "expired": False, "oom": False}


def count_values(value: Any) -> int:
    """Return how many commas and brackets it has as JSON, at the least."""
    if type(value) not in (dict, list, tuple):
        return 0
    members: list[Any] = list(cast("Any", value).values() if type(value) is dict else value)
    return max(len(members), 1) + sum(map(count_values, members))


def _calls(data: bytes) -> None:
    for call in CallDecoder().feed(data):
        count = count_values(parse_arguments(call.arguments))
        assert has_more_values(call.arguments, count - 1), "what takes long to read is known before"


_CALL = b'7 search [["x"],{"limit":[1,null,true,2.5]}]\n'
_MANIFEST = Manifest(name="tiny", digest="ab", created=12.5, files={}, details={"virtual_size": 1}).to_json().encode()
_FILE = {"size": 3, "sha256": "cd"}
_TEMPLATE = {
    "format": 1,
    "key": _KEY,
    "image": "python",
    "memory_mib": 192,
    "vcpus": 1,
    "warmup": "",
    "marker": "00ff",
    "created": 1.5,
    "files": {"memory": [0, 1], "devices": [0, 1], "overlay.qcow2": [0, 1]},
}
_SAVED = {
    **_TEMPLATE,
    "name": "mine",
    "directory": "mine~0123456789abcdef",
    "image_digest": "ab",
    "machine": "m",
    "qemu": "QEMU 7.2",
    "with_memory": True,
    "balloon": False,
    "mounted": False,
    "layer_count": 1,
}
_STATUS = b"\0".join(b"%d" % number for number in (33188, 1, 1, 1, 0, 0, 1, 0, 4096, 8, 1, 1, 1))
_QUERY = b"\x12\x34\x01\0\0\1\0\0\0\0\0\1\4pypi\3org\0\0\1\0\1\0\0\x29\4\xd0\0\0\0\0\0\0"
_SYN = bytes.fromhex(
    "450000280001000040060000cb007101c6336401 30390050000000010000000050022000 00000000".replace(" ", "")
)
_QCOW2_START = bytes.fromhex("514649fb 00000003 00000000000001c0 0000000a 00000010 0000000000100000".replace(" ", ""))
_QCOW2_FORMAT = (104).to_bytes(4, "big") + bytes.fromhex("e2792aca00000005") + b"qcow2\0\0\0"
_QCOW2 = (_QCOW2_START.ljust(100, b"\0") + _QCOW2_FORMAT).ljust(0x1C0, b"\0") + b"/base.img\0"
_REQUEST = b"POST /x HTTP/1.1\r\nHost: a.org\r\nAuthorization: trio-sandbox-0123456789abcdef0123\r\nContent-Length: 2\r\n\r\nhi"
_CHUNKED = b"GET / HTTP/1.1\r\nHost: a.org\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\nthe VALUE-0123456789 is"
_FILE_ERRORS = (GuestProtocolError, WireError, OSError)
_NAMES = encode_record(b"D", b"da\0fb\0lc") + encode_record(b"R", b"")


def _make_hello() -> bytes:
    import ssl

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="pypi.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


#: The header of a disk that stands on nothing.
STRANGERS_DISK = (
    struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, 2**30, 0, 0, 0, 2**16, 1, 0, 0)
    + struct.pack(">QQQII", 0, 0, 0, 4, 104)
    + _QCOW2_FORMAT[4:]
).ljust(1000, b"\0")


def make_archive(**changes: object) -> bytes:
    """Make an archive of an image and a layer; *changes* are to the manifest of the layer, or details of it."""
    disk = STRANGERS_DISK
    files = {"image.qcow2": StoredFile(size=len(disk), sha256=hashlib.sha256(disk).hexdigest())}
    base = Manifest(name="python", digest="1" * 64, created=1.5, files=files, details={"virtual_size": 2**30})
    lock = f"pylock-{'a' * 32}"
    details: dict[str, object] = {
        "virtual_size": 2**30,
        "below": {"name": "python", "content": files["image.qcow2"].sha256},
        "step": "packages idna",
        "packages": {"idna": "3.10"},
        "pylock": lock,
    }
    layer = Manifest(name="python+" + "2" * 12, digest="2" * 64, created=1.5, files=files, details=details)
    for name, value in changes.items():
        if name in details:
            details[name] = value
        else:
            layer = attrs.evolve(layer, **{name: value})  # type: ignore[arg-type]
    parts = archive_parts([base, layer], {lock: "a lock"})
    return b"".join(part if isinstance(part, bytes) else disk for part in parts)


def _layer(data: bytes) -> None:
    """Merge a layer with itself, and write a file system of it; the checksums of its headers are corrected."""
    corrected = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            corrected[start + 148 : start + 156] = b" " * 8
            corrected[start + 148 : start + 156] = b"%06o\0 " % sum(corrected[start : start + 512])
    source = bytes(corrected)
    merger = Merger()
    for _ in range(2):
        merger.add_layer(read_entries(source))
    with open(os.memfd_create("disk"), "wb") as disk:
        write_file_system(
            disk.fileno(), UNIT, merger.tree.root, [source] * 2, uuid=bytes(16), check_cancelled=lambda: None
        )


def _layers() -> Iterator[bytes]:
    headers = {
        "SCHILY.xattr.user.a": "b",
        "mtime": "1.5",
        "GNU.sparse.size": "100",
        "GNU.sparse.map": "10,2,50,2",
    }
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield archive(
            directory("a"),
            member("a/" + "x" * 120, "1234", pax_headers=headers if style == tarfile.PAX_FORMAT else {}),
            member("a/.wh.c"),
            member("l", "a", kind="symlink"),
            member("l/b", kind="character", devmajor=1, devminor=3),
            member("c", "a/" + "x" * 120, kind="link"),
            style=style,
        )


_CONTAINER_CONFIGURATION = json.dumps(
    {
        "os": "linux",
        "architecture": "amd64",
        "config": {"Env": ["A=b"], "User": "a", "WorkingDir": "/", "Cmd": ["a"], "Labels": {"a": "b"}},
        "rootfs": {"diff_ids": ["sha256:" + "0" * 64]},
    }
).encode()


def _manifest_of(configuration: bytes) -> bytes:
    digest = f"sha256:{hashlib.sha256(configuration).hexdigest()}"
    layer = {"digest": "sha256:" + "0" * 64, "size": 5}
    return json.dumps(
        {"schemaVersion": 2, "config": {"digest": digest, "size": len(configuration)}, "layers": [layer]}
    ).encode()


_CONTAINER_MANIFEST = _manifest_of(_CONTAINER_CONFIGURATION)


def _container_manifest(data: bytes) -> None:
    parse_container_image(data, lambda _: _CONTAINER_CONFIGURATION)


def _container_configuration(data: bytes) -> None:
    parse_container_image(_manifest_of(data), lambda _: data)


PARSERS: dict[str, Parser] = {
    "frames at the host": Parser(
        lambda data: _frames(Role.HOST, data),
        (WireError,),
        (
            frame(Kind.DATA, 1, b"hello") + frame(Kind.CREDIT, 1, b"\0\0\1\0") + frame(Kind.END, 1),
            frame(Kind.OPEN, 2, b'{"service":"lookup"}') + frame(Kind.RESET, 2, b"no") + frame(Kind.PONG, 0, bytes(8)),
        ),
    ),
    "frames at the guest": Parser(
        lambda data: _frames(Role.GUEST, data),
        (WireError,),
        (frame(Kind.OPEN, 1, b'{"service":"code"}') + frame(Kind.DATA, 1, b"x") + frame(Kind.PING, 0, bytes(8)),),
    ),
    "a header": Parser(lambda data: decode_json(data, "it"), (WireError,), (b'{"version":1,"a":[1.5,null]}',)),
    "records": Parser(_records, (WireError,), (encode_record(b"O", b"hello") + encode_record(b"J", b"{}"),)),
    "a message": Parser(
        parse_message,
        (GuestProtocolError,),
        (
            _json({"finished": _FINISHED}),
            _json({"display": {"mime": "image/png", "size": 10, "item": 0}}),
            _json({"failed": {"errno": 2, "strerror": "no", "filename": "/x"}}),
            _json({"started": 7}),
            _json({"exited": {"status": -9, "expired": True, "used": [1000, 2000, 8]}}),
            _json({"exited": {"status": -9, "oom": True}}),
            _json({"mounted": 1}),
        ),
    ),
    "calls of functions": Parser(_calls, (BadCallError,), (_CALL,)),
    "a status": Parser(parse_stat, (GuestProtocolError,), (_STATUS,)),
    "an error": Parser(lambda data: str(parse_error(data, "x")), (GuestProtocolError,), (b"2\0/x", b"18\0/x\0/y")),
    "a path": Parser(lambda data: str(parse_path(data)), (GuestProtocolError,), (b"/home/user", b"../x")),
    "an environment": Parser(parse_environment, (GuestProtocolError,), (b"A=b\0PATH=/bin", b"")),
    "a listing": Parser(_run(_list), _FILE_ERRORS, (_NAMES,)),
    "a search": Parser(_run(_glob), _FILE_ERRORS, (_NAMES * 2 + encode_record(b"R", b"") * 2,)),
    "changes": Parser(
        _run(_changes),
        _FILE_ERRORS,
        (encode_record(b"R", b"") + encode_record(b"W", b"256\0name") * 2 + encode_record(b"W", b"32768"),),
    ),
    "an open file": Parser(
        _run(_file),
        _FILE_ERRORS,
        (b"".join(encode_record(b"R", data) for data in (b"3", b"hello", b"a\nb", b"4", b"1")),),
    ),
    "a download": Parser(_download, _FILE_ERRORS, (_tree(),)),
    "a pull": Parser(_pull, _FILE_ERRORS, (_changed_tree(), _tree())),
    "states of files": Parser(_states, (ValueError,), (b"a\x001.2.3.4\0b/c\x005",)),
    "a request for the network": Parser(
        _request_for_network,
        (WireError,),
        (b'{"service":"lookup","name":"a.org"}', b'{"service":"connect","host":"a.org","port":443}'),
    ),
    "a hello of TLS": Parser(_hello, (NotNamedError,), (_make_hello(),)),
    "HTTP": Parser(
        _run(_http),
        (RequestRefusedError, trio.BrokenResourceError),
        (_REQUEST + b"\n====\n" + _RESPONSE, _CHUNKED + b"\n====\n" + _RESPONSE),
    ),
    "a proxy's answer": Parser(_parse_status, (OSError,), (b"HTTP/1.1 200 OK\r\n\r\n",)),
    "a question of DNS": Parser(_dns, (), (_QUERY,)),
    "a packet": Parser(_syn, (), (_SYN,)),
    "QMP": Parser(
        _qmp,
        (QMPProtocolError,),
        (
            b'{"return":{},"id":0}\r\n{"error":{"class":"GenericError","desc":"no"},"id":1}\r\n',
            b'{"event":"STOP","data":{"a":1},"timestamp":{"seconds":1,"microseconds":2}}\r\n',
        ),
    ),
    "a console": Parser(_console, (), (b"[ 1.0] Kernel panic - not syncing\r\n\x1b[31mred",)),
    "qcow2": Parser(parse_qcow2_header, (Qcow2FormatError,), (_QCOW2,)),
    "a stranger's disk": Parser(
        lambda data: check_strangers_header(data, 2**20), (Qcow2FormatError,), (STRANGERS_DISK,)
    ),
    "an archive of images": Parser(lambda data: read_archive(io.BytesIO(data)), (ValueError,), (make_archive(),)),
    "a layer of a container image": Parser(_layer, (TarError, MergeError, TreeError), tuple(_layers())),
    "the manifest of a container image": Parser(_container_manifest, (ValueError,), (_CONTAINER_MANIFEST,)),
    "the configuration of a container image": Parser(
        _container_configuration, (ValueError,), (_CONTAINER_CONFIGURATION,)
    ),
    "an image's manifest": Parser(
        _image_manifest, (ValueError,), (_MANIFEST.replace(b'"files": {}', b'"files": ' + _json({"disk": _FILE})),)
    ),
    "a template's manifest": Parser(_template, (ValueError, OSError), (_json(_TEMPLATE),)),
    "a saved sandbox's manifest": Parser(_saved, (TemplateUnusableError,), (_json(_SAVED),)),
    "the accelerator's verdict": Parser(_verdict, (), (_json({"key": "k", "version": "7.2.22", "failure": None}),)),
    "the command line": Parser(
        _arguments_of_command_line, (), (b"2GiB", b"*.a.org:443", b"1,2", b"A=b", b"a:/b/c", b"http://u:p@proxy:3128")
    ),
}

#: What stands where another value belongs: nested deep, huge, no number, not of the type, no text, twice.
ODD_JSON = (
    "[" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "9" * 5000,
    "9" * 400,
    "-1",
    "1e999",
    "-1e999",
    "1.5",
    "1e300",
    "NaN",
    "Infinity",
    "true",
    "null",
    "[]",
    "{}",
    r'"\ud800"',
    r'"\u0000"',
    r'"\u001b[2J\u202e"',
    '"../../etc/passwd"',
    '"' + "x" * 70_000 + '"',
    "18446744073709551616",
    "0.1e-5000",
)


def odd_variants(example: bytes) -> Iterator[bytes]:
    """Put each of `ODD_JSON` in the place of each value in *example*; and give every field twice."""
    found = example.find(b"{")
    head = example[:found]
    try:
        value, end = json.JSONDecoder().raw_decode(example[found:].decode())
    except ValueError:
        return
    tail = example[found:].decode()[end:].encode()
    mark = "a place for something odd"

    def places(value: object) -> Iterator[object]:
        yield mark
        if isinstance(value, dict):
            fields = cast("dict[str, object]", value)
            for name in fields:
                for changed in places(fields[name]):
                    yield {**fields, name: changed}
        elif isinstance(value, list):
            items = cast("list[object]", value)
            for number, item in enumerate(items):
                for changed in places(item):
                    yield [*items[:number], changed, *items[number + 1 :]]

    for changed in places(value):
        text = json.dumps(changed)
        for odd in ODD_JSON:
            yield head + text.replace(json.dumps(mark), odd).encode() + tail
    twice = json.dumps(value)
    yield head + (twice[:-1] + "," + twice[1:]).encode() + tail
