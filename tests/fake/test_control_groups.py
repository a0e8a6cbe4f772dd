"""Control groups for QEMU: in a tree that behaves as the kernel's, and in the kernel's own as far as this machine lets us."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

import attrs
import pytest
import trio

from trio_sandbox import HostConfig, SandboxError, VmBootError
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.qemu import Runtime, _control_group, _reaper_main, open_runtime, open_vm_manager
from trio_sandbox.qemu._control_group import ControlGroups, open_control_groups

from ._cgroup import own_cgroup
from ._qemu import fake_accelerator, fake_config


@attrs.define
class Tree:
    """A cgroup v2 hierarchy at ``sys/fs/cgroup`` below *root*, whose directories have the kernel's files."""

    root: Path
    log: list[str] = attrs.field(factory=list[str])
    """What was written to files of groups that are gone."""
    plain_write: Callable[[Path, str], None] = _control_group._write  # pyright: ignore[reportPrivateUsage]

    @property
    def top(self) -> Path:
        return self.root / "sys/fs/cgroup"

    def fill(self, group: Path) -> None:
        controllers = "cpuset cpu io memory pids"
        if group != self.top:
            controllers = (group.parent / "cgroup.subtree_control").read_text()
        files = {"cgroup.controllers": controllers, "cgroup.procs": "", "cgroup.subtree_control": ""}
        files |= {"cpu.weight": "100"} if "cpu " in f"{controllers} " else {}
        files |= {"memory.max": "max", "memory.swap.max": "max"} if "memory" in controllers else {}
        for name, text in files.items():
            (group / name).write_text(text)

    def enable(self, group: Path, controllers: str) -> None:
        (group / "cgroup.subtree_control").write_text(controllers)

    def write(self, path: Path, text: str) -> None:
        """Write to a file as the module does, with the kernel's rules: admin-guide/cgroup-v2.rst, "Controlling Controllers"."""
        if path.name != "cgroup.subtree_control":
            self.plain_write(path, text)
            return
        on = set(path.read_text().split())
        for each in text.split():
            sign, controller = each[0], each[1:]
            if controller not in (path.parent / "cgroup.controllers").read_text().split():
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
            if sign == "+" and (path.parent / "cgroup.procs").read_text() and path.parent != self.top:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
            if sign == "-" and any(controller in group.read_text() for group in path.parent.glob(f"*/{path.name}")):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
            (on.add if sign == "+" else on.discard)(controller)
        self.plain_write(path, " ".join(sorted(on)))

    def groups(self) -> list[str]:
        return sorted(path.name for path in self.top.rglob("*") if path.is_dir())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path / "root")
    make, remove = os.mkdir, os.rmdir

    def mkdir(path: str | Path, mode: int = 0o777, **more: int) -> None:
        make(path, mode, **more)
        if Path(path).is_relative_to(tree.top):
            tree.fill(Path(path))

    def rmdir(path: str | Path, **more: int) -> None:
        if not Path(path).is_relative_to(tree.top):
            remove(path, **more)
            return
        files = [file for file in Path(path).iterdir() if file.is_file()]
        if len(files) < len(os.listdir(path)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
        for file in sorted(files):
            if file.name in ("cgroup.procs", "cgroup.subtree_control", "cpu.weight", "memory.max", "memory.swap.max"):
                tree.log.append(f"{file.name}: {file.read_text().strip()}")
            file.unlink()
        remove(path)

    (tree.root / "proc/self").mkdir(parents=True)
    (tree.root / "proc/self/mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (tree.root / "proc/self/cgroup").write_text("0::/\n")
    tree.top.mkdir(parents=True)
    tree.fill(tree.top)
    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "rmdir", rmdir)
    monkeypatch.setattr(_control_group, "_write", tree.write)
    return tree


@pytest.fixture
async def runtime() -> AsyncGenerator[Runtime]:
    async with open_runtime(Path("/tmp")) as runtime:
        yield runtime


async def test_each_machine_gets_a_group_in_that_of_its_host(tree: Tree, runtime: Runtime) -> None:
    tree.enable(tree.top, "cpu memory pids")
    async with open_control_groups("auto", runtime, root=tree.root) as groups:
        assert groups is not None
        assert groups.directory == tree.top / runtime.directory.name
        assert (groups.directory / "cpu.weight").read_text().strip() == "50"
        tree.log.clear()
        with groups.enter(256) as one, groups.enter(512) as two:
            assert len(tree.groups()) == 3
            for command in (one, two):
                done = await trio.run_process([*command, "/bin/echo", "$a", "b c"], capture_stdout=True)
                assert done.stdout == b"$a b c\n"
        # The processor's controller is on for them, too, to share it among the machines.
        limit = (512 + 2 * VM_OVERHEAD_MIB) * 2**20
        assert tree.log[:5] == [
            "cgroup.procs: 0",
            "cgroup.subtree_control: ",
            "cpu.weight: 100",
            f"memory.max: {limit}",
            f"memory.swap.max: {limit}",
        ]
        assert len(tree.groups()) == 1
    assert tree.groups() == []


@pytest.mark.parametrize(
    ("enabled", "own"),
    [("", "0::/"), ("pids", "0::/"), ("memory", "0::/ours\n1:name=systemd:/"), ("memory", "4:memory:/")],
)
async def test_where_groups_are_not_counted_there_are_none(
    tree: Tree, runtime: Runtime, enabled: str, own: str
) -> None:
    tree.enable(tree.top, enabled)
    (tree.top / "ours").mkdir()
    (tree.root / "proc/self/cgroup").write_text(f"{own}\n")
    async with open_control_groups("auto", runtime, root=tree.root) as groups:
        assert groups is None
        assert tree.groups() == ["ours"]
    async with open_control_groups("off", runtime, root=tree.root) as groups:
        assert groups is None


async def test_a_directory_that_was_delegated_is_used_and_prepared(tree: Tree, runtime: Runtime) -> None:
    tree.enable(tree.top, "memory")
    delegated = tree.top / "delegated"
    delegated.mkdir()
    async with open_control_groups(delegated, runtime) as groups:
        assert groups is not None
        assert (delegated / "cgroup.subtree_control").read_text() == "memory"
        assert groups.directory.parent == delegated
        with groups.enter(256):
            pass
    assert tree.groups() == ["delegated"]


def _no_directory(place: Path) -> None:
    place.rmdir()


def _not_writable(place: Path) -> None:
    (place / "cgroup.subtree_control").unlink()
    (place / "cgroup.subtree_control").symlink_to("/proc/version")


def _no_controllers(place: Path) -> None:
    (place / "cgroup.controllers").write_text("pids")


def _a_process(place: Path) -> None:
    (place / "cgroup.procs").write_text("1")


@pytest.mark.parametrize("spoil", [_no_directory, _not_writable, _no_controllers, _a_process])
async def test_a_directory_that_can_t_be_used_is_an_error(
    tree: Tree, runtime: Runtime, spoil: Callable[[Path], None]
) -> None:
    delegated = tree.top / "delegated"
    delegated.mkdir()
    (delegated / "cgroup.controllers").write_text("memory")
    spoil(delegated)
    with pytest.raises(SandboxError, match=r"no control group can be made in .*delegated .*cgroup=\"off\" uses none"):
        async with open_control_groups(delegated, runtime):
            pytest.fail("it can't be used")
    assert [name for name in tree.groups() if name.startswith("trio-sandbox")] == []


async def test_a_group_that_no_program_can_enter_is_none(
    tree: Tree, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.enable(tree.top, "memory")
    delegated = tree.top / "delegated"
    fill = tree.fill

    def fill_closed(group: Path) -> None:
        fill(group)
        if group.parent.name == runtime.directory.name:
            (group / "cgroup.procs").unlink()
            (group / "cgroup.procs").symlink_to("/proc/version")

    def fill_no_group(tree: Tree, group: Path) -> None:
        del tree
        fill_closed(group)

    monkeypatch.setattr(Tree, "fill", fill_no_group)
    async with open_control_groups("auto", runtime, root=tree.root) as groups:
        assert groups is None
    # What was switched on for them is off again, but for what others use.
    delegated.mkdir()
    for used in ("", "memory"):
        (delegated / "others").mkdir(exist_ok=True)
        (delegated / "others/cgroup.subtree_control").write_text(used)
        with pytest.raises(SandboxError, match="a program can't enter a group there"):
            async with open_control_groups(delegated, runtime):
                pytest.fail("it can't be used")
        assert (delegated / "cgroup.subtree_control").read_text() == used
    assert tree.groups() == ["delegated", "others"]


async def test_machines_are_started_in_them_and_say_so(tree: Tree, runtime: Runtime, tmp_path: Path) -> None:
    tree.enable(tree.top, "memory")
    delegated = tree.top / "delegated"
    delegated.mkdir()
    accelerator = fake_accelerator(tmp_path)
    async with open_vm_manager(runtime=runtime, accelerator=accelerator, cgroup=delegated) as manager:
        assert "a control group of its own" in manager.confinement.describe()
        async with manager.open_vm(fake_config(tmp_path)) as vm:
            assert await vm.guest.ping() >= 0
            assert len(tree.groups()) == 3
        assert len(tree.groups()) == 2
        with pytest.raises(VmBootError, match="exited with status 1: qemu: could not do it"):
            async with manager.open_vm(fake_config(tmp_path, "refuse")):
                pytest.fail("booted")
        assert len(tree.groups()) == 2
        (delegated / runtime.directory.name).rmdir()
        with pytest.raises(SandboxError, match="there is no control group for another virtual machine"):
            async with manager.open_vm(fake_config(tmp_path)):
                pytest.fail("started elsewhere")
    async with open_vm_manager(runtime=runtime, accelerator=accelerator) as manager:
        assert "control group" not in manager.confinement.describe()


@pytest.mark.parametrize("value", ["relative/path", "/a\nb"])
def test_what_can_be_no_group_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"`cgroup` must be 'auto', 'off' or the absolute path"):
        HostConfig(cgroup=value)  # pyright: ignore[reportArgumentType]


def test_a_path_may_be_text() -> None:
    assert HostConfig(cgroup="/sys/fs/cgroup/x").cgroup == Path("/sys/fs/cgroup/x")  # pyright: ignore[reportArgumentType]
    assert HostConfig().cgroup == "auto"


# --- The kernel's ---

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")


@pytest.fixture
def real() -> Generator[Path]:
    with own_cgroup() as path:
        yield Path(path)


@needs_root
async def test_a_program_is_in_its_group_from_its_first_instruction(real: Path) -> None:
    groups = ControlGroups(real, frozenset())
    with groups.enter(256) as command:
        done = await trio.run_process([*command, "/bin/cat", "/proc/self/cgroup"], capture_stdout=True)
        (group,) = [path for path in real.iterdir() if path.is_dir()]
        assert done.stdout.decode().rstrip().endswith(f"/{real.name}/{group.name}")
    assert not group.exists()


@needs_root
def test_the_reaper_removes_what_a_host_that_was_killed_had_guarded(real: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time, trio; from pathlib import Path; from trio_sandbox.qemu import open_runtime\n"
        "from trio_sandbox.machines import LedgerEntry, open_ledger\n"
        "async def main():\n"
        "    async with open_runtime(Path('/tmp')) as runtime:\n"
        "        group = Path(sys.argv[1], runtime.directory.name)\n"
        "        (group / 'machine').mkdir(parents=True)\n"
        "        runtime.guard(group)\n"
        "        with open_ledger(Path(sys.argv[2]), guard=runtime.guard) as ledger:\n"
        "            ledger.publish(LedgerEntry(pid=1, memory_total=1))\n"
        "            print(runtime.reaper_pid, flush=True)\n"
        "            time.sleep(600)\n"
        "trio.run(main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(real), str(tmp_path / "ledgers")], stdout=subprocess.PIPE
    ) as host:
        assert host.stdout is not None
        reaper = os.pidfd_open(int(host.stdout.readline()))
        assert any(path.is_dir() for path in real.iterdir())
        assert len(list((tmp_path / "ledgers").iterdir())) == 1
        host.send_signal(signal.SIGKILL)
    poll = select.poll()
    poll.register(reaper, select.POLLIN)
    assert poll.poll(60_000), "the reaper is there still"
    os.close(reaper)
    assert not any(path.is_dir() for path in real.iterdir())
    assert not (tmp_path / "ledgers").exists()


def test_groups_that_are_in_use_or_gone_are_left_alone(tmp_path: Path) -> None:
    _reaper_main.remove_guarded(os.fsencode(tmp_path / "gone"))
    group = tmp_path / "group"
    (group / "machine" / "in use").mkdir(parents=True)
    (group / "idle").mkdir()
    _reaper_main.remove_guarded(os.fsencode(group))
    assert [path.name for path in group.iterdir()] == ["machine"]


def test_a_file_goes_with_its_directory_unless_there_are_others(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    for name in ("one", "two"):
        (directory / name).touch()
    for name, left in (("one", ["two"]), ("one", ["two"])):
        _reaper_main.remove_guarded(os.fsencode(directory / name))
        assert os.listdir(directory) == left
    _reaper_main.remove_guarded(os.fsencode(directory / "two"))
    assert not directory.exists()
