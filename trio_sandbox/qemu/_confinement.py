"""What a QEMU process may not do, should a guest take it over.

Each measure that the host may refuse is tried out before it is relied on. Root's QEMU runs as another user, or not at
all; what else the host refuses is done without, and said: in the log, and by ``trio-sandbox doctor``. What holds
everywhere, QEMU's own seccomp filter, is in `_machine`.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import stat
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._errors import ConfinementRequiredError, SandboxError
from .._observe import part_logger
from . import _landlock_main
from ._jail import Jail
from ._limits import Limits
from ._process import InheritedFds, describe_exit, minimal_environment, require_program, run_owned

_log = part_logger("confinement")

#: User ids that neither distributions nor systemd hand out (see "Users, Groups, UIDs and GIDs on
#: systemd Systems"), so that one can be had for each VM.
_FIRST_UID: Final = 0x70000000
_LAST_UID: Final = 0x7FFFFFFE
#: Where those are not mapped, as in many containers: ids that systemd keeps for services that are up, of which a container
#: has none. They are few, so who uses one says so.
_FIRST_OF_FEW: Final = 61184
_LAST_OF_FEW: Final = 65519
_CLAIM: Final = "\0trio-sandbox-uid-{}"
_ATTEMPTS: Final = 1000
#: And where not even those are: the user that owns nothing.
_NOBODY: Final = 65534
_KVM: Final = "/dev/kvm"

_NO_CAPABILITIES: Final = ("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")

#: Tells how it is confined, $1 being the descriptor of a network namespace, without any program but the shell.
_TELL: Final = """
[ /proc/self/ns/net -ef "/proc/self/fd/$1" ] && echo "Network: same" || echo "Network: other"
while read -r line; do echo "$line"; done < /proc/self/status
"""
#: What of a failure's output goes into a message.
_EXCERPT: Final = 300


@final
@attrs.frozen
class Confinement:
    """Measures that were tried out on this host; made by `prove_confinement`."""

    network_namespace: bool
    """Each QEMU gets a network namespace of its own, with nothing in it."""
    other_user: bool
    """We are root, and QEMU runs as another user without rights."""
    uid_per_vm: bool
    """That other user is one of its own for each VM."""
    few_uids: bool = attrs.field(default=False, kw_only=True)
    """There are only some thousand ids for that."""
    no_new_privileges: bool
    """No set-user-id program can give it rights back."""
    limits: bool = False
    """The sizes of its files and the numbers of its descriptors are limited, and everybody else's threads are preferred."""
    jail: bool | None = None
    """It has a root directory with nothing but programs in it, and IPC and UTS namespaces of its own; see `_jail`. An ordinary user's
    QEMU can't write to what it was given for reading; see `_read_only_view`.

    None: that is yet to be found out.
    """
    landlock: bool = False
    """Without a jail it opens nothing but programs and its own files all the same; see `_landlock_main`."""
    control_group: bool = False
    """It has a control group of its own; see `_control_group`."""

    def describe(self) -> str:
        """Say in words what holds."""
        parts = [
            ("a user id of its own" if self.uid_per_vm else 'the user id of "nobody"')
            if self.other_user
            else "our own user id",
            "a network namespace of its own" if self.network_namespace else "our network namespace",
            "seccomp",
        ]
        if self.no_new_privileges:
            parts.append("no new privileges")
        if self.limits:
            parts.append("limits of resources")
        if self.jail:
            parts.append("a root directory with nothing but programs")
        elif self.landlock:
            parts.append("no files but programs and its own (Landlock)")
        if self.control_group:
            parts.append("a control group of its own")
        return ", ".join(parts)

    def weaknesses(self) -> list[tuple[str, str]]:
        """List what does not hold here and could elsewhere, each with the way out."""
        found: list[tuple[str, str]] = []
        if not self.network_namespace:
            found.append(
                (
                    "QEMU is in this process's network namespace: who breaks out into it gets at this machine's network",
                    "give the container the capability SYS_ADMIN, or run in a network namespace of its own"
                    if self.other_user
                    else "let this user make user namespaces, and install util-linux; or run as root",
                )
            )
        if self.other_user and not self.uid_per_vm:
            found.append(
                (
                    'all virtual machines\' QEMUs run as one user, "nobody": one could end another',
                    f"give the container's user namespace 65536 user ids, or those up to {_LAST_UID}",
                )
            )
        if not self.no_new_privileges:
            found.append(("set-user-id programs are not denied to QEMU", "install util-linux, for its setpriv"))
        if self.jail is False:
            found.append(
                (
                    "QEMU sees the names of this machine's files, and whatever listens there, as far as its user may"
                    if self.landlock
                    else "QEMU sees this machine's files, and whatever listens there, as far as its user may",
                    "let this user make user namespaces and mount file systems in them; or give a container the capability SYS_ADMIN",
                )
            )
        if not self.limits:
            found.append(
                (
                    "QEMU's files may grow without a limit, and it competes with this program",
                    "install util-linux, for its prlimit",
                )
            )
        return found

    def require_whole(self) -> None:
        """Refuse a host on which QEMU is confined by less than it could be.

        Raises:
          ConfinementRequiredError: if it is; the message says what to change.

        """
        if weaknesses := self.weaknesses():
            raise ConfinementRequiredError(
                "QEMU can't be confined as required: "
                + "; ".join(f"{weakness} (to change that, {way_out})" for weakness, way_out in weaknesses)
            )

    def choose_uid(self) -> int | None:
        """Return a user id for something short; None: ours."""
        if not self.other_user:
            return None
        if not self.uid_per_vm:
            return _NOBODY
        first, last = (_FIRST_OF_FEW, _LAST_OF_FEW) if self.few_uids else (_FIRST_UID, _LAST_UID)
        return random.SystemRandom().randint(first, last)

    @contextmanager
    def hold_uid(self) -> Generator[int | None]:
        """Yield a user id for one VM, which is no other's during the block; None: ours.

        Raises:
          SandboxError: if all of them are taken.

        """
        if not (self.uid_per_vm and self.few_uids):
            # Some 10^8 to choose from: no list is needed to keep two hosts' choices apart.
            yield self.choose_uid()
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            for _ in range(_ATTEMPTS):
                uid = self.choose_uid()
                try:
                    # The kernel lets one socket of this network have the name, for as long as it is open.
                    claim.bind(_CLAIM.format(uid))
                except OSError as exc:
                    if exc.errno != errno.EADDRINUSE:
                        raise
                else:
                    break
            else:
                raise SandboxError("there is no user id left for another virtual machine; trying again later is safe")
            yield uid

    @property
    def may_be_jailed(self) -> bool:
        """Whether a jail is worth a try: the kernel lets us make namespaces."""
        return self.network_namespace and self.no_new_privileges

    def argv(
        self, uid: int | None, *, groups: Iterable[int] = (), limits: Limits | None = None, jail: Jail | None = None
    ) -> list[str]:
        """Return the command to put before QEMU's own.

        The programs in it replace themselves by the next one, so that the process id stays; but for an ordinary user's in
        a jail, which `find_qemu` finds.

        Args:
          uid: What `choose_uid` returned.
          groups: Supplementary groups, where QEMU gets another user id.
          limits: What it may take; the default is enough for a program without a guest.
          jail: What it enters; None: it has the host's root directory.
        """
        command: list[str] = []
        if self.limits:
            command += (Limits() if limits is None else limits).argv(own_user=self.uid_per_vm)
        if jail is not None:
            command += jail.argv()
        if self.network_namespace:
            # An ordinary user needs a user namespace around it, in which nobody but itself exists.
            command += [require_program("unshare"), *(() if self.other_user else _alone(jail))]
            command += ["--net", *(() if jail is None else ("--ipc", "--uts"))]
            command += [*(_BY_ITSELF if jail is not None and not self.other_user else ()), "--"]
        if self.other_user or self.no_new_privileges:
            command.append(require_program("setpriv"))
            if uid is not None:
                listed = ",".join(str(group) for group in groups)
                command += [f"--reuid={uid}", f"--regid={uid}", f"--groups={listed}" if listed else "--clear-groups"]
                command += _NO_CAPABILITIES
            else:
                command.append("--no-new-privs")
            command.append("--")
        if self.landlock and jail is None:
            command += [sys.executable, "-I", "-S", _landlock_main.__file__]
        return command


