"""This program's connection to Ray, of which there is one at most: made by the first fleet that needs it, and ended by the last."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, final

import trio

from .._errors import FleetError
from .._nurseries import run_in_own_task
from .._observe import part_logger

#: Where our actors have their names.
NAMESPACE: Final = "trio-sandbox"
#: Seconds for Ray to let this program go, or to end, if this program has started it: its head may be gone.
_END_PATIENCE: Final = 30.0

_log = part_logger("fleet")


@asynccontextmanager
async def connected(ray: Any, address: str | None) -> AsyncGenerator[None]:
    """Be connected to Ray for a block: as the program is already, or by a connection that fleets share, and that ends with the last of them.

    Raises:
      ValueError: if the program is connected already, and *address* is not where.
      FleetError: if Ray can't be started or connected to.

    """
    user = _User()
    try:
        await _in_thread(partial(user.enter, ray, address))
        yield
    finally:
        await _in_thread(user.leave)  # noqa: ASYNC102 - it shields itself, and is bounded


async def _in_thread(function: Callable[[], object]) -> None:
    """Call what blocks. It can't be cancelled, and would leave half of a cluster."""

    async def call() -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(function, limiter=trio.CapacityLimiter(1))

    await run_in_own_task(call)


@final
class _Connection:
    """The connection that fleets share. Its methods block, and are for any thread."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._users = 0
        self._address: str | None = None
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, ray: Any, address: str | None) -> bool:
        """Have one more user; False: the program has a connection of its own, which needs none."""
        with self._changing:
            if ray.is_initialized() and (self._users == 0 or address not in (None, self._address)):
                if address is not None:
                    where = "" if self._address is None else f", at {self._address!r}"
                    raise ValueError(
                        f"this program is connected to Ray already{where}: leave `address` out, or call ray.shutdown() first"
                    )
                return False
            if not ray.is_initialized():
                self._connect(ray, address)
            self._users += 1
            return True

    def leave(self) -> None:
        """Have one user less."""
        with self._changing:
            self._users -= 1
            if self._users == 0:
                self._end()

    def _end(self) -> None:
        thread, self._thread, self._address = self._thread, None, None
        self._leave.set()
        if thread is not None:
            thread.join(_END_PATIENCE)
            if thread.is_alive():
                _log.warning("Ray does not answer, and this program's connection to it ends when it does")

    def _connect(self, ray: Any, address: str | None) -> None:
        self._end()  # of a connection that somebody else has ended
        self._leave = leave = threading.Event()
        connected = threading.Event()
        failures: list[BaseException] = []
        options: dict[str, Any] = {"include_dashboard": False} if address is None else {}

        def stay() -> None:
            """Be connected until told to leave. Ray's processes die with the thread that has started them: it must not end before."""
            try:
                ray.init(address=address or "local", log_to_driver=False, namespace=NAMESPACE, **options)
            except BaseException as exc:  # noqa: ASYNC103, BLE001 - of a thread of its own; raised where it belongs
                failures.append(exc)
            connected.set()
            if not failures:
                leave.wait()
                ray.shutdown()

        self._thread = threading.Thread(target=stay, name="trio-sandbox-ray", daemon=True)
        self._thread.start()
        connected.wait()
        for exc in failures:
            self._end()
            if isinstance(exc, (ConnectionError, RuntimeError, OSError)):
                verb = "started" if address is None else "connected to"
                raise FleetError(f"Ray could not be {verb}: {exc}") from exc
            raise exc
        self._address = address


#: That of this program.
_connection: Final = _Connection()


@final
class _User:
    """One who uses the connection, or not yet, or not any more."""

    def __init__(self) -> None:
        self._entered = False

    def enter(self, ray: Any, address: str | None) -> None:
        self._entered = _connection.enter(ray, address)

    def leave(self) -> None:
        if self._entered:
            self._entered = False
            _connection.leave()
