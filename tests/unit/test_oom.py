"""What the kernel's log says of those that it kills for want of memory."""

from __future__ import annotations

import pytest

from trio_sandbox.guest.spawner.oom import find_victim

_KILLED = (
    b"Killed process 713 (python3) total-vm:183456kB, anon-rss:170132kB, file-rss:1180kB, shmem-rss:0kB, UID:1000 "
    b"pgtables:400kB oom_score_adj:0\n"
)


@pytest.mark.parametrize(
    "subject", [b"Memory cgroup out of memory", b"Out of memory", b"Out of memory (oom_kill_allocating_task)"]
)
def test_the_victim_is_named(subject: bytes) -> None:
    assert find_victim(b"3,512,9811542,-;" + subject + b": " + _KILLED) == 713


@pytest.mark.parametrize(
    "record",
    [
        b"4,510,9811400,-;python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n",
        b"6,511,9811500,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task_memcg=/users/p3,task=python3,pid=713,uid=1000\n",
        # What root has written to the log: with a facility that is not the kernel's.
        b"11,513,9811600,-;Out of memory: " + _KILLED,
        # Names of processes, which are at most 15 bytes long.
        b"6,514,9811700,-;: Killed process[12]: segfault at 0 ip 0000 sp 0000 error 4\n",
        b"6,515,9811800,-;Out of memory: K[12]: segfault at 0 ip 0000 sp 0000 error 4\n",
        # Such a name, and that of the file in which it went wrong.
        b"6,518,9812100,-;Out of memory[12]: segfault at 0 ip 0000 sp 0000 error 4 in : Killed process 713 (x[55d1+1000]\n",
        b"6,519,9812200,-;Out of memory: [12]: segfault at 0 ip 0000 sp 0000 error 4 in a: Killed process 713 (x[55d1+1000]\n",
        b"3,516,9811900,-;Memory cgroup out of memory: Killed process\n",
        b"6,517,9812000,c;\n",
    ],
)
def test_what_else_there_is_names_nobody(record: bytes) -> None:
    assert find_victim(record) is None
