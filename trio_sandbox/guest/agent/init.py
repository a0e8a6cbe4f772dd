"""Process 1 of a virtual machine: sets the guest up, starts the spawner and is the agent.

Its ending is a kernel panic, which ends the virtual machine: there is nothing to recover to.

The order is for the first output to come soon: the spawner, which is to be small, and the first
interpreter, which takes a while, are started before Trio is imported, which takes longer still.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..messages import send_message
from ..spawner import mounts, spawner
from .languages import LANGUAGES, StartedInterpreter, start_interpreter

if TYPE_CHECKING:
    from ..spawner.becoming import Request

#: The name of the virtio-serial port that the host listens at.
PORT_NAME = "org.trio-sandbox.agent"
#: The user that code and processes run as unless asked otherwise.
DEFAULT_USER = 1000

#: What the kernel's command line calls the language whose interpreter is started at once; "none" is none.
_LANGUAGE_ARGUMENT = "trio_sandbox.language"
#: And, of a container image, the numbers of user and group that code runs as, and the directory where, in hexadecimal digits.
_USER_ARGUMENT, _DIRECTORY_ARGUMENT = "trio_sandbox.user", "trio_sandbox.directory"
#: Is on the kernel's command line where ordinary users may make user namespaces.
_NAMESPACES_ARGUMENT = "trio_sandbox.namespaces"
_IMAGE_DEVICE = "/dev/vdb"
_MOUNTS_DEVICE = "/dev/vdc"
_IMAGE = "/image"
_CGROUPS = "/sys/fs/cgroup"
_USERS_CGROUP = f"{_CGROUPS}/users"
#: Seconds that devices may take to show up.
_DEVICE_PATIENCE = 30.0

#: MiB that stay out of reach of users' processes, for the kernel and the agent to go on when those have taken all else. Some 48 are in
#: use, and the agent reads its programs from the disk again and again if there is no room for them besides: with 56 it took as much as half
#: a minute to end a fork bomb. With much more, an upload of 64 MiB would no longer fit into what may be dirty in a machine of the default size.
_RESERVED_MIB = 64
#: Every process takes memory of the users' share, so that this only bounds how long a fork bomb takes to clear away.
_MAXIMUM_PROCESSES = 4096
_MAXIMUM_DESCRIPTORS = (1024, 65536)

#: The kernel keeps users' processes from each other's, and from parts of it that they have no use for. Files below /proc/sys.
_RESTRICTIONS = {
    # Whose a file in a directory like /tmp is decides who may follow a link there, link to it, and write to it.
    "fs/protected_fifos": "2",
    "fs/protected_hardlinks": "1",
    "fs/protected_regular": "2",
    "fs/protected_symlinks": "1",
    "kernel/dmesg_restrict": "1",
    "kernel/kptr_restrict": "1",
    "kernel/perf_event_paranoid": "3",
    "kernel/sysrq": "0",
    "kernel/unprivileged_bpf_disabled": "1",
    "kernel/unprivileged_userns_clone": "0",
    "kernel/yama/ptrace_scope": "1",  # a debugger traces what it has started, and nothing else of its user's
    # What we need is there by now, also what is mounted or used later. Nobody, not even root, can take this back.
    "kernel/modules_disabled": "1",
}

_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def main() -> None:
    """Be process 1, for ever. Called by /agent/__main__.py of the system disk."""
    _mount_file_systems()
    arguments = _read_arguments()
    _confine_users()
    _restrict_kernel(namespaces=_NAMESPACES_ARGUMENT in arguments)
    _allow_dirty_memory()
    _bring_loopback_up()
    user, group, directory = _read_settings(arguments)
    sock = _start_spawner(user, group, directory)
    prestarted = _start_interpreter(sock, arguments.get(_LANGUAGE_ARGUMENT, ""))
    # Here is where the seconds go; the interpreter starts meanwhile. Nothing of it is garbage, and
    # looking for some takes a tenth of them.
    gc.disable()
    import trio

    from . import agent, instruments
    from .children import Children
    from .disk import DiskService
    from .network.service import NetworkService
    from .snapshot import Machine

    machine = Machine(_open_port(), _USERS_CGROUP)
    # Opened now: in a machine that goes on from a saved state each millisecond counts.
    random = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)

    async def serve() -> None:
        instruments.look_quickly()
        children = Children(sock, adopted=0 if prestarted is None else 1)
        await agent.serve(
            machine.open_port(),
            children,
            prestarted=prestarted,
            on_hello=lambda hello: _adopt_identity(random, hello),
            machine=machine,
            mounts_disk=_MOUNTS_DEVICE,
            disk=DiskService(_IMAGE_DEVICE, _IMAGE, _USERS_CGROUP, children),
            user=user,
            own_clock=True,
            network=NetworkService(children),
        )

    # Not to run at each line that a process prints, but when it waits, or its time slice is over. What has
    # come by then is forwarded at once, in a fraction of the turns.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # What is there now stays, and cycles are rare: the collector's rounds would be felt in every request.
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()
    trio.run(serve)
    print("the host closed the guest's port", file=sys.stderr)


def _mount_file_systems() -> None:
    mounts.mount("proc", "/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    mounts.mount("sysfs", "/sys", "sysfs", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    # Each process is moved into a group of its own, which without this option waits for a grace period of RCU.
    options = "favordynmods"
    mounts.mount("cgroup2", _CGROUPS, "cgroup2", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, options)
    if not os.path.exists("/dev/null"):
        mounts.mount("devtmpfs", "/dev", "devtmpfs", mounts.MS_NOSUID)
    _wait_for(_IMAGE_DEVICE)
    # No program there gives anybody rights, whatever its bits and its capabilities say.
    mounts.mount(_IMAGE_DEVICE, _IMAGE, "ext4", mounts.MS_NOATIME | mounts.MS_NOSUID)


def _wait_for(path: str) -> None:
    deadline = time.monotonic() + _DEVICE_PATIENCE
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{path} did not show up within {_DEVICE_PATIENCE} seconds")
        time.sleep(0.005)


def _confine_users() -> None:
    """Make the control group that users' processes share: they must leave us memory, processor time and process ids."""
    _write(f"{_CGROUPS}/cgroup.subtree_control", "+cpu +memory +pids")
    os.mkdir(_USERS_CGROUP)
    with open("/proc/meminfo", "rb") as file:
        total_mib = int(file.readline().split()[1]) >> 10
    _write(f"{_USERS_CGROUP}/memory.max", f"{max(total_mib - _RESERVED_MIB, total_mib // 2)}M")
    _write(f"{_USERS_CGROUP}/pids.max", str(_MAXIMUM_PROCESSES))
    # Each process's group gets an equal share, however many they are in it.
    _write(f"{_USERS_CGROUP}/cgroup.subtree_control", "+cpu")
    _write("/proc/self/oom_score_adj", "-1000")
    # The kernel would list all processes whenever it kills one for want of memory: after a fork bomb that takes seconds
    # each time, in which nothing else runs.
    _write("/proc/sys/vm/oom_dump_tasks", "0")
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, _MAXIMUM_DESCRIPTORS)


