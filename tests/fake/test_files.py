"""Files of a guest through `GuestPath`, against a real agent with real file helpers; and the same of this machine's as reference."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import trio

from tests._leaks import child_pids, wait_until
from trio_sandbox import (
    FileChange,
    GuestFile,
    GuestPath,
    GuestTextFile,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
)
from trio_sandbox.guest.helpers import file_helper
from trio_sandbox.guest.trees import record
from trio_sandbox.sandbox._files import encode_request, open_session
from trio_sandbox.sandbox._watch import ChangeKind

from ._guest import FakeMachine
from ._sandbox import comes_late, open_local_sandbox


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


@pytest.fixture
def here(sandbox: Sandbox, tmp_path: Path) -> GuestPath:
    return sandbox.path(str(tmp_path))


def helpers() -> list[int]:
    """Give the processes of file helpers: forks of the spawner, which is the only child of ours."""
    (spawner,) = child_pids()
    return [int(pid) for pid in Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()]


# --- Paths by themselves ---


async def test_paths_compute_like_pure_paths(sandbox: Sandbox) -> None:
    path = sandbox.path("/home", "user") / "a.tar.gz"
    assert str(path) == "/home/user/a.tar.gz"
    assert (path.name, path.stem, path.suffix, path.suffixes) == ("a.tar.gz", "a.tar", ".gz", [".tar", ".gz"])
    assert path.parts == ("/", "home", "user", "a.tar.gz")
    assert path.parent == sandbox.path("/home/user")
    assert path.parents == tuple(map(sandbox.path, ["/home/user", "/home", "/"]))
    assert path.with_name("b") == path.parent / "b" == path.parent.joinpath("b")
    assert path.with_stem("b") == sandbox.path("/home/user/b.gz")
    assert path.with_suffix(".xz") == sandbox.path("/home/user/a.tar.xz")
    assert path.relative_to("/home") == sandbox.path("user/a.tar.gz")
    assert path.is_relative_to(path.parent)
    assert path.is_absolute()
    assert not path.relative_to("/home").is_absolute()
    assert path.match("*.gz")
    assert path.pure == PurePosixPath("/home/user/a.tar.gz")
    assert sorted([path, path.parent]) == [path.parent, path]
    assert len({path, sandbox.path(path), sandbox.path(path, user="root")}) == 2
    assert path != "/home/user/a.tar.gz"
    assert repr(sandbox.path("a", user="root")) == "<trio_sandbox.GuestPath 'a', user='root'>"


async def test_a_path_in_the_guest_is_none_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        os.fspath(sandbox.path(str(tmp_path)))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(TypeError, match="must be str, PurePosixPath or GuestPath, not int"):
        sandbox.path(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]


async def test_the_user_goes_with_a_path(sandbox: Sandbox) -> None:
    path = sandbox.path("/etc", user="root") / "passwd"
    assert path.user == path.parent.user == path.with_name("x").user == "root"
    with pytest.raises(PermissionError) as caught:  # this agent can't be anybody else
        await path.stat()
    assert caught.value.filename == "root"


@pytest.mark.parametrize("call", ["stat", "unlink", "read_bytes", "iterdir", "upload", "download"])
async def test_what_can_be_no_path_is_refused_here(sandbox: Sandbox, tmp_path: Path, call: str) -> None:
    with pytest.raises(ValueError, match="NUL"):
        if call == "upload":
            await sandbox.upload(tmp_path, "a\0b")
        elif call == "download":
            await sandbox.download("a\0b", tmp_path / "new")
        else:
            await getattr(sandbox.path("a\0b"), call)()
    assert os.listdir(tmp_path) == []
    assert helpers() == []


# --- The same as on the host ---

Operation = Callable[[trio.Path | GuestPath], Awaitable[object]]

OPERATIONS: dict[str, Operation] = {
    "stat": lambda path: path.stat(),
    "lstat": lambda path: path.lstat(),
    "exists": lambda path: path.exists(),
    "is_file": lambda path: path.is_file(),
    "is_dir": lambda path: path.is_dir(),
    "is_symlink": lambda path: path.is_symlink(),
    "iterdir": lambda path: path.iterdir(),
    "readlink": lambda path: path.readlink(),
    "resolve": lambda path: path.resolve(),
    "resolve strict": lambda path: path.resolve(strict=True),
    "mkdir": lambda path: path.mkdir(),
    "mkdir mode": lambda path: path.mkdir(0o750),
    "mkdir parents": lambda path: path.mkdir(parents=True),
    "mkdir exist_ok": lambda path: path.mkdir(exist_ok=True),
    "mkdir both": lambda path: path.mkdir(parents=True, exist_ok=True),
    "rmdir": lambda path: path.rmdir(),
    "unlink": lambda path: path.unlink(),
    "unlink missing_ok": lambda path: path.unlink(missing_ok=True),
    "touch": lambda path: path.touch(),
    "touch exist_ok": lambda path: path.touch(0o600, exist_ok=False),
    "chmod": lambda path: path.chmod(0o740),  # an ordinary user can still look into a directory
    "rename": lambda path: path.rename(str(path) + ".renamed"),
    "rename over": lambda path: path.rename(str(path.parent / "empty")),
    "symlink_to": lambda path: path.symlink_to("anywhere"),
    "hardlink_to": lambda path: path.hardlink_to(str(path.parent / "file")),
    "read_bytes": lambda path: path.read_bytes(),
    "read_text": lambda path: path.read_text(encoding="utf-8"),
    "write_bytes": lambda path: path.write_bytes(b"new"),
    "write_text": lambda path: path.write_text("nëw\n", encoding="utf-8"),
    "write_text newline": lambda path: path.write_text("a\nb\n", encoding="latin-1", newline="\r\n"),
    "glob": lambda path: path.glob("*"),
    "glob deep": lambda path: path.glob("**/*.txt"),
    "glob dir": lambda path: path.glob("s*/[a-b].txt"),
    "glob all": lambda path: path.rglob("*"),
}

PATHS = [
    "file",
    "directory",
    "empty",
    "link",
    "dangling",
    "loop",
    "nothing",
    "file/below",
    "nothing/below",
    "directory/new",
]


def make_files(root: Path) -> None:
    (root / "directory" / "sub").mkdir(parents=True)
    (root / "directory" / "sub" / "a.txt").write_text("one\r\ntwo\n")
    (root / "directory" / ".hidden.txt").write_text("")
    (root / "directory" / "b\xffé\n.txt").write_text("")
    (root / "directory" / "away").symlink_to("..")
    (root / "empty").mkdir()
    (root / "file").write_bytes("a\r\nb\rc\nd é\n".encode())
    (root / "file").chmod(0o604)
    (root / "link").symlink_to("file")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")


def plain(value: object, root: str) -> object:
    """Give a result without what differs between two directories."""
    if isinstance(value, os.stat_result):
        # A directory's size, inode and times are its own.
        return value.st_mode, value.st_nlink, value.st_uid, value.st_gid, value.st_mtime_ns > 0
    if isinstance(value, (trio.Path, GuestPath)):
        return str(value).replace(root, "ROOT")
    if value is None or isinstance(value, (str, bytes, bool, int)):
        return value
    return sorted(plain(item, root) for item in value)  # type: ignore[type-var, attr-defined]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType, reportUnknownVariableType, reportUnknownArgumentType]


def snapshot(root: Path) -> object:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = oct(mode), content
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_everything_is_as_on_the_host(sandbox: Sandbox, tmp_path: Path, operation: str) -> None:
    for name in PATHS:
        outcomes: list[object] = []
        for kind in ("host", "guest"):
            root = tmp_path / kind / name.replace("/", "_")
            root.mkdir(parents=True)
            make_files(root)
            path = trio.Path(root / name) if kind == "host" else sandbox.path(str(root), name)
            try:
                result = plain(await OPERATIONS[operation](path), str(root))
            except OSError as exc:
                names = [
                    None if n is None else str(n).replace(str(root), "ROOT") for n in (exc.filename, exc.filename2)
                ]
                result = type(exc), exc.errno, exc.strerror, names
            except RuntimeError as exc:  # pathlib's for loops, before 3.13
                result = str(exc)
                if operation.startswith("resolve"):
                    result = None
            outcomes.append((result, snapshot(root)))
        if operation.startswith("resolve") and name == "loop":
            continue  # Pythons differ
        assert outcomes[0] == outcomes[1], name


# --- Content ---


async def test_large_content_travels(here: GuestPath, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    assert await (here / "file").write_bytes(memoryview(data)) == len(data)
    assert (tmp_path / "file").read_bytes() == data
    assert await (here / "file").read_bytes() == data


async def test_what_the_kernel_gives_no_size_of_is_read(sandbox: Sandbox) -> None:
    assert "MemTotal" in await sandbox.path("/proc/meminfo").read_text()


async def test_content_without_end_is_not_read_to_its_end(
    here: GuestPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long").write_bytes(bytes(1_000_001))
    monkeypatch.setattr("trio_sandbox.sandbox._path.MAXIMUM_READ_BYTES", 1_000_000)
    with pytest.raises(OSError, match="longer than 1000000 bytes") as caught:
        await (here / "long").read_bytes()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(here / "long"))
    (tmp_path / "long").write_bytes(bytes(1_000_000))
    assert await (here / "long").read_bytes() == bytes(1_000_000)


async def test_writing_replaces_as_a_whole(here: GuestPath, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    reader = os.open(path, os.O_RDONLY)
    await (here / "link").write_text("new")
    assert os.read(reader, 10) == b"old"
    os.close(reader)
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a pipe"])
async def test_what_may_wait_for_ever_is_opened_or_refused(
    sandbox: Sandbox, here: GuestPath, tmp_path: Path, kind: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to("pipe")
    path = sandbox.path("/dev/null") if kind == "device" else here / kind
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    with listener:
        calls: list[Callable[[], Awaitable[object]]] = [
            path.read_bytes,
            path.read_text,
            lambda: path.write_bytes(b"x"),
            lambda: path.write_text("x"),
        ]
        for call in calls:
            with pytest.raises(OSError, match=r"may wait for ever; use GuestPath.open\(\)") as caught:
                await call()
            assert (caught.value.errno, caught.value.filename) == (errno.EOPNOTSUPP, str(path))
    assert sorted(os.listdir(tmp_path)) == ["link to a pipe", "pipe", "socket"]


async def test_a_pipe_that_is_opened_is_as_on_the_host(here: GuestPath, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    async def write() -> None:
        async with await (here / "pipe").open("wb") as file:
            await file.write(b"through the pipe")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        async with await (here / "pipe").open("rb") as file:
            assert await file.read() == b"through the pipe"


@pytest.mark.parametrize("upload", [False, True], ids=["write", "upload"])
@pytest.mark.parametrize("name", ["plain", "private", "shared", "special", "attributes", "locked", "read-only"])
async def test_a_file_stays_the_same_but_for_its_content(
    sandbox: Sandbox, here: GuestPath, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str, upload: bool
) -> None:
    """As it does when open(2) with O_TRUNC writes it: then, too, the kernel takes special bits from a file that its user writes."""
    source = tmp_path_factory.mktemp("host") / "source"
    source.write_text("new")
    source.chmod(0o666)
    path = tmp_path / name
    path.write_text("older, and longer")
    path.chmod({"private": 0o600, "special": 0o2755, "read-only": 0o444}.get(name, 0o640))
    if os.geteuid() == 0:
        os.chown(path, 1234, 5678)
        path.chmod({"private": 0o600, "special": 0o2755, "read-only": 0o444}.get(name, 0o640))
    if name == "shared":
        (tmp_path / "other").hardlink_to(path)
    if name == "attributes":
        try:
            os.setxattr(path, "user.mine", b"kept")
        except OSError:
            pytest.skip("no extended attributes here")
    if name == "locked":
        tmp_path.chmod(0o555)
    before = path.stat()
    try:
        if name == "read-only" and os.geteuid() != 0:
            with pytest.raises(PermissionError) as caught:
                await (sandbox.upload(source, here / name) if upload else (here / name).write_text("new"))
            assert caught.value.filename == str(path)
            return
        await (sandbox.upload(source, here / name) if upload else (here / name).write_text("new"))
    finally:
        tmp_path.chmod(0o755)
    after = path.stat()
    assert path.read_text() == "new"
    if name == "special" and os.geteuid() != 0:
        assert (before.st_mode, after.st_mode) == (0o102755, 0o100755)
    else:
        assert after.st_mode == before.st_mode
    for field in ("st_uid", "st_gid", "st_nlink"):
        assert getattr(after, field) == getattr(before, field), field
    if name == "shared":
        assert (tmp_path / "other").read_text() == "new"
    if name == "attributes":
        assert os.getxattr(path, "user.mine") == b"kept"
    assert sorted(os.listdir(tmp_path)) == sorted({name, *({"other"} if name == "shared" else ())})


async def test_a_file_of_many_names_is_written_when_all_is_there(here: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    async with open_session(here._slot, None, "a write") as session:
        await session.send(encode_request("put", here / "file") + record(b"D", b"half"))
        assert (tmp_path / "other").read_text() == "old"
        await session.take_back()
    assert (tmp_path / "file").read_text() == "old"
    await (here / "file").write_bytes(b"x" * 300_000)
    assert (tmp_path / "other").read_bytes() == b"x" * 300_000


async def test_kernel_files_are_written_as_they_are(here: GuestPath, sandbox: Sandbox) -> None:
    # In a directory where nobody can make a file: the helper's own name.
    await sandbox.path("/proc/self/comm").write_text("short")
    assert (await sandbox.path("/proc/self/comm").read_text()) == "short\n"


async def test_a_write_that_fails_or_is_cancelled_leaves_what_was_there(
    here: GuestPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    with trio.CancelScope() as scope:
        scope.cancel(reason="a test")
        await (here / "file").write_bytes(b"new")
    # In the middle: more than the channel takes at once, and a helper that does not read.
    assert await (here / "file").read_bytes() == b"old"
    stopped = helpers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with trio.move_on_after(0.1) as patience:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_and_continue, stopped)
            await (here / "file").write_bytes(b"x" * 5_000_000)
    assert patience.cancelled_caught
    await wait_until(lambda: os.listdir(tmp_path) == ["file"])
    assert await (here / "file").read_bytes() == b"old"


async def wait_and_continue(stopped: list[int]) -> None:
    try:
        await trio.sleep_forever()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


async def test_types_are_checked(here: GuestPath) -> None:
    with pytest.raises(TypeError, match="must be str"):
        await here.write_text(b"bytes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="`newline` must be"):
        await here.write_text("text", newline="x")
    with pytest.raises(TypeError):
        await here.write_bytes("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="must not be empty"):
        await here.glob("")
    with pytest.raises(NotImplementedError):
        await here.glob("/etc/*")


@pytest.mark.parametrize("operation", ["chmod", "mkdir", "touch"])
async def test_a_mode_is_checked_before_it_is_sent(here: GuestPath, operation: str) -> None:
    path = here if operation == "chmod" else here / "new"
    for wrong in ("600", 6.0, None):
        with pytest.raises(TypeError, match="integer"):
            await getattr(path, operation)(wrong)
    for wrong in (-1, 0o200000):
        with pytest.raises(ValueError, match="`mode` must be from 0 to 0o177777, not "):
            await getattr(path, operation)(wrong)
    assert helpers() == []


async def test_a_mode_may_be_one_that_stat_told(here: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o604)
    mode = (await (here / "file").stat()).st_mode
    await (here / "file").chmod(mode | stat.S_IXUSR)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o704


async def test_a_wrong_position_leaves_the_file_open(here: GuestPath) -> None:
    async with await (here / "file").open("xb+") as file:
        for call in (file.read, file.seek, file.truncate):
            with pytest.raises(TypeError, match="integer"):
                await call("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        for call in (file.seek, file.truncate):
            with pytest.raises(OverflowError, match="64 bits"):
                await call(2**63)
        assert await file.write(b"still open") == 10


async def open_to_read(path: GuestPath, mode: str) -> GuestFile | GuestTextFile:
    return await path.open("rb") if mode == "rb" else await path.open("r")


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_a_position_that_is_refused_changes_nothing(here: GuestPath, tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(pipe, b"one\ntwo\n")
    async with await open_to_read(here / "pipe", mode) as file:
        first = await file.readline()
        with pytest.raises(OSError, match="Illegal seek"):
            await file.seek(0)
        assert [first, await file.readline()] == (["one\n", "two\n"] if mode == "r" else [b"one\n", b"two\n"])
    os.close(pipe)


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_a_position_before_the_start_changes_nothing(here: GuestPath, tmp_path: Path, mode: str) -> None:
    (tmp_path / "file").write_text("one\ntwo\n")
    async with await open_to_read(here / "file", mode) as file:
        await file.readline()
        with pytest.raises(OSError, match="Invalid argument"):
            await (file.buffer if isinstance(file, GuestTextFile) else file).seek(-1)
        assert await file.read() in ("two\n", b"two\n")


async def test_a_path_in_another_sandbox_is_refused(sandbox: Sandbox, here: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    async with open_local_sandbox() as (other, _):
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: (here / "file").rename(other.path(str(tmp_path), "new")),
            lambda: (here / "new").hardlink_to(other.path(str(tmp_path), "file")),
            lambda: sandbox.upload(tmp_path / "file", other.path(str(tmp_path), "new")),
            lambda: sandbox.download(other.path(str(tmp_path), "file"), tmp_path / "new"),
            lambda: sandbox.watch(other.path(str(tmp_path))).__aenter__(),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="is a path in another sandbox; say "):
                await call()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("user", "error"), [(-1, ValueError), (2**32 - 1, ValueError), ("", ValueError), (1.5, TypeError)]
)
async def test_what_can_be_no_user_is_refused_here(
    sandbox: Sandbox, tmp_path: Path, user: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="`user` must be"):
        sandbox.path("/etc", user=user)
    with pytest.raises(error, match="`user` must be"):
        await sandbox.upload(tmp_path, "new", user=user)
    with pytest.raises(error, match="`user` must be"):
        await sandbox.run_process(["true"], user=user)


# --- Open files ---

FileSteps = Callable[[GuestFile], Awaitable[object]]


async def test_open_files_read_write_and_seek(here: GuestPath, tmp_path: Path) -> None:
    async with await (here / "file").open("xb+") as file:
        assert (file.name, file.mode, file.closed) == (str(here / "file"), "xb+", False)
        assert file.readable()
        assert file.writable()
        assert await file.write(b"one\ntwo\nthree") == 13
        assert (tmp_path / "file").read_bytes() == b"one\ntwo\nthree"
        assert await file.seek(0) == 0
        assert await file.readline() == b"one\n"
        assert await file.tell() == 4
        # What was read ahead is not skipped by what is written.
        assert await file.write(b"TWO") == 3
        assert await file.read(2) == b"\nt"
        assert await file.seek(-1, io.SEEK_CUR) == 8
        assert await file.read() == b"three"
        assert await file.read() == await file.readline() == b""
        assert await file.seek(-5, io.SEEK_END) == 8
        assert await file.truncate() == 8
        assert await file.truncate(10) == 10
        await file.flush()
    assert file.closed
    assert "closed" in repr(file)
    assert (tmp_path / "file").read_bytes() == b"one\nTWO\n\0\0"
    await file.aclose()
    with pytest.raises(ValueError, match="closed file"):
        await file.read()


async def test_open_files_keep_to_their_mode(here: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    async with await (here / "file").open("rb") as file:
        with pytest.raises(io.UnsupportedOperation, match="'rb': write"):
            await file.write(b"x")
    async with await (here / "file").open("ab") as file:
        assert not file.readable()
        with pytest.raises(io.UnsupportedOperation, match="'ab': read"):
            await file.read()
        await file.seek(0)
        await file.write(b"y")
    assert (tmp_path / "file").read_text() == "xy"
    for mode in ("", "rw", "b", "rbt", "r++", "q"):
        with pytest.raises(ValueError, match="`mode` must be"):
            await (here / "file").open(mode)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="`newline` must be"):
        await (here / "file").open("r", newline="x")
    for encoding in ("no-such-encoding", "base64"):
        with pytest.raises(LookupError, match="encoding"):
            await (here / "file").open("w", encoding=encoding)
    assert (tmp_path / "file").read_text() == "xy", "nothing was emptied"
    with pytest.raises(TypeError, match="`mode` must be str, not NoneType"):
        await (here / "file").open(None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(
    ("name", "mode", "error"),
    [
        ("nothing", "rb", FileNotFoundError),
        ("nothing/below", "w", FileNotFoundError),
        ("file", "xb", FileExistsError),
        ("directory", "r", IsADirectoryError),
        ("file/below", "r", NotADirectoryError),
    ],
)
async def test_files_that_can_not_be_opened(
    here: GuestPath, tmp_path: Path, name: str, mode: str, error: type[OSError]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    with pytest.raises(error) as caught:
        await (here / name).open(mode)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert caught.value.filename == str(here / name)
    with pytest.raises(OSError, match="No space left") as full:
        async with await GuestPath.open(here.parent.joinpath("/dev/full"), "wb") as file:
            await file.write(b"x")
    assert full.value.filename == "/dev/full"


@pytest.mark.parametrize("newline", [None, "", "\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
async def test_text_is_as_on_the_host(here: GuestPath, tmp_path: Path, newline: str | None, encoding: str) -> None:
    text = "é\r\n" * 30_000 + "one\rtwo\n\nlast \N{GRINNING FACE}"
    ours, theirs = tmp_path / "ours", here / "theirs"
    lines = write_and_read_lines(ours, text, encoding=encoding, newline=newline)
    async with await theirs.open("w", encoding=encoding, newline=newline) as file:
        assert await file.write(text) == len(text)
    assert (tmp_path / "theirs").read_bytes() == ours.read_bytes()
    async with await theirs.open("r", encoding=encoding, newline=newline) as file:
        assert isinstance(file, GuestTextFile)
        assert [line async for line in file] == lines
        assert await file.seek(0) == 0
        assert await file.read(5) + await file.read() == "".join(lines)
        assert await file.read(1) == ""


def write_and_read_lines(path: Path, text: str, *, encoding: str, newline: str | None) -> list[str]:
    """Do here what the test does in the guest."""
    with open(path, "w", encoding=encoding, newline=newline) as file:
        file.write(text)
    with open(path, encoding=encoding, newline=newline) as file:
        return list(file)


async def test_text_files_say_what_they_can_not_do(here: GuestPath) -> None:
    async with await (here / "file").open("w+") as file:
        await file.write("a\nb\n")
        with pytest.raises(io.UnsupportedOperation, match="to the start or to the end"):
            await file.seek(1)
        with pytest.raises(TypeError, match="takes str"):
            await file.write(b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
        await file.seek(0)
        assert await file.readline() == "a\n"
        with pytest.raises(io.UnsupportedOperation, match="needs a seek"):
            await file.write("x")
        assert await file.seek(0, io.SEEK_END) == 4
        await file.write("c")
        await file.truncate(5)
        await file.flush()
        assert file.name in repr(file)
    assert file.closed
    assert await (here / "file").read_text() == "a\nb\nc"


async def test_a_file_is_closed_when_a_request_is_cut_short(here: GuestPath, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    file = await (here / "pipe").open("rb")
    with trio.move_on_after(0.05):
        await file.read(1)
    # The answer may come yet, and must not be taken for another's.
    os.write(pipe, b"x")
    os.close(pipe)
    with pytest.raises(ValueError, match="closed file"):
        await file.read(1)


async def test_one_task_at_a_time(here: GuestPath, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    async with await (here / "pipe").open("rb") as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.read, 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await file.read(1)
        nursery.cancel_scope.cancel(reason="the test is over")
    os.close(pipe)


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_who_waits_for_a_file_that_another_task_closes_is_told_so(
    here: GuestPath, tmp_path: Path, mode: str
) -> None:
    """And not that the sandbox was closed, which is there."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    file = await open_to_read(here / "pipe", mode)

    async def read() -> None:
        with pytest.raises(ValueError, match="another task closed the file"):
            await file.read(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await file.aclose()
    os.close(pipe)


async def test_what_was_read_ahead_is_for_one_task_at_a_time(here: GuestPath, tmp_path: Path) -> None:
    """Or a second one, which comes while the first lets others run, would be told that the file is at its end."""
    (tmp_path / "file").write_bytes(b"one\ntwo\nthree\n")
    for read in ("readline", "read"):
        async with await (here / "file").open("rb") as file:
            await file.readline()
            found: list[bytes | type] = []

            async def take(file: GuestFile, read: str, found: list[bytes | type]) -> None:
                try:
                    found.append(await (file.readline() if read == "readline" else file.read(4)))
                except trio.BusyResourceError as exc:
                    found.append(type(exc))

            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(take, file, read, found)
            assert sorted(map(str, found)) == ["<class 'trio.BusyResourceError'>", "b'two\\n'"]
            assert await file.read() == b"three\n"


async def test_text_that_tasks_share_goes_to_one_of_them(here: GuestPath, tmp_path: Path) -> None:
    lines = [f"{number}\n" for number in range(20)]
    (tmp_path / "file").write_text("".join(lines))
    found: list[str] = []

    async def take(read: Callable[[], Awaitable[str]]) -> None:
        found.append(await read())

    async with await (here / "file").open("r") as file:
        assert await file.readline() == "0\n"
        async with trio.open_nursery() as nursery:
            for _ in range(9):
                nursery.start_soon(take, file.readline)
            nursery.start_soon(take, partial(file.read, 3))
        assert sorted("".join([*found, await file.read()])) == sorted("".join(lines[1:]))
        assert "" not in found


async def test_cancelled_reading_of_text_loses_nothing_or_closes_the_file(here: GuestPath, tmp_path: Path) -> None:
    """A long line comes in pieces, of which those that are there already wait for the last."""
    line = "x" * 300_000 + "\n"
    (tmp_path / "file").write_text(line)
    for read in ("readline", "read"):
        outcomes: set[str] = set()
        for step in range(1, 200):
            async with await (here / "file").open("r", limit=2**20) as file:
                with trio.CancelScope() as scope, _cancelled_at(scope, step):
                    assert await getattr(file, read)() == line
                if scope.cancelled_caught:
                    outcomes.add("closed" if file.closed else "open")
                    if not file.closed:
                        assert await file.read() == line
                else:
                    break
        assert "closed" in outcomes


class _Steps(trio.abc.Instrument):
    """Cancels a scope when a task is about to take its step of that number."""

    def __init__(self, scope: trio.CancelScope, left: int) -> None:
        self.scope, self.left, self.task = scope, left, trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel(reason="a test")


@contextmanager
def _cancelled_at(scope: trio.CancelScope, step: int) -> Generator[None]:
    steps = _Steps(scope, step)
    trio.lowlevel.add_instrument(steps)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(steps)


# --- Helpers ---


async def test_helpers_are_used_again(here: GuestPath) -> None:
    for _ in range(5):
        await here.stat()
        with pytest.raises(FileNotFoundError):
            await (here / "nothing").stat()
    assert len(helpers()) == 1


async def test_a_session_that_hangs_holds_up_nobody(here: GuestPath, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial((here / "pipe").open, "rb"))  # waits for somebody to write
        await wait_until(lambda: len(helpers()) == 1)
        for _ in range(3):
            assert await here.is_dir()
        assert len(helpers()) == 2
        nursery.cancel_scope.cancel(reason="enough")


async def test_many_at_once(here: GuestPath, tmp_path: Path) -> None:
    async def one(number: int) -> None:
        path = here / str(number)
        await path.write_text(str(number) * number)
        assert await path.read_text() == str(number) * number

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)
    assert len(os.listdir(tmp_path)) == 20
    await wait_until(lambda: len(helpers()) <= 4)