#: Who has the same user id can be sent signals, unless there is no number for him. A PID namespace has a first process of its own.
_BY_ITSELF: Final = ("--pid", "--fork", "--kill-child")


def find_qemu(confinement: Confinement, pid: int) -> int:
    """Return the process id of the QEMU that `Confinement.argv` has started as the process *pid*, once that is up."""
    if not confinement.jail or confinement.other_user:
        return pid
    with suppress(OSError), open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children = file.read().split()
        if len(children) == 1:
            return int(children[0])
    return pid


#: What util-linux's unshare says of a program that was killed: it can end in all ways like that, but not in this one.
_WAS_KILLED: Final = "unshare: sigprocmask unblock failed"


def read_end(returncode: int, output: str) -> tuple[int, str]:
    """Return how a QEMU ended, and its last words, from the status and the output of what `Confinement.argv` has started."""
    words, found, _ = output.rpartition(_WAS_KILLED)
    return (-signal.SIGKILL, words) if found and returncode == 1 else (returncode, output)


def _alone(jail: Jail | None) -> tuple[str, ...]:
    """Return how an ordinary user gets a user namespace for one QEMU, which no other QEMU can look into."""
    if jail is None:
        return ("--user", "--map-current-user")
    # In the jail's own it is root, and would be that again.
    return ("--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}")


