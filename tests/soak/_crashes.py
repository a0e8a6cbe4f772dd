"""What can be killed and stopped, what may be seen of it, and whether what was seen is right."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Literal

import attrs
import trio

from tests._processes import Process, birth, descendants, is_program
from trio_sandbox import (
    Host,
    OutcomeUnknownError,
    QemuStorageDaemonError,
    Sandbox,
    SandboxClosedError,
    SnapshotError,
    Timeouts,
    VmBootError,
    VmDiedError,
)

from ._guest_signals import Inmate, press, signal_inmates, stop_servant
from ._load import Failure, WrongError

#: Short ones, for what is stopped to be found out soon. A guest that shares its processors with others is silent for seconds.
TIMEOUTS = Timeouts(agent_silence=15, qmp_command=10, overlay=8, interrupt_grace=1, kill=5, process_exit=2, boot=90)
#: Seconds within which everybody is told that a machine is gone: it is silent for so long, and a copy of it boots besides.
BOUND = 60.0
#: Seconds that a cancelled request may take: it is interrupted, killed, and its machine ended if even that is not acknowledged.
CANCEL_BOUND = TIMEOUTS.interrupt_grace + TIMEOUTS.kill + 15.0
#: A reaper that dies sooner ends its host, by design.
REAPER_SETTLED = 5.5

_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP
#: What a machine's end comes to.
_ENDED = (OutcomeUnknownError, SandboxClosedError, SnapshotError, VmBootError, VmDiedError)
Then = Literal["ends", "lives", "either"]


@attrs.define
class Scene:
    """Where a crash takes place."""

    host: Host
    sandbox: Sandbox
    rng: random.Random
    opened: float = attrs.field(factory=time.monotonic)


_Hit = Callable[[Scene], Awaitable[None]]


@attrs.frozen
class Crash:
    """One way for something to die or to stand still."""

    name: str
    hit: _Hit
    then: Then
    """What becomes of the sandbox."""
    errors: tuple[type[Exception], ...] = ()
    """What its operations may raise."""
    loses_state: bool = False
    stands_still: bool = False
    """Operations wait: until the machine is given up for that, if it ends, or else until they are cancelled."""
    in_guest: bool = False
    """It is brought about from inside, which takes a guest that is awake."""

    def allows(self, failure: Failure) -> bool:
        """Whether an operation may come to that."""
        return isinstance(failure.error, self.errors)


def judge(crash: Crash, failures: Iterable[Failure], hit_at: float) -> list[str]:
    """Tell what is wrong with what operations raised."""
    wrong: list[str] = []
    for failure in failures:
        if isinstance(failure.error, WrongError):
            wrong.append(f"{failure}")
        elif failure.at < hit_at:
            wrong.append(f"before anything happened: {failure}")
        elif not crash.allows(failure):
            wrong.append(f"nobody expects that of it: {failure}")
        elif isinstance(failure.error, SandboxClosedError) and not failure.error.retry_safe:
            wrong.append(f"it was not sent, and a retry is not safe: {failure}")
        elif (waited := failure.at - max(hit_at, failure.started)) > BOUND:
            wrong.append(f"it was told after {waited:.0f} s: {failure}")
    return wrong


# --- On the host ---


def _qemu(scene: Scene) -> int | None:
    pid = scene.sandbox.statistics().qemu_pid
    return pid if pid is not None and is_program(Process(pid, birth(pid)), "qemu-system") else None


def _storage_daemon(scene: Scene) -> int | None:
    found = (process.pid for process in descendants(os.getpid()) if is_program(process, "qemu-storage-daemon"))
    return next(found, None)


def _reaper(scene: Scene) -> int | None:
    return scene.host._runtime.reaper_pid  # pyright: ignore[reportPrivateUsage]


_Find = Callable[[Scene], int | None]


async def _signal(scene: Scene, *, find: _Find, number: int, resumes: bool = False) -> None:
    if find is _reaper:
        await trio.sleep(max(0, scene.opened + REAPER_SETTLED - time.monotonic()))
    with trio.fail_after(BOUND):
        while (pid := find(scene)) is None:
            await trio.sleep(0.005)
    os.kill(pid, number)
    if resumes:
        await trio.sleep(scene.rng.uniform(0.2, 4))
        with suppress(ProcessLookupError):  # its sandbox was put to sleep meanwhile, and it killed for not leaving
            os.kill(pid, signal.SIGCONT)


# --- In the guest ---


async def _press(scene: Scene, key: Literal["c", "b", "o", "i"]) -> None:
    await press(scene.sandbox, key)


async def _stand_still(scene: Scene, which: Literal["agent", "spawner"], *, resumes: bool = False) -> None:
    await stop_servant(scene.sandbox, which, scene.rng.uniform(0.2, 4) if resumes else 0)


async def _signal_inmate(scene: Scene, inmate: Inmate, number: int, *, resumes: bool = False) -> None:
    await signal_inmates(scene.sandbox, inmate, number)
    if resumes:
        await trio.sleep(scene.rng.uniform(0.2, 3))
        await signal_inmates(scene.sandbox, inmate, signal.SIGCONT)


def _host(name: str, find: _Find, number: int, then: Then, *errors: type[Exception], resumes: bool = False) -> Crash:
    stands_still = number == signal.SIGSTOP and then == "ends"
    hit = partial(_signal, find=find, number=number, resumes=resumes)
    return Crash(name, hit, then, errors, stands_still=stands_still)


def _ends(name: str, hit: _Hit) -> Crash:
    return Crash(name, hit, "ends", _ENDED, in_guest=True)


def _lives(name: str, hit: _Hit, *errors: type[Exception], loses_state: bool = False) -> Crash:
    return Crash(name, hit, "lives", errors, loses_state=loses_state, in_guest=True)


def _inmate(inmate: Inmate, *errors: type[Exception], loses_state: bool = False) -> tuple[Crash, Crash, Crash]:
    signal_it = partial(_signal_inmate, inmate=inmate)
    stop = _lives(f"the {inmate} is stopped", partial(signal_it, number=_STOP), loses_state=loses_state)
    return (
        _lives(f"the {inmate} is killed", partial(signal_it, number=_KILL), *errors, loses_state=loses_state),
        attrs.evolve(stop, stands_still=True),
        _lives(f"the {inmate} is stopped and goes on", partial(signal_it, number=_STOP, resumes=True)),
    )


CRASHES = (
    _host("QEMU is killed", _qemu, _KILL, "ends", *_ENDED),
    _host("QEMU is stopped", _qemu, _STOP, "ends", *_ENDED),
    _host("QEMU is stopped and goes on", _qemu, _STOP, "lives", resumes=True),
    _host("the storage daemon is killed", _storage_daemon, _KILL, "lives", SnapshotError, QemuStorageDaemonError),
    _host("the storage daemon is stopped", _storage_daemon, _STOP, "lives", SnapshotError, QemuStorageDaemonError),
    _host("the storage daemon is stopped and goes on", _storage_daemon, _STOP, "lives", resumes=True),
    _host("the reaper is killed", _reaper, _KILL, "lives"),
    _host("the reaper is stopped", _reaper, _STOP, "lives"),
    _host("the reaper is stopped and goes on", _reaper, _STOP, "lives", resumes=True),
    _ends("the guest's kernel panics", partial(_press, key="c")),
    _ends("the guest boots again", partial(_press, key="b")),
    _ends("the guest powers off", partial(_press, key="o")),
    _ends("all of the guest's processes but the agent are killed", partial(_press, key="i")),
    attrs.evolve(_ends("the agent is stopped", partial(_stand_still, which="agent")), stands_still=True),
    _lives("the agent is stopped and goes on", partial(_stand_still, which="agent", resumes=True)),
    attrs.evolve(
        _ends("the spawner is stopped", partial(_stand_still, which="spawner")), then="either", stands_still=True
    ),
    _lives("the spawner is stopped and goes on", partial(_stand_still, which="spawner", resumes=True)),
    *_inmate("interpreter", loses_state=True),
    *_inmate("porter", loses_state=True),
    *_inmate("file helper", OutcomeUnknownError),
)
