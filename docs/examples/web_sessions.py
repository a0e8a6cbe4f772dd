"""A web service with a sandbox for each of its users: ``POST /run/USER`` with code answers with JSON."""

from __future__ import annotations

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import request
from quart_trio import QuartTrio

from trio_sandbox import SandboxError, open_host
from trio_sandbox.sessions import Sessions, SessionsConfig, open_sessions

#: How long one request may run code, in seconds, and how long that code may be, in bytes.
RUN_SECONDS, MAXIMUM_CODE = 10, 100_000
#: A sandbox that nobody uses sleeps after a minute and is closed after an hour. Eight fit into this host's memory.
LIMITS = SessionsConfig(sleep_after=60, close_after=3600, max_awake=8, max_sessions=200)


async def run_code(sessions: Sessions, user: str, code: str) -> tuple[dict[str, object], int]:
    """Run code for a user; return what the response says, and its status."""
    with trio.move_on_after(RUN_SECONDS):  # the wait for the sandbox counts, too
        try:
            async with sessions.lease(user) as session:
                result = await session.sandbox.run(code)
        except SandboxError as error:
            return {"error": str(error), "retry": error.retry_safe}, 503
        said = {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        return said | {"lost": session.ended}, 200  # why the variables of earlier requests are gone, if they are
    return {"error": f"stopped after {RUN_SECONDS} seconds; variables are kept"}, 200


def make_app(sessions: Sessions) -> QuartTrio:
    """Make the application. Yours would find the user by a login, not by the path."""
    app = QuartTrio(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAXIMUM_CODE

    @app.post("/run/<user>")
    async def run(user: str) -> tuple[dict[str, object], int]:
        return await run_code(sessions, user, await request.get_data(as_text=True))

    @app.delete("/run/<user>")
    async def forget(user: str) -> tuple[str, int]:
        await sessions.close(user)
        return "", 204

    return app


async def serve_sessions(address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled; then all sandboxes are gone."""
    config = Config()
    config.bind = [address]
    async with open_host() as host:
        await host.prepare("python")  # the image and its template: not at the first request
        async with open_sessions(host, "python", limits=LIMITS, max_output_bytes=1_000_000) as sessions:
            async with trio.open_nursery() as nursery:
                addresses = await nursery.start(serve, make_app(sessions), config)
                task_status.started(addresses[0])


if __name__ == "__main__":
    trio.run(serve_sessions, "127.0.0.1:8080")
