"""Sandboxes that tasks share by a key: each has a task that keeps it, for it has to be left where it was entered."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, Unpack, final

import trio

from .._config import SandboxConfig, SandboxFields, sandbox_config
from .._entries import Home, current_asker, open_block
from .._errors import SandboxError
from .._image import DEFAULT_IMAGE, Image
from .._nurseries import hide_nursery
from .._observe import part_logger
from .._refused import refuse
from ..machines import check_image
from ..sandbox import Sandbox
from ._book import Book, Kept, Phase
from ._values import Session, SessionsConfig, SessionsStatistics

_log = part_logger("sessions")


class OpensSandboxes(Protocol):
    """What opens the sandboxes of sessions: a `trio_sandbox.Host`, or a `trio_sandbox.fleet.FleetHost`."""

    def open_sandbox(
        self,
        image: str | Image = DEFAULT_IMAGE,
        config: SandboxConfig | None = None,
        *,
        template: str | None = None,
        **fields: Unpack[SandboxFields],
    ) -> AbstractAsyncContextManager[Sandbox]:
        """Open a sandbox, for a block."""
        ...


@final
class Sessions:
    """Sandboxes by their keys, which any task may lease. Made by `open_sessions`."""

    def __init__(
        self,
        open_sandbox: Callable[[str], AbstractAsyncContextManager[Sandbox]],
        config: SessionsConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._home = Home()
        self._open_sandbox = open_sandbox
        self._config = config
        self._nursery = nursery
        # Keepers are nobody's in particular: what the first to ask has in its context is not for all who lease it.
        self._context = contextvars.copy_context()
        self._book = Book(config, self._start, trio.current_time)

    def __repr__(self) -> str:
        numbers = self.statistics()
        return f"<trio_sandbox.Sessions: {numbers.sessions} sandboxes, {numbers.awake} awake, {numbers.leased} leased>"

    @property
    def config(self) -> SessionsConfig:
        """The limits it was opened with."""
        return self._config

    def statistics(self) -> SessionsStatistics:
        """Return numbers about the sessions as they are now."""
        return self._book.statistics()

    def remembers(self, key: str) -> bool:
        """Tell whether there is a session of *key*, or one has ended and the next lease will say so (`Session.ended`)."""
        return self._book.remembers(_check_key(key))

    @refuse("timeout")
    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def lease(self, key: str, *, exclusive: bool = False) -> AsyncGenerator[Session]:
        """Have the sandbox of *key* for a block. It is opened if there is none, and woken up if it sleeps.

            async with sessions.lease("ada") as session:
                await session.sandbox.run("x = 1")

        Tasks that ask for the same key get the same sandbox, and it is opened once. As long as one of them has it, it is not
        put to sleep and not closed, except by `close`. If it can't be opened, or does not wake up, all tasks that wait for it raise the
        error; the next lease tries again. If its VM has ended, a lease gets another sandbox, and `Session.ended` says so; leases
        from before keep the old one until they end.

        If there are as many sandboxes as may be, it waits until another can be closed or put to sleep; see `SessionsConfig`.
        Tasks that wait for room are served in the order of their calls, and so are those that wait for the same session. A
        task that has one lease while it waits for another may wait for ever: put a deadline around it.

        Cancelled while it waits: a sandbox that is being opened, or woken up, for it will be there for the next lease, or is closed
        when its time has come. Cancelled in the block: the lease ends.

        Args:
          key: Whose sandbox it is: any text that is not empty.
          exclusive: Whether nobody else may have a lease of the key meanwhile. A task that has a lease of the key can't get
            an exclusive one besides, nor the other way round; shared ones it gets at once.

        Raises:
          TypeError, ValueError: if *key* is not such a text, or *exclusive* not True or False; nothing was done.
          RuntimeError: if this task has a lease of the key, and this one or that is exclusive.
          CapacityError: if there is no room and `SessionsConfig.when_full` is "refuse"; or as `Host.open_sandbox` says.
          SnapshotError: if the sandbox did not wake up, for instance because other processes hold the memory; it is still asleep.
          SandboxClosedError: if the block of `open_sessions` has exited.
          Exception: what opening a sandbox raises; nothing is left of it.

        """
        self._home.check("Sessions.lease()")
        _check_key(key)
        if not isinstance(exclusive, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`exclusive` must be True or False, not {exclusive!r:.100}")
        ticket = self._book.ask(key, current_asker(), exclusive=exclusive)
        try:
            await ticket.done.wait()
            if ticket.error is not None:
                # It may be several tasks that raise it: each with the traceback from where it comes from.
                raise ticket.error.with_traceback(ticket.traceback)
            assert ticket.session is not None
            yield ticket.session
        finally:
            self._book.give_back(ticket)

    async def close(self, key: str) -> None:
        """Close the sandbox of *key*, if there is one, whoever leases it. The next lease opens another.

        Requests of those who lease it raise `SandboxClosedError` or `OutcomeUnknownError`. Returns when the VM is gone, which takes
        `SessionsConfig.close_grace` at most, and then as long as ending a VM. Cancelled: it is closed all the same.
        """
        self._home.check("Sessions.close()")
        kept = self._book.close(_check_key(key))
        if kept is None:
            await trio.lowlevel.checkpoint()
        else:
            await kept.gone.wait()

    # --- Keepers ---

    def _start(self, kept: Kept) -> None:
        self._context.run(self._nursery.start_soon, self._keep, kept)

    @trio.lowlevel.enable_ki_protection
    async def _keep(self, kept: Kept) -> None:  # noqa: ASYNC910 - the task has nothing else to do
        """Open a sandbox, do what the book decides, and close it."""
        error: Exception | None = None
        try:
            with kept.scope:
                try:
                    async with _check_manager(self._open_sandbox(kept.key)) as sandbox:
                        _check_sandbox(sandbox)
                        # Whoever leases it has been told that it is awake.
                        sandbox._slot.stays_awake = lambda: bool(kept.leases)  # pyright: ignore[reportPrivateUsage]
                        self._book.opened(kept, sandbox)
                        while kept.end is None:
                            await self._tend(kept, sandbox)
                except Exception as exc:  # noqa: BLE001 - it is for those who wait, is logged, or raised below
                    error = exc
        finally:
            told = self._book.is_gone(kept, error)
        if kept.sandbox is not None and kept.scope.cancelled_caught:
            _log.warning("a sandbox was not closed within %g seconds, and was destroyed", self._config.close_grace)
        if error is None or told:
            return  # noqa: ASYNC910 - as above
        if kept.sandbox is not None and not isinstance(error, (SandboxError, OSError)):
            raise error  # a mistake in a function of the user's
        _log.warning("a sandbox %s: %s", "did not end well" if kept.sandbox else "could not be opened", error)

    async def _tend(self, kept: Kept, sandbox: Sandbox) -> None:
        """Do what is to be done next, or wait until there is something."""
        match kept.phase:
            case Phase.FALLING_ASLEEP:
                await self._put_to_sleep(kept, sandbox)
            case Phase.WAKING:
                await self._wake(kept, sandbox)
            case _:
                bell = kept.bell
                with trio.move_on_at(self._book.look(kept)):
                    await bell.wait()

    async def _put_to_sleep(self, kept: Kept, sandbox: Sandbox) -> None:  # noqa: ASYNC910 - as above
        with trio.CancelScope() as kept.falling:  # noqa: ASYNC912 - all methods of a sandbox have checkpoints
            try:
                await sandbox.hibernate()
            except trio.BusyResourceError:
                _log.debug("a sandbox does not sleep: something runs in it")
            except (SandboxError, OSError) as exc:
                _log.warning("a sandbox did not fall asleep: %s", exc)
        kept.falling = None
        self._book.fell_asleep(kept, asleep=sandbox.statistics().hibernated)

    async def _wake(self, kept: Kept, sandbox: Sandbox) -> None:  # noqa: ASYNC910 - as above
        error: Exception | None = None
        with trio.CancelScope() as kept.falling:  # noqa: ASYNC912 - as above
            try:
                await sandbox.resume()
            except (SandboxError, OSError) as exc:
                error = exc
        kept.falling = None
        if kept.end is None:
            self._book.woke_up(kept, error)


def _check_key(key: str) -> str:
    if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`key` must be str, not {type(key).__name__}")
    if not key:
        raise ValueError("`key` must not be empty: say whose sandbox it is")
    return key


def _check_manager(manager: AbstractAsyncContextManager[Sandbox]) -> AbstractAsyncContextManager[Sandbox]:
    if not isinstance(manager, AbstractAsyncContextManager):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"`open_sandbox` must return what `async with` takes, such as a function with @asynccontextmanager does, not {manager!r:.100}"
        )
    return manager


def _check_sandbox(sandbox: Sandbox) -> None:
    if not isinstance(sandbox, Sandbox):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`open_sandbox` must yield a Sandbox, not {sandbox!r:.100}")


@open_block
@trio.lowlevel.enable_ki_protection
async def open_sessions_with(
    open_sandbox: Callable[[str], AbstractAsyncContextManager[Sandbox]], limits: SessionsConfig | None = None
) -> AsyncGenerator[Sessions]:
    """Yield sessions whose sandboxes your own function opens: it can prepare each for its key, and save things at its end.

        @asynccontextmanager
        async def open_workspace(user):
            async with host.open_sandbox("python") as sandbox:
                await sandbox.upload(f"workspaces/{user}", "work")
                yield sandbox

        async with open_sessions_with(open_workspace) as sessions:
            ...

    Everything else is as for `open_sessions`. Sandboxes must have no `SandboxConfig.hibernate_after`: these would sleep while
    somebody leases them.

    Args:
      open_sandbox: Called with the key, in the task that keeps the sandbox. An exception from entering is raised by the leases that wait.
        Leaving may take `SessionsConfig.close_grace`; a `SandboxError` or `OSError` from it is logged, and anything else comes out of the block.
      limits: How many sandboxes, and for how long; the default is `SessionsConfig()`.

    Raises:
      TypeError: if *open_sandbox* can't be called, or *limits* is not a `SessionsConfig`; nothing was started.

    """
    if not callable(open_sandbox):
        raise TypeError(f"`open_sandbox` must be a function that opens a sandbox, not {open_sandbox!r:.100}")
    if limits is None:
        limits = SessionsConfig()
    elif not isinstance(limits, SessionsConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`limits` must be a SessionsConfig, not {limits!r:.100}")
    with hide_nursery("open_sessions()"):
        async with trio.open_nursery() as nursery:
            sessions = Sessions(open_sandbox, limits, nursery)
            try:
                yield sessions
            finally:
                sessions._book.shut()  # pyright: ignore[reportPrivateUsage]


@open_block
@trio.lowlevel.enable_ki_protection
async def open_sessions(
    host: OpensSandboxes,
    image: str | Image = DEFAULT_IMAGE,
    config: SandboxConfig | None = None,
    *,
    limits: SessionsConfig | None = None,
    **fields: Unpack[SandboxFields],
) -> AsyncGenerator[Sessions]:
    """Yield sessions: sandboxes by keys, such as the names of users, that tasks lease. When the block exits, all are closed.

        async with open_sessions(host, "python", limits=SessionsConfig(max_awake=8)) as sessions:
            async with sessions.lease("ada") as session:
                await session.sandbox.run("x = 1")

    Each sandbox is kept by a task of these sessions, not by a task that leases it. So requests of one user, which a web server
    has in different tasks, find the same variables and files. When nobody has leased a sandbox for a while, it sleeps; later it is closed.

    Leaving the block closes all at the same time, within `SessionsConfig.close_grace` and as long as ending a VM takes. Tasks that wait for a
    lease then raise `SandboxClosedError`, and so do requests of those that have one. Cancelled at any point, it leaves no process and no file.

    Args:
      host: What opens the sandboxes; it has to be open for as long as the block.
      image: What the guest's code sees: the name of an image, or an `Image`.
      config: Memory, vCPUs and limits of each sandbox; the default is `SandboxConfig()`.
      limits: How many sandboxes, and for how long; the default is `SessionsConfig()`.
      **fields: Fields of a `SandboxConfig`, in place of *config*.

    Raises:
      TypeError, ValueError: if an argument can't be what it is, or `SandboxConfig.hibernate_after` is set: sessions say by
        `SessionsConfig.sleep_after` when a sandbox sleeps. Nothing was started.

    """
    if not callable(getattr(host, "open_sandbox", None)):
        raise TypeError(f"`host` must have open_sandbox(), as a Host has, not be {host!r:.100}")
    wanted = check_image(image)
    config = sandbox_config(config, fields) or SandboxConfig()
    if config.hibernate_after is not None:
        raise ValueError(
            "`hibernate_after` would have sandboxes sleep while they are leased; say `limits=SessionsConfig(sleep_after=...)`"
        )
    async with open_sessions_with(lambda _key: host.open_sandbox(wanted, config), limits) as sessions:
        yield sessions
