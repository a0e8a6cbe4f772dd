"""Builders with the real programs: tiny trees of Debian packages, as root and as an ordinary user."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests._leaks import nothing_left, wait_until
from trio_sandbox import ImageBuildError, MissingProgramError, Progress
from trio_sandbox.image import BuildContext, BuiltImage, ImageStore, SystemDisk, _scratch
from trio_sandbox.image._debian_image import IMAGE_NAME
from trio_sandbox.image._ext4 import mke2fs_script
from trio_sandbox.image._mmdebstrap import Bootstrap, lend_output, run_mmdebstrap
from trio_sandbox.qemu import InheritedFds, read_qcow2_info

pytestmark = pytest.mark.qemu

#: With this in its environment a process belongs to a test.
MARK = "TRIO_SANDBOX_TEST_BUILD"


@attrs.frozen
class TinyTree:
    """One small package on an ext4 file system: every step of a real build, and few bytes."""

    name: str = "tiny"
    size: int = 32 * 2**20
    hook: str = ""
    """Run before the disk is made, with the tree as ``$1``; /usr of it is what gets onto the disk."""
    base: None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (IMAGE_NAME,)

    @property
    def languages(self) -> tuple[str, ...]:
        return ()

    def digest(self) -> str:
        return "0" * 64

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        with InheritedFds() as inherited:
            disk = lend_output(context.output / IMAGE_NAME, inherited, self.size)
            await run_mmdebstrap(
                Bootstrap(
                    suite="trixie",
                    variant="extract",
                    packages=("busybox-static",),
                    hooks=(self.hook + mke2fs_script("$1/usr", disk),),
                ),
                staging=context.staging,
                inherited=inherited,
                environment=context.environment,
                report=context.report,
            )
        return {}


def make_store(directory: Path, recipe: TinyTree | None = None) -> ImageStore:
    return ImageStore(directory, recipes={"tiny": TinyTree() if recipe is None else recipe})


def marked_processes(mark: str) -> list[int]:
    """Give the processes that have the mark in their environment, whoever's they are."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                environ = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue  # gone, or a zombie
            if f"{MARK}={mark}\0".encode() in environ:
                found.append(int(name))
    return found


