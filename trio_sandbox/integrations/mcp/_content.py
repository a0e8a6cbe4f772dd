"""What the tools answer with: text and pictures, bounded."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import groupby
from typing import Final, final

import trio
from mcp.types import ContentBlock, ImageContent, TextContent

from ... import Display, OutputChunk, RunResult
from ..._notebook import is_picture, readable_form

#: Characters of one text that a model is shown; the end of what is longer.
TEXT_LIMIT: Final = 50_000
#: Bytes of the pictures of one answer, and how many objects are shown.
_PICTURES_LIMIT: Final = 4 * 2**20
_OBJECTS_LIMIT: Final = 20
#: Seconds between two messages about progress.
_PERIOD: Final = 0.1
#: Characters of one such message.
_MESSAGE_LIMIT: Final = 2000


def text(value: str) -> TextContent:
    """Return a text, cut to what a model is shown of one."""
    if len(value) > TEXT_LIMIT:
        value = f"[{len(value) - TEXT_LIMIT} characters left out]\n{value[-TEXT_LIMIT:]}"
    return TextContent(type="text", text=value)


def picture(mime: str, data: bytes) -> ImageContent:
    """Return a picture."""
    return ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type=mime)


@final
class Transcript:
    """What a run prints and shows, as it comes: told as progress, and kept for the answer.

    Args:
      report: Sends progress: how many bytes were printed, and the last of it as text.

    """

    def __init__(self, report: Callable[[float, str], Awaitable[object]]) -> None:
        self._report = report
        self._printed = {"stdout": bytearray(), "stderr": bytearray()}
        self._left_out = {"stdout": 0, "stderr": 0}
        self._displays: list[Display] = []
        self._shown = 0
        self._more = 0
        self._bytes = 0
        self._untold = ""
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self._printed}
        self._told_at = -_PERIOD
        self.result: RunResult | None = None

    async def add(self, event: OutputChunk | Display | RunResult) -> None:
        """Take the next event of a run."""
        if isinstance(event, RunResult):
            self.result = event
        elif isinstance(event, Display):
            self._add_display(event)
        else:
            kept = self._printed[event.stream]
            kept += event.data
            if len(kept) > 2 * TEXT_LIMIT:
                self._left_out[event.stream] += len(kept) - TEXT_LIMIT
                del kept[:-TEXT_LIMIT]
            self._bytes += len(event.data)
            self._untold = (self._untold + self._decoders[event.stream].decode(event.data))[-_MESSAGE_LIMIT:]
            if trio.current_time() >= self._told_at + _PERIOD:
                self._told_at = trio.current_time()
                untold, self._untold = self._untold, ""
                await self._report(float(self._bytes), untold)
        await trio.lowlevel.checkpoint()

    def _add_display(self, display: Display) -> None:
        if self._shown + len(display.data) > _PICTURES_LIMIT or len(self._displays) >= 4 * _OBJECTS_LIMIT:
            self._more += 1
        else:
            self._shown += len(display.data)
            self._displays.append(display)

    def content(self) -> Iterator[ContentBlock]:
        """Give all of it."""
        for name, label in (("stdout", ""), ("stderr", "stderr:\n")):
            if printed := self._printed[name].decode("utf-8", "replace"):
                cut = f"[{self._left_out[name]} bytes left out]\n" if self._left_out[name] else ""
                yield text(label + cut + printed)
        yield from _objects(self._displays)
        if self._more:
            yield text(f"[{self._more} more objects were shown, and left out: save large ones to files]")
        if self.result is not None:
            if self.result.value is not None:
                yield text(self.result.value)
            yield from map(text, _ending(self.result))


def _objects(displays: Iterable[Display]) -> Iterator[ContentBlock]:
    """Give each object in the form that a model can use."""
    for _, group in groupby(displays, key=lambda display: display.item):
        forms = list(group)
        image = next((form for form in forms if is_picture(form)), None)
        readable = readable_form(forms)
        if image is not None:
            yield picture(image.mime, image.data)
        elif readable is not None:
            yield text(readable.text)


def _ending(result: RunResult) -> Iterator[str]:
    if not result.ok:
        yield f"exit code {result.exit_code}" + (" (out of memory)" if result.oom else "")
    if result.restarted:
        yield "note: this was a new interpreter; variables of earlier runs are gone"
    if not result.state_kept:
        yield "note: the interpreter has ended, and its variables with it"
