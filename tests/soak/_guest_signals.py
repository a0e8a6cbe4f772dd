"""Signals to what runs in a guest, and what else its root can do to it. Root of a guest may break its own machine: nobody else."""

from __future__ import annotations

from typing import Literal

import trio

from trio_sandbox import Sandbox, SandboxError

Inmate = Literal["interpreter", "porter", "file helper"]

#: The forks of the spawner that execute no program look as it does; those of them that have a child are porters.
_SIGNAL = """
import os, sys
wanted, number = sys.argv[1], int(sys.argv[2])
def read(path):
    try:
        with open(path, 'rb') as file: return file.read()
    except OSError: return b''
pids = [int(name) for name in os.listdir('/proc') if name.isdigit() and int(name) not in (1, os.getpid())]
parents = {pid: int(stat.rpartition(b')')[2].split()[1]) for pid in pids if (stat := read(f'/proc/{pid}/stat'))}
forks = {pid for pid in parents if read(f'/proc/{pid}/cmdline') == read('/proc/1/cmdline')}
porters = forks & set(parents.values())
found = {
    'porter': porters,
    'file helper': forks - porters,
    'interpreter': {pid for pid in parents if b'"trio_sandbox_"' in read(f'/proc/{pid}/cmdline')},
}[wanted]
for pid in found:
    try: os.kill(pid, number)
    except ProcessLookupError: pass
print(len(found))
"""

#: A control group is frozen, and thawed after so many seconds if they are not 0. "agent" is the agent's own, with the spawner in it;
#: "spawner" has nothing but that, which is process 1 here.
_FREEZE = """
import ctypes, os, sys, time
which, seconds = sys.argv[1], float(sys.argv[2])
os.makedirs('/tmp/groups', exist_ok=True)
if not os.path.exists('/tmp/groups/cgroup.procs') and ctypes.CDLL(None).mount(b'none', b'/tmp/groups', b'cgroup2', 0, None):
    sys.exit('the control groups can not be mounted')
group = '/tmp/groups/' + which
if which == 'spawner':
    os.makedirs(group, exist_ok=True)
    with open(group + '/cgroup.procs', 'w') as file: file.write('1')
print('frozen', flush=True)
with open(group + '/cgroup.freeze', 'w') as file: file.write('1')
if seconds:
    time.sleep(seconds)
    with open(group + '/cgroup.freeze', 'w') as file: file.write('0')
"""


async def signal_inmates(sandbox: Sandbox, inmate: Inmate, number: int) -> int:
    """Send a signal to all of a kind in the guest; return how many there were."""
    sent = await sandbox.run_process(["python3", "-c", _SIGNAL, inmate, str(number)], user=0, capture_stdout=True)
    return int(sent.stdout)


async def freeze(sandbox: Sandbox, which: Literal["agent", "spawner"], seconds: float = 0) -> None:
    """Stop what serves us in the guest, for so many seconds or for good; return at once."""
    async with sandbox.open_process(["python3", "-c", _FREEZE, which, str(seconds)], user=0) as process:
        assert process.stdout is not None
        await process.stdout.receive_some()
        if seconds:
            await process.wait()


async def press(sandbox: Sandbox, key: Literal["c", "b", "o", "i"]) -> None:
    """Have the guest's kernel panic (c), boot again (b), power off (o), or kill all but the agent (i)."""
    try:
        with trio.move_on_after(20):
            await sandbox.run_process(f"echo {key} > /proc/sysrq-trigger", shell=True, user=0, check=False)
    except SandboxError:
        pass  # its end is what was asked for
