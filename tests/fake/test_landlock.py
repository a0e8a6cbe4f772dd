"""What a program may still do that gave up its rights by Landlock, tried by one."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from trio_sandbox.qemu import Confinement, _landlock_main
from trio_sandbox.qemu._confinement import prove_landlock

ORDINARY = Confinement(False, False, False, no_new_privileges=True, limits=True)


def version() -> int:
    try:
        return _landlock_main._version()  # pyright: ignore[reportPrivateUsage]
    except OSError:
        return 0


needs_landlock = pytest.mark.skipif(version() == 0, reason="this kernel has no Landlock, or it is switched off")

#: Tries things, and says as JSON which were refused, each with the name of its errno. argv: names of things to their arguments, as JSON.
PROBE = """
import errno, json, os, socket, sys
def connect(family, address):
    with socket.socket(family) as sock:
        sock.connect(address)
def abstract(name):
    connect(socket.AF_UNIX, chr(0) + name)
TRIES = {
    "read": lambda path: open(path, "rb").read(1),
    "write": lambda path: open(path, "ab").write(b"x"),
    "truncate": lambda path: os.truncate(path, 0),
    "list": os.listdir,
    "readlink": os.readlink,
    "make": lambda path: open(path, "xb"),
    "mkdir": os.mkdir,
    "remove": os.unlink,
    "link": lambda path: os.symlink("x", path),
    "execute": lambda path: os.posix_spawn(path, [path], {}) and os.wait(),
    "tcp": lambda port: connect(socket.AF_INET, ("127.0.0.1", port)),
    "abstract": abstract,
    "signal": lambda pid: os.kill(pid, 0),
}
results = []
for name, argument in json.loads(sys.argv[1]):
    try:
        TRIES[name](argument)
    except OSError as exc:
        results.append(errno.errorcode[exc.errno])
    else:
        results.append("ok")
print(json.dumps(results))
"""


def probe(things: list[tuple[str, object]], descriptors: tuple[int, ...] = ()) -> list[str]:
    command = [sys.executable, "-I", "-S", _landlock_main.__file__, sys.executable, "-I", "-S", "-c", PROBE]
    completed = subprocess.run(
        [*command, json.dumps(things)], pass_fds=descriptors, check=True, stdout=subprocess.PIPE, text=True
    )
    results: list[str] = json.loads(completed.stdout)
    return results


@needs_landlock
def test_programs_and_what_was_inherited_open_are_all_that_is_left_of_the_files(tmp_path: Path) -> None:
    for name in ("mine", "read-only", "other"):
        (tmp_path / name).write_text(name)
    executable = tmp_path / "true"
    executable.write_bytes(Path("/bin/true").read_bytes())
    executable.chmod(0o755)
    writable = os.open(tmp_path / "mine", os.O_RDWR)
    readable = os.open(tmp_path / "read-only", os.O_RDONLY)
    memory = os.memfd_create("ram")
    os.write(memory, b"x")
    try:
        allowed: list[tuple[str, object]] = [
            ("read", "/bin/sh"),
            ("list", "/usr"),
            ("execute", "/bin/true"),
            ("read", "/proc/self/status"),
            ("write", "/dev/null"),
            ("read", f"/proc/self/fd/{writable}"),
            ("write", f"/proc/self/fd/{writable}"),
            ("truncate", f"/proc/self/fd/{writable}"),
            ("read", f"/proc/self/fd/{readable}"),
            ("write", f"/proc/self/fd/{memory}"),
        ]
        refused: list[tuple[str, object]] = [
            ("read", "/etc/passwd"),
            ("read", os.fspath(tmp_path / "other")),
            ("write", os.fspath(tmp_path / "other")),
            ("remove", os.fspath(tmp_path / "other")),
            ("write", f"/proc/self/fd/{readable}"),
            ("list", "/"),
            ("list", os.fspath(tmp_path)),
            ("make", os.fspath(tmp_path / "new")),
            ("mkdir", os.fspath(tmp_path / "new")),
            ("link", os.fspath(tmp_path / "new")),
            ("make", "/dev/shm/trio-sandbox-test"),
            ("execute", os.fspath(executable)),
            # Whoever is outside can't be looked into.
            ("read", f"/proc/{os.getpid()}/environ"),
            ("read", f"/proc/{os.getpid()}/mem"),
            ("readlink", f"/proc/{os.getpid()}/exe"),
        ]
        if version() >= 3:
            refused.append(("truncate", os.fspath(tmp_path / "other")))
        results = probe(allowed + refused, (writable, readable, memory))
    finally:
        for fd in (writable, readable, memory):
            os.close(fd)
    assert dict(zip(map(str, allowed), results, strict=False)) == dict.fromkeys(map(str, allowed), "ok")
    wrong = [thing for thing, result in zip(refused, results[len(allowed) :], strict=True) if result == "ok"]
    assert wrong == []
    assert (tmp_path / "other").read_text() == "other"


@needs_landlock
def test_there_is_nobody_to_talk_to_or_to_signal_where_the_kernel_can_see_to_that() -> None:
    name = f"trio-sandbox-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        things: list[tuple[str, object]] = [
            ("tcp", server.getsockname()[1]),
            ("abstract", name),
            ("signal", os.getpid()),
        ]
        tcp, *scopes = probe(things)
    assert tcp == ("EACCES" if version() >= 4 else "ok")
    assert scopes == (["EPERM", "EPERM"] if version() >= 6 else ["ok", "ok"])


@pytest.mark.parametrize(
    ("kernel", "size", "kinds"),
    [(1, 8, 13), (2, 8, 14), (3, 8, 15), (4, 16, 15), (5, 16, 16), (6, 24, 16), (9, 24, 16)],
)
def test_a_kernel_is_asked_for_what_it_knows(
    kernel: int, size: int, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bytes]()

    def call(number: int, *arguments: object) -> int:
        assert number == 444
        assert isinstance(arguments[0], bytes)
        asked.append(arguments[0])
        return 0

    monkeypatch.setattr(_landlock_main, "_call", call)
    _landlock_main._Ruleset(kernel)  # pyright: ignore[reportPrivateUsage]
    (attributes,) = asked
    assert len(attributes) == size
    assert struct.unpack_from("Q", attributes) == ((1 << kinds) - 1,)
    assert all(attributes[8::8]), "what the structure has room for is asked for"


def test_without_landlock_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(number: int, *arguments: object) -> int:
        raise OSError(errno.ENOSYS, "no such system call")

    def run(path: str, arguments: list[str]) -> NoReturn:
        pytest.fail(f"was run: {path} {arguments}")

    monkeypatch.setattr(_landlock_main, "_call", call)
    monkeypatch.setattr(os, "execv", run)
    with pytest.raises(OSError, match="no such system call"):
        _landlock_main.main(["/bin/true"])


async def test_it_is_believed_only_if_a_program_is_confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await prove_landlock(ORDINARY, {}) is (version() > 0)
    pretender = tmp_path / "pretender.py"
    pretender.write_text("import os, sys\nos.execv(sys.argv[1], sys.argv[1:])\n")
    monkeypatch.setattr(_landlock_main, "__file__", str(pretender))
    assert not await prove_landlock(ORDINARY, {})
