"""The tools: each works in the sandbox of the session that calls it."""

from __future__ import annotations

import secrets
import stat
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Annotated, Final, Literal, final
from weakref import WeakKeyDictionary

import attrs
import trio
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult, ContentBlock
from pydantic import Field

from ... import Checkpoint, OutputLimitError, Sandbox, SandboxClosedError, SandboxError
from ...sessions import SessionEnd, Sessions
from ._content import TEXT_LIMIT, Transcript, picture, text

#: Seconds that a call may ask for, and gets where it does not.
LONGEST: Final = 3600.0
_USUAL: Final = 60.0
#: Checkpoints of one session.
_CHECKPOINTS: Final = 20
_ENTRIES: Final = 500
_LINES: Final = 2000
#: What a model is told of the end of an earlier sandbox that it does not know of.
_ENDS: Final[dict[SessionEnd | None, str]] = {
    "expired": "nobody used the earlier one for {:g} seconds",
    "evicted": "others needed the place of the earlier one",
    "died": "the virtual machine of the earlier one has ended",
}
#: Bytes of a file that is shown as a picture, and those that its kind begins with.
_PICTURE_LIMIT: Final = 4 * 2**20
_PICTURES: Final = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))

Path = Annotated[str, Field(description="A path in the sandbox; a relative one starts at the home directory.")]
Seconds = Annotated[float, Field(description="Stop it after so many seconds.", gt=0, le=LONGEST)]
SandboxName = Annotated[
    str,
    Field(description="What an earlier answer calls its sandbox. Leave it out if answers name none, or for a new one."),
]
Action = Callable[["Workplace"], Awaitable[list[ContentBlock]]]


class ToolFailedError(Exception):
    """What a tool was asked for went wrong; the content says how."""

    def __init__(self, content: list[ContentBlock]) -> None:
        super().__init__(content)
        self.content = content


@final
@attrs.define(eq=False)
class Checkpoints:
    """Those of one sandbox."""

    named: dict[str, Checkpoint] = attrs.field(factory=dict[str, Checkpoint])
    """By the names that its user knows them by."""
    made: int = 0
    """How many were made so far."""


@final
@attrs.frozen(eq=False)
class Workplace:
    """A sandbox that a tool works in, and what belongs to it."""

    sandbox: Sandbox
    checkpoints: Checkpoints