async def test_a_helper_that_is_killed_is_replaced(here: GuestPath, tmp_path: Path) -> None:
    assert await here.exists()
    (pid,) = helpers()
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: helpers() == [])
    assert await here.exists()
    # In the middle of a request nobody can know how far it came.
    os.mkfifo(tmp_path / "pipe")
    with pytest.RaisesGroup(pytest.RaisesExc(OutcomeUnknownError, match="open of .*pipe.* the file helper was killed")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_when_it_reads, tmp_path / "pipe")
            try:
                async with await (here / "pipe").open("rb") as file:
                    await file.read(1)
            finally:
                nursery.cancel_scope.cancel(reason="it is killed")
    assert await here.exists()


async def kill_when_it_reads(pipe: Path) -> None:
    writer = -1
    await wait_until(lambda: len(helpers()) == 1)
    while writer < 0:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody reads it yet
            await trio.sleep(0.005)
    try:
        os.kill(helpers()[0], signal.SIGKILL)
        await trio.sleep_forever()
    finally:
        os.close(writer)


async def test_requests_after_the_end_are_not_sent(tmp_path: Path) -> None:
    async with open_local_sandbox() as (sandbox, _):
        path = sandbox.path(str(tmp_path))
        file = await (path / "file").open("wb")
    with pytest.raises(SandboxClosedError, match=r"stat of .* was not sent"):
        await path.stat()
    with pytest.raises(SandboxClosedError, match="upload to 'x' was not sent"):
        await sandbox.upload(tmp_path, "x")
    with pytest.raises(OutcomeUnknownError, match="was closed during open"):
        await file.write(b"x")


