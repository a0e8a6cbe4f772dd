"""Which confinements are tried, and what they look like as commands."""

from __future__ import annotations

import resource

import pytest

from trio_sandbox.qemu import Confinement
from trio_sandbox.qemu._confinement import candidates
from trio_sandbox.qemu._limits import Limits

ALL_UIDS = "         0          0 4294967295\n"
CONTAINER = "         0     100000      65536\n"
FULL = Confinement(network_namespace=True, other_user=True, uid_per_vm=True, no_new_privileges=True, limits=True)
#: What comes first in a command: `FULL` has a user of its own for each machine, whose threads are counted.
LIMITS = ["nice", "-n5", "prlimit", "--core=0", "--nofile=1024"]


def test_root_takes_another_user_and_nothing_else() -> None:
    tried = candidates(root=True, uid_map=ALL_UIDS)
    assert tried[0] == FULL
    assert all(confinement.other_user and confinement.no_new_privileges for confinement in tried)


def test_without_high_uids_nobody_is_the_user() -> None:
    tried = candidates(root=True, uid_map=CONTAINER)
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
