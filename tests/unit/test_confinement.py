"""Which confinements are tried, and what they look like as commands."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack

import attrs
import pytest

from trio_sandbox import SandboxError
from trio_sandbox.qemu import Confinement, _landlock_main
from trio_sandbox.qemu._confinement import candidates, find_qemu, read_end
from trio_sandbox.qemu._jail import Jail
from trio_sandbox.qemu._limits import Limits

ALL_UIDS = "         0          0 4294967295\n"
CONTAINER = "         0     100000      65536\n"
SMALL = "         0     100000      1000\n     65534     165534          1\n"
FULL = Confinement(network_namespace=True, other_user=True, uid_per_vm=True, no_new_privileges=True, limits=True)
#: What comes first in a command: `FULL` has a user of its own for each machine, whose threads are counted.
LIMITS = ["nice", "-n5", "prlimit", "--core=0", "--nofile=1024"]


def test_root_takes_another_user_and_nothing_else() -> None:
    tried = candidates(root=True, uid_map=ALL_UIDS)
    assert tried[0] == FULL
    assert all(confinement.other_user and confinement.no_new_privileges for confinement in tried)


def test_in_a_container_there_are_few_ids_and_no_two_machines_have_the_same() -> None:
    (confinement, *_) = tried = candidates(root=True, uid_map=CONTAINER)
    assert all(each.uid_per_vm and each.few_uids for each in tried)
    assert "a user id of its own" in confinement.describe()
    with ExitStack() as stack:
        uids = [stack.enter_context(confinement.hold_uid()) for _ in range(300)]
        assert len(set(uids)) == 300
        assert all(uid is not None and 61184 <= uid <= 65519 for uid in uids)
    with confinement.hold_uid() as uid, pytest.MonkeyPatch.context() as patch:

        def choose(_: Confinement) -> int | None:
            return uid

        patch.setattr(Confinement, "choose_uid", choose)
        with pytest.raises(SandboxError, match="no user id left"), confinement.hold_uid():
            pytest.fail("it is taken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Confinement, "choose_uid", choose)
        with confinement.hold_uid() as again:
            assert again == uid


def test_where_hardly_any_id_is_mapped_nobody_is_the_user() -> None:
    tried = candidates(root=True, uid_map=SMALL)
    assert not any(confinement.uid_per_vm for confinement in tried)
    assert tried[0].choose_uid() == 65534
    assert "nobody" in tried[0].describe()


def test_an_ordinary_user_keeps_the_user_id() -> None:
    tried = candidates(root=False, uid_map=ALL_UIDS)
    assert {confinement.choose_uid() for confinement in tried} == {None}
    assert tried[0].network_namespace
    assert not tried[-1].network_namespace


def test_every_vm_gets_another_uid() -> None:
    uids = {FULL.choose_uid() for _ in range(100)}
    assert len(uids) == 100
    assert all(uid is not None and 0x70000000 <= uid < 0x7FFFFFFF for uid in uids)


def test_commands() -> None:
    drop = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    limits = Limits.of_machine(disk_bytes=8 * 2**30, memory_bytes=2**28, vcpus=2)
    assert _names(FULL.argv(7, limits=limits)) == [
        *(*LIMITS, f"--fsize={9 * 2**30 - 2**29 + 2**29 + 2**26}", "--nproc=162", "--"),
        *("unshare", "--net", "--"),
        *("setpriv", "--reuid=7", "--regid=7", "--clear-groups", *drop, "--"),
    ]
    assert "--groups=104" in FULL.argv(7, groups=(104,))
    ordinary = Confinement(
        network_namespace=True, other_user=False, uid_per_vm=False, no_new_privileges=True, limits=True
    )
    assert _names(ordinary.argv(None)) == [
        *(*LIMITS, f"--fsize={2**26}", "--"),
        *("unshare", "--user", "--map-current-user", "--net", "--"),
        *("setpriv", "--no-new-privs", "--"),
    ]
    nothing = Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False)
    assert nothing.argv(None) == []


def test_an_ordinary_user_s_qemu_in_a_jail_is_by_itself_and_how_it_ended_is_known() -> None:
    ordinary = Confinement(network_namespace=True, other_user=False, uid_per_vm=False, no_new_privileges=True)
    jail = Jail(mount_fd=5, user_fd=6)
    command = _names(ordinary.argv(None, jail=jail))
    assert command[0] == "nsenter"
    assert {"--ipc", "--uts", "--net", "--pid", "--fork", "--kill-child"} <= set(command)
    assert find_qemu(ordinary, 1) == 1, "it is in no jail"
    assert "--pid" not in FULL.argv(7, jail=Jail(mount_fd=5, user_fd=None))
    said = "qemu: a warning\nunshare: sigprocmask unblock failed: Invalid argument\n"
    assert read_end(1, said) == (-9, "qemu: a warning\n")
    assert read_end(1, "qemu: could not do it\n") == (1, "qemu: could not do it\n")
    assert read_end(-11, "") == (-11, "")


def test_words() -> None:
    assert (
        FULL.describe()
        == "a user id of its own, a network namespace of its own, seccomp, no new privileges, limits of resources"
    )


def _names(argv: list[str]) -> list[str]:
    return [word.rpartition("/")[2] for word in argv]


def test_no_limit_is_above_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def low(kind: int) -> tuple[int, int]:
        return 1, 64

    monkeypatch.setattr(resource, "getrlimit", low)
    command = FULL.argv(7, limits=Limits.of_machine(disk_bytes=8 * 2**30, memory_bytes=2**28, vcpus=2))
    assert {"--nofile=64", "--fsize=64", "--nproc=64"} < set(command)


def test_landlock_is_used_and_told_where_there_is_no_jail() -> None:
    without = Confinement(False, False, False, no_new_privileges=True, limits=True, jail=False)
    confined = attrs.evolve(without, landlock=True)
    script = os.path.basename(_landlock_main.__file__)
    command = _names(confined.argv(None))
    assert command[-1] == script, "it becomes what comes next"
    assert command.index("setpriv") < command.index(script), "the last thing that is given up"
    assert script not in _names(confined.argv(None, jail=Jail(mount_fd=5, user_fd=6)))
    assert "no files but programs and its own (Landlock)" in confined.describe()
    assert "Landlock" not in attrs.evolve(confined, jail=True).describe()
    (before,) = (what for what, _ in without.weaknesses() if "files, and whatever listens" in what)
    (after,) = (what for what, _ in confined.weaknesses() if "files, and whatever listens" in what)
    assert "sees this machine's files" in before
    assert "sees the names of this machine's files" in after
