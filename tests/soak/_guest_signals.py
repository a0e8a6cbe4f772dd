"""Signals to what runs in a guest, and what else its root can do to it. Root of a guest may break its own machine: nobody else."""

from __future__ import annotations

import shlex
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

#: The spawner, which is process 1 here and takes no signals, is put into a control group that is frozen, and thawed after so many
#: seconds if they are not 0.
_FREEZE_SPAWNER = """
import ctypes, os, sys, time
seconds = float(sys.argv[1])
os.makedirs('/tmp/groups', exist_ok=True)
if not os.path.exists('/tmp/groups/cgroup.procs') and ctypes.CDLL(None).mount(b'none', b'/tmp/groups', b'cgroup2', 0, None):
    sys.exit('the control groups can not be mounted')
os.makedirs('/tmp/groups/spawner', exist_ok=True)
def write(name, text):
    with open('/tmp/groups/spawner/' + name, 'w') as file: file.write(text)
write('cgroup.procs', '1')
write('cgroup.freeze', '1')
if seconds:
    time.sleep(seconds)
    write('cgroup.freeze', '0')
"""

#: The agent can't even be seen from here. So it gets no turn: this process takes the only processor, with all of its time.
_STARVE_AGENT = """
import os, sys, time
seconds = float(sys.argv[1])
with open('/proc/sys/kernel/sched_rt_runtime_us', 'w') as file: file.write('-1')
time.sleep(0.1)
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
end = time.monotonic() + (seconds or 10**6)
while time.monotonic() < end: pass
"""
_STANDSTILLS = {"spawner": _FREEZE_SPAWNER, "agent": _STARVE_AGENT}


async def signal_inmates(sandbox: Sandbox, inmate: Inmate, number: int) -> int:
    """Send a signal to all of a kind in the guest; return how many there were."""
    sent = await sandbox.run_process(["python3", "-c", _SIGNAL, inmate, str(number)], user=0, capture_stdout=True)
    return int(sent.stdout)


async def stop_servant(sandbox: Sandbox, which: Literal["agent", "spawner"], seconds: float = 0) -> None:
    """Stop what serves us in the guest, for so many seconds, and wait until it goes on; 0: for good, without waiting."""
    command = ["python3", "-c", _STANDSTILLS[which], str(seconds)]
    script = f"(sleep 0.3; exec {shlex.join(command)}) >/tmp/stopped 2>&1 &"  # when this request is over
    if not seconds:
        await sandbox.run_process(script, shell=True, user=0)
        return
    await sandbox.run_process(command, user=0)


async def press(sandbox: Sandbox, key: Literal["c", "b", "o", "i"]) -> None:
    """Have the guest's kernel panic (c), boot again (b), power off (o), or kill all but the agent (i)."""
    try:
        with trio.move_on_after(20):
            await sandbox.run_process(f"echo {key} > /proc/sysrq-trigger", shell=True, user=0, check=False)
    except SandboxError:
        pass  # its end is what was asked for
