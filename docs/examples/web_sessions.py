"""A web service with a sandbox for each of its users: ``POST /run/USER`` with code answers with JSON.

A block has to be left in the task that has entered it, and requests of one user come in different tasks. So each sandbox has a
task of its own, which keeps it open while it is used.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from trio_sandbox import Host, Sandbox, SandboxConfig, SandboxError, open_host

#: Seconds after which a sandbox that nobody uses sleeps, and after which it is closed.
SLEEP_AFTER, CLOSE_AFTER = 60, 3600
#: How long one request may run code, in seconds, and how long that code may be, in bytes.
RUN_SECONDS, MAXIMUM_CODE = 10, 100_000


class Session:
    """A user's sandbox, which a task of its own keeps open."""

    def __init__(self) -> None:
        self.sandbox: Sandbox | None = None
        self.error: SandboxError | None = None
        self.opened = trio.Event()  # or failed to
        self.users = 0
        self.idle = trio.CancelScope()


class Sessions:
    """Sandboxes by their users' names."""

    def __init__(self, host: Host, nursery: trio.Nursery) -> None:
        self._host, self._nursery = host, nursery
        self._sessions: dict[str, Session] = {}

    @asynccontextmanager
    async def use(self, user: str) -> AsyncGenerator[Sandbox]:
        """Yield the user's sandbox, and open it if there is none."""
        session = self._sessions.get(user)
        if session is None or session.idle.cancel_called:
            session = self._sessions[user] = Session()
            self._nursery.start_soon(self._keep, user, session)
        session.users += 1
        session.idle.deadline = float("inf")
        try:
            await session.opened.wait()
            if session.sandbox is None:
                raise session.error or RuntimeError("it was closed meanwhile")
            yield session.sandbox
        except SandboxError:
            session.idle.cancel(reason="its VM may be gone")  # the next request gets a new one
            raise
        finally:
            session.users -= 1
            if not session.users:
                session.idle.deadline = trio.current_time() + CLOSE_AFTER

    async def _keep(self, user: str, session: Session) -> None:
        """Keep a sandbox open until nobody has used it for so long."""
        config = SandboxConfig(hibernate_after=SLEEP_AFTER, max_output_bytes=1_000_000)
        try:
            async with self._host.open_sandbox("python", config) as sandbox:
                session.sandbox = sandbox
                session.opened.set()
                with session.idle:
                    await trio.sleep_forever()
        except SandboxError as error:  # told to whoever asks; other users are not concerned
            session.error = error
        finally:
            session.opened.set()
            if self._sessions.get(user) is session:
                del self._sessions[user]


async def run_code(sessions: Sessions, user: str, code: str) -> tuple[int, dict[str, object]]:
    """Run code for a user; return the status of the response and what it says."""
    with trio.move_on_after(RUN_SECONDS):
        try:
            async with sessions.use(user) as sandbox:
                result = await sandbox.run(code)
        except SandboxError as error:
            return 503, {"error": str(error), "retry": error.retry_safe}
        return 200, {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
    return 200, {"error": f"stopped after {RUN_SECONDS} seconds; variables are kept"}


def make_app(sessions: Sessions) -> Callable[..., Awaitable[None]]:
    """Make the application (ASGI). Yours would find the user by a login, not by the path."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        while scope["type"] == "lifespan":  # the server starts and stops
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
        code, more = b"", True
        while more and len(code) <= MAXIMUM_CODE:
            message = await receive()
            code, more = code + message.get("body", b""), message.get("more_body", False)
        match scope["path"].split("/"):
            case ["", "run", user] if user and scope["method"] == "POST" and len(code) <= MAXIMUM_CODE:
                status, said = await run_code(sessions, user, code.decode(errors="replace"))
            case _:
                status, said = 400, {"error": "say POST /run/USER, with at most 100,000 bytes of code"}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})

    return app


async def serve_sessions(address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled; then all sandboxes are gone."""
    config = Config()
    config.bind = [address]
    async with open_host() as host:
        await host.prepare("python")  # the image and its template: not at the first request
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(serve, make_app(Sessions(host, nursery)), config)
            task_status.started(addresses[0])


if __name__ == "__main__":
    trio.run(serve_sessions, "127.0.0.1:8080")