def _restrict_kernel(*, namespaces: bool) -> None:
    """Set `_RESTRICTIONS`, before any code of the users' runs. *namespaces*: but users may make user namespaces."""
    for name, value in _RESTRICTIONS.items():
        _write(f"/proc/sys/{name}", value)
    if namespaces:
        _write("/proc/sys/kernel/unprivileged_userns_clone", "1")


def _allow_dirty_memory() -> None:
    """Let much of what is written stay in memory for its half minute: most of it goes with the machine, unread.

    With the kernel's defaults, 10 and 20 % of what is available, a guest is so small that writing a large file is
    mostly writing it to the disk, at the guest's processor's cost.
    """
    _write("/proc/sys/vm/dirty_background_ratio", "40")
    _write("/proc/sys/vm/dirty_ratio", "60")


def _write(path: str, text: str) -> None:
    # Unbuffered, so that an error comes here and names the file.
    with open(path, "wb", buffering=0) as file:
        file.write(text.encode())


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags: int = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _read_settings(arguments: Mapping[str, str]) -> tuple[int, int | None, str | None]:
    """Return whom code runs as, user and group, and where; None: as the user's database says."""
    if _USER_ARGUMENT not in arguments:
        return DEFAULT_USER, None, None
    user, _, group = arguments[_USER_ARGUMENT].partition(":")
    return int(user), int(group), os.fsdecode(bytes.fromhex(arguments[_DIRECTORY_ARGUMENT]))


def _start_spawner(user: int, group: int | None, directory: str | None) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            confinement = spawner.Confinement(
                root=_IMAGE, cgroup=_USERS_CGROUP, user=user, group=group, directory=directory
            )
            spawner.main(theirs, confinement)
        except BaseException as exc:  # noqa: ASYNC103, BLE001  this process must not go on as a second process 1
            sys.excepthook(type(exc), exc, exc.__traceback__)
        finally:
            os._exit(1)
    theirs.close()
    # The spawner is a child of this one, in a PID namespace of its own; what we forked ends at once.
    os.waitpid(pid, 0)
    # Nothing else is ever a child of ours but the spawner, and that must not become a zombie: its end is seen on the socket.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return ours


def _start_interpreter(sock: socket.socket, language: str) -> StartedInterpreter | None:
    """Start the interpreter of the language that the image is for, as the host says; None if it is for none."""
    if language == "none":
        return None

    def spawn(request: Request, descriptors: list[int]) -> None:
        send_message(sock, ("spawn", 0, request), descriptors)

    return start_interpreter(LANGUAGES.get(language, LANGUAGES["python"]), spawn)


def _read_arguments() -> dict[str, str]:
    """Return what the host says on the kernel's command line."""
    with open("/proc/cmdline", "rb") as file:
        words = [argument.partition("=") for argument in file.read().decode().split()]
    return {name: value for name, _, value in words}


def _open_port() -> int:
    deadline = time.monotonic() + _DEVICE_PATIENCE
    while True:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir("/sys/class/virtio-ports"):
                with open(f"/sys/class/virtio-ports/{name}/name", "rb") as file:
                    if file.read().decode().strip() == PORT_NAME:
                        _wait_for(f"/dev/{name}")
                        return os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"no virtio-serial port named {PORT_NAME}")
        time.sleep(0.005)


def _adopt_identity(random: int, hello: Mapping[str, object]) -> None:
    """Take the time, some randomness, for the descriptor *random* of /dev/random, and the name that the host gives us."""
    match hello.get("time"):
        case int(nanoseconds):  # a float would be one more thing to have translated
            time.clock_settime_ns(time.CLOCK_REALTIME, nanoseconds)
        case _:
            pass
    match hello.get("entropy"):
        case str(digits):
            entropy = bytes.fromhex(digits)
            # struct rand_pool_info: bits that it is worth, bytes, and the bytes (random(4)).
            fcntl.ioctl(random, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
            # Otherwise it would be used a minute later. A kernel that has yet to be seeded takes it by itself.
            with contextlib.suppress(OSError):
                fcntl.ioctl(random, _RNDRESEEDCRNG)
        case _:
            pass
    match hello.get("hostname"):
        case str(name):
            socket.sethostname(name)
        case _:
            pass