def debugfs(disk: Path, command: str) -> str:
    program = shutil.which("debugfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program is not None
    return subprocess.run([program, "-R", command, disk], check=True, capture_output=True, text=True).stdout


#: Owners and modes that only root can give.
OWNED = 'mkdir "$1/usr/theirs"; chown 1000:1000 "$1/usr/theirs"; chmod 4755 "$1/usr/bin/busybox"; '


def assert_owned(disk: Path) -> None:
    """Assert that owners and modes inside are those that the package and the hook gave."""
    assert "User:     0   Group:     0" in debugfs(disk, "stat /bin/busybox")
    assert "Mode:  04755" in debugfs(disk, "stat /bin/busybox")
    assert "User:  1000   Group:  1000" in debugfs(disk, "stat /theirs")


@pytest.fixture
def mark() -> str:
    return secrets.token_hex(8)


async def test_a_tree_of_real_packages(tmp_path: Path, mark: str) -> None:
    told: list[Progress] = []
    with nothing_left(tmp_path):
        store = make_store(tmp_path / "cache", TinyTree(hook=OWNED))
        image = await store.ensure("tiny", progress=told.append, environment={MARK: mark})
        assert_owned(image.path)
        assert list((tmp_path / "cache" / "staging").iterdir()) == []
        assert marked_processes(mark) == []
        shutil.rmtree(tmp_path / "cache")
    messages = [progress.message for progress in told]
    assert messages[0] == "fetching the lists of packages"
    assert "downloading busybox-static" in messages
    assert messages[-1] == "built"
    fractions = [progress.fraction or 0.0 for progress in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("message", ["downloading busybox-static", "putting the files together"])
async def test_a_cancelled_build_takes_all_of_its_processes_along(tmp_path: Path, mark: str, message: str) -> None:
    with trio.CancelScope() as scope:

        def cancel(progress: Progress) -> None:
            if progress.message == message:
                scope.cancel(reason="the build came to the point that the test wants")

        with nothing_left():
            hook = "sleep 1000; "  # would be seen to go on
            await make_store(tmp_path, TinyTree(hook=hook)).ensure("tiny", progress=cancel, environment={MARK: mark})
    assert scope.cancelled_caught
    # The kernel ends the rest of a PID namespace after its first process.
    await wait_until(lambda: marked_processes(mark) == [])
    assert list((tmp_path / "staging").iterdir()) == []
    assert list((tmp_path / "store").iterdir()) == []


_BUILD_AND_SAY_SO = """
import functools, sys, trio
from pathlib import Path
from tests.qemu.test_image_build import MARK, TinyTree, make_store
from trio_sandbox.qemu import open_runtime

def progress(progress):
    if progress.message == "putting the files together":
        print("building", flush=True)

async def main():
    async with open_runtime(None) as runtime:
        environment = {**runtime.environment, MARK: sys.argv[2]}
        store = make_store(Path(sys.argv[1]), TinyTree(hook="sleep 1000; "))
        await store.ensure("tiny", progress=progress, environment=environment)

trio.run(main)
"""


async def test_a_killed_builder_leaves_nothing_that_matters(tmp_path: Path, mark: str) -> None:
    argv = [sys.executable, "-c", _BUILD_AND_SAY_SO, tmp_path / "cache", mark]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            functools.partial(trio.run_process, argv, stdout=subprocess.PIPE, check=False, env=environment)
        )
        assert process.stdout is not None
        said = await process.stdout.receive_some()
        assert said.startswith(b"building"), f"it ended with {await process.wait()}"
        assert len(marked_processes(mark)) > 1
        process.kill()
    # The runtime's reaper sees to the builders.
    await wait_until(lambda: marked_processes(mark) == [])
    assert list((tmp_path / "cache" / "store").iterdir()) == []
    # And the next build to their files.
    await make_store(tmp_path / "cache").ensure("tiny")
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


@contextmanager
def small_disk(directory: Path, size: str) -> Generator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
@pytest.mark.parametrize("size", ["4m", "200m"])
async def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    # 200 MiB hold the lists of packages and the tree; not what the hook makes of it.
    hook = 'head -c 200M /dev/zero > "$1/big"; '
    monkeypatch.setattr(_scratch, "_ROOM", 0)  # all is made there, and nowhere else
    with small_disk(tmp_path / "small", size) as disk:
        with nothing_left(), pytest.raises(ImageBuildError, match=r"full.*another cache directory"):
            await make_store(disk / "cache", TinyTree(hook=hook)).ensure("tiny")
        assert list((disk / "cache" / "staging").iterdir()) == []
        assert list((disk / "cache" / "store").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
async def test_a_cache_on_a_small_disk_holds_what_is_built_elsewhere(tmp_path: Path) -> None:
    hook = 'head -c 200M /dev/zero > "$1/big"; '
    with small_disk(tmp_path / "small", "40m") as disk, nothing_left():
        await make_store(disk / "cache", TinyTree(hook=hook)).ensure("tiny")
        assert list((disk / "cache" / "staging").iterdir()) == []


async def test_what_a_failing_program_says_is_in_the_error(tmp_path: Path) -> None:
    recipe = TinyTree(hook="echo the hook says why >&2; exit 3; ")
    with pytest.raises(ImageBuildError, match=r"mmdebstrap failed(.|\n)*the hook says why"):
        await make_store(tmp_path, recipe).ensure("tiny")
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("program", "package"), [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("qemu-img", "qemu-utils")]
)
async def test_a_program_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    for name in ("mmdebstrap", "mke2fs", "qemu-img", "newuidmap"):
        if name != program:
            (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    with pytest.raises(MissingProgramError, match=f"{program} was not found.*apt-get install {package}"):
        await make_store(tmp_path / "cache").ensure("tiny")
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


_BUILD_AS_ANOTHER_USER = """
import os, pwd, sys, trio
from pathlib import Path
import tests.qemu.test_image_build as it

# All that is imported is imported: the user may not read this program's files.
user = pwd.getpwnam(sys.argv[1])
os.initgroups(user.pw_name, user.pw_gid)
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
cache, mark = Path(sys.argv[2]), sys.argv[3]

async def main():
    with trio.CancelScope() as scope:
        def cancel(progress):
            if progress.message == "putting the files together":
                scope.cancel()
        store = it.make_store(cache, it.TinyTree(hook="sleep 1000; "))
        await store.ensure("tiny", progress=cancel, environment={it.MARK: mark})
    assert scope.cancelled_caught
    assert list((cache / "staging").iterdir()) == []
    print((await it.make_store(cache, it.TinyTree(hook=it.OWNED)).ensure("tiny", environment={it.MARK: mark})).path)

trio.run(main)
"""


@pytest.fixture
def ordinary_user() -> Generator[str]:
    """A user of the system with a range of user ids to hand out, for the time of a test."""
    name = f"trio-sandbox-{secrets.token_hex(4)}"
    subprocess.run(["useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=True)


@pytest.fixture
def private_directory(ordinary_user: str) -> Generator[Path]:
    """A directory that nobody but the user may look into, as his home is."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        shutil.chown(directory, ordinary_user, ordinary_user)
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, all the other tests are those of an ordinary user")
async def test_an_ordinary_user_builds_the_same(ordinary_user: str, private_directory: Path, mark: str) -> None:
    # As a home directory: nobody else may look into it. And its parents, unlike those of `tmp_path`, let him pass.
    cache, scratches = private_directory, set(os.listdir("/var/tmp"))
    result = await trio.run_process(
        [sys.executable, "-c", _BUILD_AS_ANOTHER_USER, ordinary_user, cache, mark],
        capture_stdout=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": os.fspath(cache), "TMPDIR": "/var/tmp"},
    )
    assert_owned(Path(result.stdout.decode().strip()))
    assert os.listdir(cache / "staging") == []
    await wait_until(lambda: marked_processes(mark) == [])
    assert not [name for name in set(os.listdir("/var/tmp")) - scratches if name.startswith("build-trio-sandbox-")]


#: What container engines leave to root; see capabilities(7).
_CONTAINER = ("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "sys_chroot", "mknod")
_BUILD_IN_A_CONTAINER = """
import os, sys, trio
from pathlib import Path
import tests.qemu.test_image_build as it
from trio_sandbox.image import ImageStore, examine_building

async def main():
    print(await examine_building(Path(sys.argv[1]), {}))
    print((await it.make_store(Path(sys.argv[1]), it.TinyTree(hook=it.OWNED)).ensure("tiny")).path)
    # Of this, the parts from Debian are there already.
    print((await ImageStore(Path(sys.argv[1])).ensure_system()).disk)

trio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be root in a container")
async def test_root_in_a_container_builds_the_same(tmp_path: Path, system_disk: SystemDisk) -> None:
    base = Path(system_disk.disk).parent.parent
    (tmp_path / "store").mkdir()
    for entry in base.glob("system-base-*"):
        shutil.copytree(entry, tmp_path / "store" / entry.name)
    bounding = ",".join(["-all", *(f"+{name}" for name in _CONTAINER)])
    result = await trio.run_process(
        [
            "setpriv",
            f"--bounding-set={bounding}",
            "--inh-caps=-all",
            sys.executable,
            "-c",
            _BUILD_IN_A_CONTAINER,
            tmp_path,
        ],
        capture_stdout=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    how, tiny, disk = result.stdout.decode().splitlines()
    assert "without namespaces of their own" in how
    assert_owned(Path(tiny))
    for path in ("/agent/__pycache__", "/usr/bin", "/"):
        assert debugfs(Path(disk), f"ls {path}") == debugfs(system_disk.disk, f"ls {path}")
    assert os.listdir(tmp_path / "staging") == []


def test_the_real_image_is_what_it_says(python_image: BuiltImage, system_disk: SystemDisk) -> None:
    info = read_qcow2_info(python_image.path)
    assert info.virtual_size == python_image.virtual_size == 8 * 2**30
    assert python_image.size_bytes < 600 * 2**20
    packages: Any = python_image.manifest.details["packages"]
    assert {"python3", "python3-pip", "python3-venv", "bash", "coreutils", "git", "curl", "ca-certificates"} <= set(
        packages
    )
    assert system_disk.kernel.read_bytes()[:4] == b"\x7fELF"
    assert system_disk.initrd.read_bytes()[:6] == b"070701"
    listing = debugfs(system_disk.disk, "ls -l /agent/__pycache__")
    assert "__main__.cpython-313.pyc" in listing