#: Found once and for all: what a host allows does not change while we run.
_proved: dict[int, Confinement] = {}


async def prove_confinement(environment: Mapping[str, str]) -> Confinement:
    """Find the strongest confinement that works here, by trying; some 10 ms the first time.

    Args:
      environment: `Runtime.environment`.

    Raises:
      MissingProgramError: if util-linux is not installed.
      SandboxError: if we are root and QEMU can't become another user, or if not even a shell runs.
    """
    await trio.lowlevel.checkpoint()
    user = os.geteuid()
    if user not in _proved:
        problem = ""
        for candidate in candidates(root=user == 0, uid_map=_read_uid_map()):
            problem = await _try(candidate, environment)
            if not problem:
                if not candidate.may_be_jailed:
                    landlock = await prove_landlock(candidate, environment)
                    candidate = attrs.evolve(candidate, landlock=landlock)
                _proved[user] = candidate
                break
        else:
            raise SandboxError(_refusal(problem, root=user == 0))
        for weakness, way_out in _proved[user].weaknesses():
            _log.warning("%s; to change that, %s", weakness, way_out)
    return _proved[user]


def _refusal(problem: str, *, root: bool) -> str:
    """Say why nothing is started, and what to do."""
    if not root:
        return f"no child process can be run: /bin/sh failed however it was started: {problem}"
    return (
        f"QEMU would run as root, and is not started: it can't become another user here: {problem}. That takes util-linux's "
        "setpriv (BusyBox's can't do it), the capabilities SETUID, SETGID and SETPCAP, and a user namespace in which "
        f"the user id {_NOBODY} exists. Install util-linux, or give the container these; or run as an ordinary user. Then "
        "trying again is safe"
    )


def candidates(*, root: bool, uid_map: str) -> list[Confinement]:
    """List what could work, the strongest first; for an ordinary user nothing but seccomp last.

    Args:
      root: Whether we are root, at least in our user namespace.
      uid_map: The text of ``/proc/self/uid_map``.
    """
    many = root and _is_mapped(uid_map, _FIRST_UID) and _is_mapped(uid_map, _LAST_UID)
    few = root and not many and _is_mapped(uid_map, _FIRST_OF_FEW) and _is_mapped(uid_map, _LAST_OF_FEW)
    return [
        Confinement(network, root, many or few, no_new_privileges, limits, few_uids=few)
        for limits, no_new_privileges in (((True, True),) if root else ((True, True), (True, False), (False, False)))
        for network in (True, False)
    ]


def _is_mapped(uid_map: str, uid: int) -> bool:
    for line in uid_map.splitlines():
        inside, _, count = (int(field) for field in line.split())
        if inside <= uid < inside + count:
            return True
    return False


def _read_uid_map() -> str:
    return Path("/proc/self/uid_map").read_text(encoding="ascii")