@final
class Tools:
    """The tools of a server.

    Args:
      sessions: Where sandboxes are.

    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._checkpoints: WeakKeyDictionary[Sandbox, Checkpoints] = WeakKeyDictionary()

    def all(self) -> list[Callable[..., Awaitable[CallToolResult]]]:
        """Return them all; each docstring is what a model is told."""
        return [
            self.run_code,
            self.run_command,
            self.read_file,
            self.write_file,
            self.edit_file,
            self.list_files,
            self.search_files,
            self.checkpoint,
            self.revert,
            self.reset,
        ]

    # --- Code ---

    async def run_code(
        self,
        ctx: Context,
        code: Annotated[str, Field(description="Source text.")],
        language: Annotated[
            Literal["python", "javascript", "shell"] | None, Field(description="None: the one that the sandbox is for.")
        ] = None,
        seconds: Seconds = _USUAL,
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Run code in a sandbox, a throw-away virtual machine.

        Variables, imports and functions persist from run to run. Answers with what it printed, the value of a last expression,
        and figures as pictures. Code that is stopped keeps the variables. There is no network unless the user allowed it.
        """
        return await self._in_session(ctx, sandbox, lambda place: self._run(ctx, place, code, language, seconds))

    async def run_command(
        self,
        ctx: Context,
        command: Annotated[str, Field(description="A command line for bash.")],
        directory: Annotated[str | None, Field(description="Where to run it. None: where the last one ended.")] = None,
        seconds: Seconds = _USUAL,
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Run a command in the sandbox's shell.

        Its directory and variables persist from command to command; what is started in the background goes on.
        """
        return await self._in_session(
            ctx, sandbox, lambda place: self._run(ctx, place, command, "shell", seconds, directory)
        )

    async def _run(
        self, ctx: Context, place: Workplace, code: str, language: str | None, seconds: float, cwd: str | None = None
    ) -> list[ContentBlock]:
        async def report(progress: float, message: str) -> None:
            await ctx.report_progress(progress, message=message)

        transcript = Transcript(report)
        with trio.move_on_after(seconds) as limit:
            async with place.sandbox.stream(code, language=language, cwd=cwd) as events:
                async for event in events:
                    await transcript.add(event)
        content = list(transcript.content())
        if limit.cancelled_caught:
            raise ToolFailedError(
                [*content, text(f"stopped after {seconds:g} seconds; variables are kept where possible")]
            )
        if transcript.result is not None and not transcript.result.ok:
            raise ToolFailedError(content)
        return content or [text("done; nothing was printed")]

    # --- Files ---

    async def read_file(
        self,
        ctx: Context,
        path: Path,
        first_line: Annotated[int, Field(description="Counted from 1.", ge=1)] = 1,
        lines: Annotated[int, Field(ge=1, le=_LINES)] = _LINES,
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Read a text file of the sandbox, or see a picture (PNG, JPEG, GIF)."""

        async def read(place: Workplace) -> list[ContentBlock]:
            async with await place.sandbox.path(path).open("rb") as file:
                start = await file.read(16)
                mime = next((mime for magic, mime in _PICTURES if start.startswith(magic)), None)
                if mime is not None:
                    data = start + await file.read(_PICTURE_LIMIT)
                    if len(data) > _PICTURE_LIMIT:
                        raise ToolFailedError([text(f"the picture has more than {_PICTURE_LIMIT} bytes")])
                    return [picture(mime, data)]
            shown: list[str] = []
            room, number = TEXT_LIMIT, 0
            async with await place.sandbox.path(path).open(errors="replace") as file:
                async for line in file:
                    number += 1
                    if number < first_line:
                        continue
                    if len(shown) == lines or len(line) > room:
                        shown.append(f"[there is more, from line {number}]")
                        break
                    room -= len(line)
                    shown.append(line)
            return [text("".join(shown) or "[there is nothing]")]

        return await self._in_session(ctx, sandbox, read)

    async def write_file(
        self,
        ctx: Context,
        path: Path,
        content: Annotated[str, Field(description="All that the file is to hold.")],
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Write a text file, in place of one that is there; directories are made as needed."""

        async def write(place: Workplace) -> list[ContentBlock]:
            target = place.sandbox.path(path)
            await target.parent.mkdir(parents=True, exist_ok=True)
            return [text(f"wrote {await target.write_text(content)} characters to {target}")]

        return await self._in_session(ctx, sandbox, write)

    async def edit_file(
        self,
        ctx: Context,
        path: Path,
        old: Annotated[
            str, Field(description="The text to replace, exactly, and long enough to be there once.", min_length=1)
        ],
        new: Annotated[str, Field(description="What to put in its place.")],
        everywhere: Annotated[bool, Field(description="Replace it wherever it is.")] = False,
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Replace a piece of a text file."""

        async def edit(place: Workplace) -> list[ContentBlock]:
            target = place.sandbox.path(path)
            before = (await target.read_bytes()).decode()
            count = before.count(old)
            if count == 0 or (count > 1 and not everywhere):
                found = f"it is there {count} times: give more of it, or say everywhere" if count else "it is not there"
                raise ToolFailedError([text(f"nothing was changed: {found}")])
            await target.write_bytes(before.replace(old, new).encode())
            return [text(f"replaced {count} in {target}")]

        return await self._in_session(ctx, sandbox, edit)

    async def list_files(
        self,
        ctx: Context,
        path: Path = ".",
        pattern: Annotated[str, Field(description="As for a shell; **/* is everything below.", min_length=1)] = "*",
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """List files of a directory: kind, size and path of each."""

        async def list_them(place: Workplace) -> list[ContentBlock]:
            directory = place.sandbox.path(path)
            found = sorted(await directory.glob(pattern))
            lines: list[str] = []
            for each in islice(found, _ENTRIES):
                status = await each.lstat()
                lines.append(f"{stat.filemode(status.st_mode)} {status.st_size:>10} {each}")
            if len(found) > _ENTRIES:
                lines.append(f"[{len(found) - _ENTRIES} more]")
            return [text("\n".join(lines) or "[there is nothing]")]

        return await self._in_session(ctx, sandbox, list_them)

    async def search_files(
        self,
        ctx: Context,
        expression: Annotated[str, Field(description="An extended regular expression, as for grep -E.", min_length=1)],
        path: Path = ".",
        names: Annotated[str, Field(description="Which files, as for a shell.", min_length=1)] = "*",
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Search text files of a directory and all below; answers with FILE:LINE:TEXT."""

        async def search(place: Workplace) -> list[ContentBlock]:
            command = ["grep", "-rnIE", f"--include={names}", "-e", expression, "--", path]
            with trio.move_on_after(_USUAL):
                return await _grep(place, command)
            raise ToolFailedError([text(f"the search took more than {_USUAL:g} seconds and was stopped")])

        return await self._in_session(ctx, sandbox, search)

    # --- The sandbox itself ---

    async def checkpoint(self, ctx: Context, sandbox: SandboxName = "") -> CallToolResult:
        """Keep the state of the whole sandbox (memory, processes, files) for revert; answers with its name."""

        async def keep(place: Workplace) -> list[ContentBlock]:
            checkpoints = place.checkpoints
            if len(checkpoints.named) >= _CHECKPOINTS:
                checkpoints.named.pop(next(iter(checkpoints.named))).discard()
            kept = await place.sandbox.checkpoint()
            checkpoints.made += 1
            checkpoints.named[str(checkpoints.made)] = kept
            return [text(f"checkpoint {checkpoints.made}")]

        return await self._in_session(ctx, sandbox, keep)

    async def revert(
        self,
        ctx: Context,
        checkpoint: Annotated[str | None, Field(description="The name of a checkpoint. None: the newest.")] = None,
        sandbox: SandboxName = "",
    ) -> CallToolResult:
        """Go back to a checkpoint: memory, processes and files are as they were then."""

        async def go_back(place: Workplace) -> list[ContentBlock]:
            named = place.checkpoints.named
            name = checkpoint if checkpoint is not None else next(reversed(named), "")
            if name not in named:
                raise ToolFailedError(
                    [text(f"there is no checkpoint {name!r}; there are: {', '.join(named) or 'none'}")]
                )
            await place.sandbox.revert(named[name])
            return [text(f"reverted to checkpoint {name}")]

        return await self._in_session(ctx, sandbox, go_back)

    async def reset(self, ctx: Context, sandbox: SandboxName = "") -> CallToolResult:
        """Throw the sandbox away, and all that is in it. The next call gets a new one."""
        try:
            key, _ = self._key(ctx, sandbox)
        except ToolFailedError as exc:
            return CallToolResult(content=exc.content, is_error=True)  # noqa: ASYNC910 - what is wrong is said at once
        await self._sessions.close(key)
        return CallToolResult(content=[text("the sandbox is gone; the next call gets a new one")])

    # --- What they share ---

    def _key(self, ctx: Context, name: str) -> tuple[str, str | None]:
        """Return whose session it is, and the name that a client without sessions has to give next time."""
        request = ctx.request_context.request
        if request is None:
            return "pipe", None  # one client, at its other end
        if session := request.headers.get("mcp-session-id"):
            return f"session {session}", None
        if not name:
            name = secrets.token_urlsafe(16)  # who knows it may use it
        elif not self._sessions.remembers(f"name {name}"):
            raise ToolFailedError(
                [text("there is no sandbox of that name (any more); leave the name out for a new one")]
            )
        return f"name {name}", name

    async def _in_session(self, ctx: Context, name: str, action: Action) -> CallToolResult:
        """Do something in the sandbox of whoever calls, and make an answer of what comes of it."""
        notes: list[ContentBlock] = []
        failed = True
        try:
            key, told = self._key(ctx, name)
        except ToolFailedError as exc:
            return CallToolResult(content=exc.content, is_error=True)  # noqa: ASYNC910 - what is wrong is said at once
        if told is not None:
            notes.append(text(f"sandbox: {told}"))
        try:
            async with self._sessions.lease(key) as session:
                if session.ended in _ENDS:
                    why = _ENDS[session.ended].format(self._sessions.config.close_after)
                    notes.append(text(f"note: this is a new sandbox; {why}"))
                checkpoints = self._checkpoints.setdefault(session.sandbox, Checkpoints())
                content = await action(Workplace(session.sandbox, checkpoints))
                failed = False
        except SandboxClosedError as exc:
            content = [text(f"{exc}; the next call gets a new sandbox")]
        except (SandboxError, OSError, ValueError, RuntimeError) as exc:
            content = [text(f"{type(exc).__name__}: {exc}")]
        except ToolFailedError as exc:
            content = exc.content
        return CallToolResult(content=[*content, *notes], is_error=failed)  # noqa: ASYNC910 - as above


async def _grep(place: Workplace, command: list[str]) -> list[ContentBlock]:
    try:
        done = await place.sandbox.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    except OutputLimitError as exc:
        found, more = exc.stdout_bytes, True
    else:
        if done.returncode not in (0, 1):  # 1: there is nothing
            raise ToolFailedError([text((done.stderr or b"").decode("utf-8", "replace") or "the search failed")])
        found, more = done.stdout or b"", False
    shown = found.decode("utf-8", "replace")
    if more or len(shown) > TEXT_LIMIT:
        shown = shown[: TEXT_LIMIT - 100] + "\n[there is more]"
    return [text(shown or "[nothing was found]")]  # noqa: ASYNC910 - a process is a checkpoint
