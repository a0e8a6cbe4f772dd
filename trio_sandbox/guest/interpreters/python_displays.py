"""What code of a Python interpreter shows: objects in the forms that notebooks ask them for, and Matplotlib's figures.

Like the worker, which takes this text from the agent and runs it, it stands alone: the standard library of Python 3.9
or later, in the process of code that nobody trusts.

- Before something is shown what was printed goes out of its buffers, and the code waits until the agent has taken what
  is shown. So it keeps its place among what is printed, and nothing piles up.
- It travels in a sealed file of memory, for the agent to read without trusting us.
"""

from __future__ import annotations

import io
import re
import sys
from binascii import Error as Base64Error, a2b_base64
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from importlib import import_module
from json import dumps
from os import MFD_ALLOW_SEALING, MFD_CLOEXEC, O_CLOEXEC, close, memfd_create, pipe2, read, write
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

#: As the agent has it, which ends an interpreter that says anything else.
_MIME_TYPE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}/[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}")
#: Bytes that `write` takes at once for certain.
_PIECE = 1 << 30
_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE

_METHODS = (
    ("_repr_html_", "text/html"),
    ("_repr_markdown_", "text/markdown"),
    ("_repr_latex_", "text/latex"),
    ("_repr_svg_", "image/svg+xml"),
    ("_repr_png_", "image/png"),
    ("_repr_jpeg_", "image/jpeg"),
    ("_repr_pdf_", "application/pdf"),
    ("_repr_json_", "application/json"),
    ("_repr_javascript_", "application/javascript"),
)
#: Types that have none of these, and that most values are of.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type})

_BACKEND = "trio_sandbox_figures"
#: Inches of empty canvas that are left around a figure, where nobody has set something else: there may be less than that on the canvas.
_MARGIN = 0.1
#: Settings under which a saved figure looks as it does on its canvas.
_USUAL = (
    ("savefig.dpi", "figure"),
    ("savefig.facecolor", "auto"),
    ("savefig.edgecolor", "auto"),
    ("savefig.transparent", False),
    ("savefig.pad_inches", _MARGIN),
)

_modules = sys.modules  # as code may put something else there


class Displays:
    """Shows what the code of a run wants shown.

    Args:
      post: Sends the agent a message with descriptors.
      flush: Empties the buffers of what is printed.
      get_number: Tells the number of the run.

    """

    def __init__(
        self, post: Callable[[bytes, Sequence[int]], None], flush: Callable[[], None], get_number: Callable[[], int]
    ) -> None:
        self._post = post
        self._flush = flush
        self._get_number = get_number
        self._number = 0
        self._next_item = 0

    def display(self, *objects: object) -> None:
        """Show objects, each in all the forms that it has; text is always one of them."""
        for value in objects:
            self._show({**_forms(value), "text/plain": repr(value).encode("utf-8", "backslashreplace")})

    def show_value(self, value: object) -> None:
        """Show what the last expression came to, if it has other forms than text."""
        if type(value) not in _PLAIN and not _is_open_figure(value):
            self._show(_forms(value))

    def show_figures(self, *_arguments: object, **_options: object) -> None:
        """Show Matplotlib's open figures, and close them; its `show` has arguments for windows."""
        pyplot = _modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        try:
            for number in pyplot.get_fignums():
                self._show(_figure(pyplot.figure(number)))
        finally:
            pyplot.close("all")

    def use_backend(self) -> None:
        """Give Matplotlib, whose pyplot is about to be imported, a backend whose `show` shows figures here.

        An environment variable would reach the code's child processes as well, which have no such backend.
        """
        matplotlib: Any = sys.modules["matplotlib"]
        # Until somebody has chosen one it is no string. Getting it in other ways than dict's would choose one.
        if isinstance(dict[str, object].get(matplotlib.rcParams, "backend"), str):
            return
        backend: Any = ModuleType(_BACKEND)
        backend.FigureCanvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
        backend.show = self.show_figures
        sys.modules[_BACKEND] = backend
        matplotlib.use(f"module://{_BACKEND}")

    def _show(self, forms: dict[str, bytes]) -> None:
        if not forms:
            return
        number = self._get_number()
        if number != self._number:
            self._number, self._next_item = number, 0
        head = b"P" + number.to_bytes(4, "big") + self._next_item.to_bytes(4, "big")
        self._next_item += 1
        for mime, data in forms.items():
            file = memfd_create("display", MFD_CLOEXEC | MFD_ALLOW_SEALING)
            try:
                _write(file, data)
                fcntl(file, F_ADD_SEALS, _SEALS)
                self._hand_over(head + mime.encode(), file)
            finally:
                close(file)

    def _hand_over(self, message: bytes, file: int) -> None:
        taken, until_taken = pipe2(O_CLOEXEC)
        try:
            try:
                self._flush()
                self._post(message, [file, until_taken])
            finally:
                close(until_taken)
            read(taken, 1)
        finally:
            close(taken)