async def _try(confinement: Confinement, environment: Mapping[str, str]) -> str:
    """Run a shell that tells how it is confined, and believe only that; return what is wrong, "" if nothing is."""
    uid = confinement.choose_uid()
    with InheritedFds() as inherited:
        namespace = inherited.open("/proc/self/ns/net", os.O_RDONLY)
        process = await run_owned(
            [*confinement.argv(uid), "/bin/sh", "-c", _TELL, "sh", str(namespace)],
            environment={**minimal_environment(), **environment},
            inherited=inherited,
        )
    if process.returncode != 0:
        said = " ".join(process.output().split())[:_EXCERPT]
        return said or f"{process.name} {describe_exit(process.returncode or 0)}"
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in process.output().splitlines())}
    wanted = {"Network": "other" if confinement.network_namespace else "same"}
    wanted["Uid"] = "\t".join([str(os.geteuid() if uid is None else uid)] * 4)
    if uid is not None:
        wanted["Gid"], wanted["Groups"] = wanted["Uid"], ""
        wanted |= {f"Cap{name}": "0" * 16 for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    if confinement.no_new_privileges:
        wanted["NoNewPrivs"] = "1"
    wrong = [
        f"{name} is {status.get(name)!r} and not {value!r}"
        for name, value in wanted.items()
        if status.get(name) != value
    ]
    return f"a program that was started so runs otherwise: {', '.join(wrong)}" if wrong else ""


@final
@attrs.frozen
class KvmAccess:
    """How a confined QEMU can get at ``/dev/kvm``."""

    groups: tuple[int, ...] = ()
    """Supplementary groups that it needs."""
    by_descriptor: bool = False
    """Only we can open it, and have to hand it over (QEMU 9.0 and later can take it)."""


def kvm_access(confinement: Confinement) -> KvmAccess:
    """Find out what QEMU needs for opening ``/dev/kvm`` as another user."""
    if not confinement.other_user:
        return KvmAccess()
    try:
        node = os.stat(_KVM)
    except OSError:
        return KvmAccess()  # QEMU says what is wrong with it.
    if node.st_mode & stat.S_IROTH and node.st_mode & stat.S_IWOTH:
        return KvmAccess()
    # Root's own group would open far more than this one device.
    if node.st_gid != 0 and node.st_mode & stat.S_IRGRP and node.st_mode & stat.S_IWGRP:
        return KvmAccess(groups=(node.st_gid,))
    return KvmAccess(by_descriptor=True)


#: Jails of one kind are alike: one that QEMU started in proves the others.
_jails_proved: set[tuple[int, str, KvmAccess | None]] = set()


async def prove_jail(
    jail: Jail, confinement: Confinement, program: str, *, kvm: KvmAccess | None, environment: Mapping[str, str]
) -> None:
    """Make sure that QEMU starts in a jail, confined as for a machine; some 20 ms the first time.

    Args:
      jail: The jail.
      confinement: What else confines it.
      program: QEMU.
      kvm: How it gets at ``/dev/kvm``, if it has to.
      environment: `Runtime.environment`.

    Raises:
      SandboxError: if it does not.

    """
    await trio.lowlevel.checkpoint()
    kind = os.geteuid(), program, kvm
    if kind in _jails_proved:
        return
    device = _KVM if kvm is not None and not kvm.by_descriptor else "/dev/null"
    confined = confinement.argv(confinement.choose_uid(), groups=() if kvm is None else kvm.groups, jail=jail)
    # The dynamic linker looks for all libraries and says so, which takes a quarter of the time that QEMU takes to say its version.
    script = 'exec 3<> "$1" && export LD_TRACE_LOADED_OBJECTS=1 && exec "$2" --version'
    process = await run_owned(
        [*confined, "/bin/sh", "-c", script, "sh", device, program],
        environment={**minimal_environment(), **environment},
    )
    if process.returncode != 0 or "not found" in process.output():
        said = " ".join(process.output().split())[-_EXCERPT:]
        raise SandboxError(
            f"{process.name} {describe_exit(process.returncode or 0)} in a jail: {said or 'it said nothing'}"
        )
    _jails_proved.add(kind)


async def prove_landlock(confinement: Confinement, environment: Mapping[str, str]) -> bool:
    """Find out whether Landlock keeps an ordinary user's programs from files here; some 30 ms.

    Args:
      confinement: What else confines them.
      environment: `Runtime.environment`.

    """
    if confinement.other_user:
        await trio.lowlevel.checkpoint()
        return False  # another user may not be able to run our Python, and needs no more than root's jail
    confined = attrs.evolve(confinement, landlock=True).argv(None)
    script = "(: < /etc/passwd) 2> /dev/null && exit 1; read -r line < /proc/self/status && echo confined"
    process = await run_owned(
        [*confined, "/bin/sh", "-c", script], environment={**minimal_environment(), **environment}
    )
    return process.output().strip() == "confined"
