"""One interpreter process of the service "code", which takes runs one after the other."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import signal
import struct
import termios
from collections.abc import Callable
from typing import TypeAlias, final

import trio

from ...wire import STDERR, STDOUT
from ..helpers.porter import UNCOUNTED
from .children import Child
from .displays import Display
from .languages import WARM_UP, Language, StartedInterpreter, send_code, send_functions, send_renewal, send_sync
from .meter import NOTHING, Meter
from .pipes import CHUNK, open_pipe
from .reports import End, Mark, take_report
from .run import Run

#: Seconds that an idle worker may take to answer, and in how many pieces they pass: a machine that stands still for longer uses
#: up one of them, and the worker has its turn in the next. One that does not answer is not in our code any more.
_SYNC_PATIENCE, _SYNC_PIECES = 10.0, 20
#: Bytes of what an interpreter complained about before it was ready that are worth showing.
_COMPLAINT_LIMIT = 4096
#: Bytes of output that may wait in memory for the host to take them.
_LITTLE = 1 << 14
#: Seconds after an interrupt, and then after each other, at which a run that goes on is reminded of it.
REMINDERS = (0.03, 0.06, 0.12, 0.24)


#: What a worker has to say about its run: its end, something that it shows, or why it was not begun.
_Message: TypeAlias = "End | Display | OSError"
#: What there was to read of an interpreter: what the run printed, and then at most one message.
_News: TypeAlias = "tuple[list[tuple[bytes, bytes]], _Message | None]"


@final
class Interpreter:
    """One interpreter process, with its worker in it.

    A run needs three descriptors to be watched at once. An epoll of our own does it with one task
    and one wake-up, and tells in which order they became ready, which is the order of arrival.

    Args:
      language: What it interprets.
      child: Its process.
      started: Our ends of what it was started with, owned from now on.
      user: Number of the user that it runs as; None: ours.
      keep_reading: Takes a pipe over that something of the run's holds after its end.

    """

    def __init__(
        self,
        language: Language,
        child: Child,
        started: StartedInterpreter,
        user: int | None,
        keep_reading: Callable[[int], None],
    ) -> None:
        self.used: bool = False
        """A run was handed to it."""
        self.failure: OSError | None = None
        """Why it never came to take code; known once it is over."""
        self._language = language
        self._child = child
        self._control = started.control
        self._complaints = started.stderr
        self._complaint = b""
        self._user = user
        self._keep_reading = keep_reading
        self._ready = False
        self._dying = False
        self._not_begun = False
        """It is over, and nothing of the run that it was handed was done."""
        self._over = trio.Event()
        self._run: Run | None = None
        self._pipes: dict[int, bytes] = {}
        self._spare: list[tuple[int, bytes, int]] = []
        """Those of the next run: our end, what it carries, and the other end."""
        self._numbers = itertools.count(1)
        self._warm_up_numbers = itertools.count(WARM_UP + 1)
        self._number = 0
        self._meter = Meter(child, ported=language.dialect is not None)
        self._interrupts: list[trio.Event] = []
        self._syncing: trio.Event | None = None
        """The worker was told to forget what SIGINT it got, and has yet to say that it has."""
        self._left: _News | None = None
        """What `start` took and could not send at once; `serve` takes it from here before it takes any more."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        for descriptor in (self._control.fileno(), self._complaints, self._wake):
            self._epoll.register(descriptor, select.EPOLLIN)
        child.on_exit = self._on_exit
        if child.failure is not None or child.returncode is not None:
            self._on_exit()

    # --- For the tasks that have runs ---

    async def settle(self) -> None:
        """Wait until no SIGINT that was meant for a past run can hit the next one any more."""
        if self.is_free:
            return
        for _ in range(_SYNC_PIECES):
            with trio.move_on_after(_SYNC_PATIENCE / _SYNC_PIECES):
                await self._sync()
                return
        self.kill()

    async def _sync(self) -> None:
        if self._syncing is None:
            for delivered in self._interrupts:
                await delivered.wait()
            self._interrupts.clear()
            self._syncing = trio.Event()
            with contextlib.suppress(OSError):
                send_sync(self._control)
        # Whoever waits may be cancelled. The answer still comes, and counts for whoever waits next.
        await self._syncing.wait()

    async def wait_over(self) -> None:
        """Wait until nothing is left of it."""
        await self._over.wait()

    @property
    def is_free(self) -> bool:
        """Whether `start` can be called; `settle` may help otherwise."""
        return not (self._dying or self._interrupts or self._syncing is not None)

    def start(self, run: Run) -> bool:
        """Start *run*, and finish it if it is over at once; False if the interpreter turns out to be over."""
        if not self._hand_over(run):
            return False
        # With one processor a short run is over when we have our turn again. A worker that wakes up goes first only if the kernel finds that
        # fair, which on a busy machine it does not in one run of four; then its output and its end would travel one after the other.
        os.sched_yield()
        ready = self._epoll.poll(0)
        if self._has_message(ready):
            output, message = news = self._read_news(ready)
            # All that it printed is there if nobody can print any more, and little can be left to the channel to send.
            if (
                isinstance(message, End)
                and not self._pipes
                and sum([len(data) for _, data in output]) <= _LITTLE
                and run.finish_nowait(
                    output, message.status, message.value, used=self._meter.used(message.peak, message.written)
                )
            ):
                self._run = None
                self._get_ready()
            else:
                # Whoever sends may have to wait. That is `serve` alone, or two tasks would send of two runs at once.
                assert self._left is None
                self._left = news
                os.eventfd_write(self._wake, 1)
        return True

    def _hand_over(self, run: Run) -> bool:
        self.used = True
        self._meter.begin(run.started_at)
        self._number = next(self._warm_up_numbers if run.is_warm_up else self._numbers)
        theirs: list[int] = []
        try:
            if run.stdin is not None:
                run.stdin_pipe, reader = open_pipe(for_writing=True, user=self._user)
                theirs.append(reader)
            if run.functions is not None:
                theirs += (functions := run.functions.open(self._user))
                send_functions(self._control, run.functions.names, functions)
            outputs: list[int] = theirs[:1] if run.stdin is not None else []
            self._make_pipes()
            for ours, tag, writer in self._spare:
                theirs.append(writer)
                outputs.append(writer)
                self._pipes[ours] = tag
            self._spare.clear()
            send_code(self._control, self._number, run.code, run.env, run.cwd, outputs)
        except OSError:
            self._close_pipes()
            run.close_pipes()
            return False
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._run = run
        return True

    def has(self, run: Run) -> bool:
        """Whether it is running *run*."""
        return self._run is run

    def _make_pipes(self) -> None:
        """Have pipes for what a run prints; `OSError` if that can't be."""
        for tag in (STDOUT, STDERR)[len(self._spare) :]:
            ours, writer = open_pipe(for_writing=False, user=self._user)
            self._spare.append((ours, tag, writer))
            self._epoll.register(ours, select.EPOLLIN)

    def interrupt(self) -> None:
        """Send the run SIGINT."""
        self._interrupts.append(self._child.signal(int(signal.SIGINT), group=True))

    def remind(self) -> None:
        """Have the run see the SIGINT that it got, without another one: it may be in its `finally` by now.

        Python looks for signals between its own steps. One that comes just before a step goes to sleep is not seen before that wakes up, which
        this makes it do. Porters see to their interpreters by themselves.
        """
        if self._language.dialect is None:
            self._interrupts.append(self._child.signal(int(signal.SIGURG)))

    def renew(self, entropy: bytes) -> None:
        """Tell it that it is another machine's now; it learns that before the code of any run."""
        try:
            send_renewal(self._control, entropy)
        except OSError:
            self.kill()

    def kill(self) -> None:
        """End the interpreter and everything that it started, at once; the run's end follows."""
        self._dying = True
        self._child.kill()

    # --- The task that has the interpreter ---

    async def serve(self) -> Run | None:
        """Forward output and ends of runs until the interpreter is over; return a run that it was handed and has not begun."""
        try:
            while self._left is not None or (self._child.returncode is None and self._child.failure is None):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                await self._pass_on(*self._take_news())
            return await self._end()
        finally:
            self._close()

    def _on_exit(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _take_news(self) -> _News:
        news, self._left = self._left, None
        if news is None:
            return self._read_news(self._epoll.poll(0))
        if self._child.returncode is None and self._child.failure is None:
            os.eventfd_read(self._wake)
        return news

    def _read_news(self, ready: list[tuple[int, int]]) -> _News:
        output: list[tuple[bytes, bytes]] = []
        message = None
        for descriptor, events in ready:
            if descriptor in self._pipes:
                data = b""
                if events & select.EPOLLIN:
                    data = _read(descriptor, CHUNK)
                    output.append((self._pipes[descriptor], data))
                if events & select.EPOLLHUP and len(data) < CHUNK:
                    self._close_pipe(descriptor)  # no writer is left, and nothing to read
            elif descriptor == self._control.fileno():
                message = self._receive()
            elif descriptor == self._complaints:
                self._hear_complaint()
        return output, message

    async def _pass_on(self, output: list[tuple[bytes, bytes]], message: _Message | None) -> None:
        run = self._run
        if run is None:
            assert not output
        elif isinstance(message, Display):
            with message:
                await run.show(await self._read_out(run, output), message)
        elif isinstance(message, End):
            self._run = None
            used = self._meter.used(message.peak, message.written)
            rest = await self._rest(run, output)
            await run.finish(rest, message.status, value=message.value, state_kept=not self._dying, used=used)
            self._get_ready()
        elif message is not None:
            self._run = None
            self._close_pipes()
            message.filename = run.cwd
            await run.fail(message)
        elif output:
            await run.send(output)

    def _get_ready(self) -> None:
        """Prepare for the next run, now that the host has its answer, rather than when it waits for the next one."""
        if not self._over.is_set():
            try:
                self._make_pipes()
            except OSError:
                pass  # the next run has them made, and is told if that can't be

    def _has_message(self, ready: list[tuple[int, int]]) -> bool:
        return self._control.fileno() in dict(ready)

    def _receive(self) -> _Message | None:
        """Take a message of the worker, and return it if it is about our run: its end, or something that it shows."""
        run, report = self._run, take_report(self._control, self._number)
        if not isinstance(report, Mark):
            if run is not None:
                return report
            self._refuse(report)
            return None
        match report:
            case Mark.NOTHING:
                pass
            case Mark.CLOSED:
                # Code has closed it, if the interpreter does not end by itself. It may go on to the end of the run.
                self._epoll.unregister(self._control)
                self._dying = True
                if run is None:
                    self.kill()
            case Mark.READY if not self._ready:
                self._ready = True
                self._stop_listening_to_complaints()
            case Mark.SYNCED if self._syncing is not None:
                self._syncing.set()
                self._syncing = None
            case Mark.BEGUN if run is not None and run.begun is not None:
                run.begun.set()
            case Mark.NOT_BEGUN:
                self._dying = True
                self._not_begun = True
            case _:
                self.kill()  # our worker says no such thing
        return None

    def _refuse(self, message: _Message) -> None:
        """Take what is said of a run that is over."""
        if isinstance(message, Display):
            message.close()  # a thread of the run's
        else:
            self.kill()  # our worker says no such thing

    async def _read_out(self, run: Run, output: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Send what the pipes hold now, which is all that the run printed so far, and return the last of it unsent."""
        for descriptor, tag in list(self._pipes.items()):
            # Not more, or something that prints in the background could keep us here.
            left: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0\0\0\0"))[0]
            while left > 0 and (data := _read(descriptor, min(left, CHUNK))):
                left -= len(data)
                output.append((tag, data))
                if left > 0:
                    await run.send(output)
                    output = []
        return output

    async def _rest(self, run: Run, output: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Like `_read_out`, for a run that is over."""
        output = await self._read_out(run, output)
        for descriptor in list(self._pipes):
            try:
                ended = os.read(descriptor, 1) == b""
            except BlockingIOError:
                ended = False
            if ended:
                self._close_pipe(descriptor)
            else:
                self._epoll.unregister(descriptor)
                del self._pipes[descriptor]
                self._keep_reading(descriptor)
        return output

    async def _end(self) -> Run | None:
        """Make sure that nothing is left of it, and tell the run, or return it if it can have another interpreter."""
        child = self._child
        self._dying = True
        used = NOTHING
        if child.failure is not None:
            self.failure = OSError(
                child.failure.errno,
                f"this image can't run {self._language.name}: {child.failure.strerror}",
                self._language.argv[0],
            )
        else:
            child.kill()
            # What a porter has used says little of its interpreter.
            _, peak, written = child.used if self._language.dialect is None else (0, 0, UNCOUNTED)
            used = self._meter.used(peak, written)
            await child.wait_empty()
            used = max(self._meter.used(peak, written)[0], used[0]), *used[1:]  # its group may be gone
            await self._hear_last_words()
            if not self._ready:
                self._hear_complaint()
                complaint = self._complaint.decode("utf-8", "replace").strip()
                self.failure = OSError(f"{self._describe_end()} before it took code{complaint and ': '}{complaint}")
        run, self._run = self._run, None
        if run is None:
            return None
        if child.returncode is not None and self.failure is None and not self._not_begun:
            output = await self._rest(run, [])
            await run.finish(output, child.returncode, state_kept=False, oom=child.oom_killed, used=used)
            return None
        run.close_pipes()
        if run.stopped and child.returncode is not None:
            await run.finish([], run.stopped, state_kept=False, used=used)
        elif self.failure is not None or run.is_handed_on:
            await run.fail(self.failure or OSError(f"{self._describe_end()} before it began the run"))
        else:
            run.is_handed_on = True
            return run
        return None

    def _describe_end(self) -> str:
        end = (
            "was killed for want of memory" if self._child.oom_killed else f"ended with status {self._child.returncode}"
        )
        return f"the interpreter of {self._language.name} {end}"

    async def _hear_last_words(self) -> None:
        """Take what it has said that was not read when it ended."""
        while self._has_message(ready := self._epoll.poll(0)):
            await self._pass_on(*self._read_news(ready))

    def _hear_complaint(self) -> None:
        if self._complaints < 0:
            return
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._complaints, CHUNK)
            self._complaint = (self._complaint + data)[-_COMPLAINT_LIMIT:]
            if not data:
                self._stop_listening_to_complaints()

    def _stop_listening_to_complaints(self) -> None:
        if self._complaints >= 0:
            os.close(self._complaints)  # which takes it out of the epoll
            self._complaints = -1

    def _close_pipe(self, descriptor: int) -> None:
        del self._pipes[descriptor]
        os.close(descriptor)

    def _close_pipes(self) -> None:
        for descriptor in list(self._pipes):
            self._close_pipe(descriptor)

    def _close(self) -> None:
        self._dying = True
        self._over.set()
        if self._syncing is not None:
            self._syncing.set()
        self._child.on_exit = None
        self._child.kill()
        self._meter.close()
        if self._run is not None:
            self._run.over.set()
        self._close_pipes()
        for ours, _, writer in self._spare:
            os.close(ours)
            os.close(writer)
        self._stop_listening_to_complaints()
        self._control.close()
        trio.lowlevel.notify_closing(self._epoll.fileno())
        self._epoll.close()
        os.close(self._wake)


def _read(descriptor: int, size: int) -> bytes:
    """Read from a run's pipe, out of which the run itself may have taken what we were told was there."""
    try:
        return os.read(descriptor, size)
    except BlockingIOError:
        return b""