def _write(file: int, data: bytes) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += write(file, view[done : done + _PIECE])


def _forms(value: object) -> dict[str, bytes]:
    """Ask *value* for its forms, as notebooks do. It is its type that is asked, since some objects have every attribute."""
    forms: dict[str, bytes] = {}
    kind = type(value)
    bundle = getattr(kind, "_repr_mimebundle_", None)
    if bundle is not None:
        found: dict[object, object] = _without_metadata(bundle(value, include=None, exclude=None)) or {}
        for mime, data in found.items():
            _add(forms, mime, data)
    for name, mime in _METHODS:
        method = getattr(kind, name, None)
        if method is not None and mime not in forms:
            _add(forms, mime, _without_metadata(method(value)))
    if not forms and _is_figure(value):
        forms = _figure(value)
    return forms


def _without_metadata(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found  # pyright: ignore[reportUnknownVariableType]


def _add(forms: dict[str, bytes], mime: Any, data: Any) -> None:
    if data is None:
        return
    if not isinstance(mime, str) or not _MIME_TYPE.fullmatch(mime):
        raise ValueError(f"not a MIME type: {mime!r}")
    if isinstance(data, (bytes, bytearray)):
        forms[mime] = bytes(data)
    elif not isinstance(data, str):
        forms[mime] = dumps(data).encode()
    elif mime in ("application/pdf", "image/png", "image/jpeg", "image/gif", "image/webp"):
        try:
            forms[mime] = a2b_base64(data)
        except Base64Error as exc:
            raise ValueError(f"{mime} as text must be Base64: {exc}") from exc
    else:
        forms[mime] = data.encode("utf-8", "backslashreplace")


def _figure(figure: Any) -> dict[str, bytes]:
    if not figure.axes and not figure.lines:
        return {}  # nothing was drawn
    return {"image/png": _drawn_once(figure) or _saved(figure)}


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _drawn_once(figure: Any) -> bytes | None:
    """Draw *figure* and cut off what is empty around it; None where only `_saved` can tell what it looks like.

    `_saved` draws twice and looks for the best filter of each row. This takes about half of its time.
    """
    canvas = figure.canvas
    agg = _modules.get("matplotlib.backends.backend_agg")
    if agg is None or type(canvas) is not agg.FigureCanvasAgg:
        return None
    settings: dict[str, Any] = _modules["matplotlib"].rcParams
    if any(settings[name] != value for name, value in _USUAL):
        return None
    canvas.draw()
    math: Any = import_module("math")
    ceil, floor, dpi = math.ceil, math.floor, figure.dpi
    box = figure.get_tightbbox(canvas.get_renderer())  # in inches, from the lower left corner
    pixels: Any = canvas.buffer_rgba()
    height, width, _ = pixels.shape
    left, right, top, bottom = box.x0 * dpi, box.x1 * dpi, height - box.y1 * dpi, height - box.y0 * dpi
    if not (left >= 0 and right <= width and top >= 0 and bottom <= height):
        return None  # it has something beyond its edges
    margin = _MARGIN * dpi
    first, end = max(floor(left - margin), 0), min(ceil(right + margin), width)
    rows = range(max(floor(top - margin), 0), min(ceil(bottom + margin), height))
    flat = pixels.cast("B")
    return _png([flat[4 * (row * width + first) : 4 * (row * width + end)] for row in rows], end - first)


def _png(rows: Sequence[memoryview], width: int) -> bytes:
    """Return a picture of rows of red, green, blue and alpha. Source: the PNG specification, third edition, sections 5 and 11.2."""
    zlib: Any = import_module("zlib")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return b"".join(
            (len(data).to_bytes(4, "big"), kind, data, zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big"))
        )

    # Eight bits, four channels, and no filter of rows: that is 0 before each.
    header = width.to_bytes(4, "big") + len(rows).to_bytes(4, "big") + b"\x08\x06\0\0\0"
    data = zlib.compress(b"".join(part for row in rows for part in (b"\0", row)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _is_figure(value: object) -> bool:
    module = _modules.get("matplotlib.figure")
    return module is not None and isinstance(value, module.Figure)


def _is_open_figure(value: Any) -> bool:
    """Whether the end of the run will show it anyway."""
    pyplot = _modules.get("matplotlib.pyplot")
    return pyplot is not None and _is_figure(value) and value in map(pyplot.figure, pyplot.get_fignums())