async def test_a_machine_that_ends_meanwhile(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with open_local_sandbox() as (sandbox, machine):
        with pytest.RaisesGroup(pytest.RaisesExc(OutcomeUnknownError, match="ended during open")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(retire, machine)
                try:
                    await sandbox.path(str(tmp_path), "pipe").open("rb")
                finally:
                    nursery.cancel_scope.cancel(reason="it is over")


async def retire(machine: FakeMachine) -> None:
    await trio.testing.wait_all_tasks_blocked(0.05)
    machine.retire("a test")
    await trio.sleep_forever()


def test_nothing_that_a_helper_does_by_name_is_out_of_place() -> None:
    operations = file_helper._OPERATIONS
    assert {name.decode() for name in operations} == {
        *"stat list mkdir unlink rmdir chmod rename symlink link touch readlink resolve get put upload push download pull".split(),
        *"environment merge append".split(),
        *"open read seek truncate watch".split(),
    }


# --- Watching ---


async def test_changes_are_reported_in_order(sandbox: Sandbox, here: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    async with sandbox.watch(here) as changes:
        (tmp_path / "new").mkdir()
        append(tmp_path / "old", "x")
        (tmp_path / "old").chmod(0o600)
        (tmp_path / "old").rename(tmp_path / "young")
        (tmp_path / "young").unlink()
        expected: list[tuple[ChangeKind, str, bool]] = [
            ("created", "new", True),
            ("modified", "old", False),
            ("written", "old", False),
            ("attributes", "old", False),
            ("moved_from", "old", False),
            ("moved_to", "young", False),
            ("deleted", "young", False),
        ]
        for kind, name, is_dir in expected:
            assert await changes.receive() == FileChange(kind, here / name, is_dir)
        with trio.move_on_after(0.05) as patience:
            await changes.receive()
        assert patience.cancelled_caught
        (tmp_path / "later").mkdir()
        assert (await changes.receive()).path == here / "later"
        # What is watched goes away itself.
        for name in ("new", "later"):
            (tmp_path / name).rmdir()
        tmp_path.rmdir()
        assert [(change.kind, change.path) async for change in changes] == [
            ("deleted", here / "new"),
            ("deleted", here / "later"),
            ("deleted", here),
        ]
        tmp_path.mkdir()


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


async def test_changes_that_nobody_takes_are_lost_and_said_to_be(
    sandbox: Sandbox, here: GuestPath, tmp_path: Path
) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    async with sandbox.watch(here) as changes:
        (pid,) = helpers()
        os.kill(pid, signal.SIGSTOP)
        path = tmp_path / "again and again"
        for _ in range(limit // 2 + 1):
            path.symlink_to("x")
            path.unlink()
        os.kill(pid, signal.SIGCONT)
        count = 0
        while (change := await changes.receive()).kind != "overflow":
            count += 1
        assert (change.path, count) == (here, limit)


async def test_watching_what_is_not_there(sandbox: Sandbox, here: GuestPath) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        async with sandbox.watch(here / "nothing"):
            pass
    assert caught.value.filename == str(here / "nothing")
    async with sandbox.watch(str(here)) as changes:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await changes.receive()


async def test_the_body_of_watch_raises_what_it_raises(sandbox: Sandbox, here: GuestPath) -> None:
    with pytest.raises(trio.BrokenResourceError, match="my own"):
        async with sandbox.watch(here):
            raise trio.BrokenResourceError("my own")


async def test_what_was_cancelled_is_done_or_not_done_and_not_under_way(tmp_path: Path) -> None:
    """Or the next request, which another helper serves, would come first."""
    late: list[str] = []
    async with open_local_sandbox() as (sandbox, _):
        for number in range(60):
            link = tmp_path / f"link{number}"
            make = partial(sandbox.path(str(link)).symlink_to, "there")
            if await comes_late(0.0003 * (number % 20), make, link.is_symlink):
                late.append(link.name)
    assert not late


async def test_what_was_cancelled_of_opening_a_file_is_not_under_way(tmp_path: Path) -> None:
    """Neither is it made later nor emptied."""
    late: list[str] = []
    async with open_local_sandbox() as (sandbox, _):
        for number in range(40):
            path = tmp_path / f"file{number}"
            if number % 2:
                path.write_bytes(b"mine")
            open_it = partial(sandbox.path(str(path)).open, "w")
            if await comes_late(0.0002 * (number % 20), open_it, partial(size_of, path)):
                late.append(path.name)
    assert not late


async def test_what_was_cancelled_of_an_open_file_is_not_under_way(tmp_path: Path) -> None:
    """Neither what is written nor what is cut off comes later."""
    late: list[str] = []
    async with open_local_sandbox() as (sandbox, _):
        for number in range(60):
            path = tmp_path / f"file{number}"
            path.write_bytes(bytes(100))
            async with await sandbox.path(str(path)).open("r+b") as file:
                change = partial(file.write, bytes(20_000)) if number % 2 else partial(file.truncate, 1)
                if await comes_late(0.0002 * (number % 15), change, partial(size_of, path)):
                    late.append(path.name)
    assert not late


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
