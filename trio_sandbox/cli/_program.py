"""What ``trio-sandbox run`` runs: which interpreter, with which arguments, and what it finds beside it in the guest."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import posixpath
import re
import sys
import tokenize
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from .._image import AnyImage
from .._oci_reference import is_oci
from ..image import IMAGES, LAYER_MARK, image_for_program, images_with
from ._copies import Upload

#: The image where nothing asks for another one.
_DEFAULT_IMAGE: Final = "python"

_EXTENSIONS: Final[Mapping[str, str]] = {
    ".py": "python",
    ".pyw": "python",
    ".js": "javascript",
    ".mjs": "javascript",
    ".cjs": "javascript",
    ".sh": "shell",
    ".bash": "shell",
}
#: How source text of Python declares its encoding, in one of its first two lines (PEP 263).
_DECLARATION: Final = re.compile(r"^([ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+")
_TYPESCRIPT: Final = (".ts", ".mts", ".cts", ".tsx")
#: What a file's first line may ask for.
_FIRST_LINES: Final = (
    (re.compile(r"python[\d.]*"), "python"),
    (re.compile(r"node(js)?"), "javascript"),
    (re.compile(r"(ba|da)?sh"), "shell"),
)


@attrs.frozen
class _Interpreter:
    """How an interpreter is told what to run; the program's own arguments come last."""

    file: tuple[str, ...]
    code: tuple[str, ...]
    after_code: tuple[str, ...]
    standard_input: tuple[str, ...]


_INTERPRETERS: Final[Mapping[str, _Interpreter]] = {
    # -u: we show what is printed while it is printed, which Python would keep until there is much of it.
    "python": _Interpreter(("python3", "-u"), ("python3", "-u", "-c"), (), ("python3", "-u", "-")),
    "javascript": _Interpreter(("node",), ("node", "-e"), ("--",), ("node", "-")),
    "shell": _Interpreter(("bash",), ("bash", "-c"), ("bash",), ("bash", "-s", "--")),
}


@attrs.frozen(kw_only=True)
class Program:
    """A program as its language's interpreter is told it."""

    language: str
    image: AnyImage
    argv: tuple[str, ...]
    name: str | None = None
    """What `content` is called in the guest, relative to the working directory; None: there is no file to write."""
    content: bytes = attrs.field(default=b"", repr=False)
    stdin: bytes | None = attrs.field(default=None, repr=False)
    """All of its standard input; None: ours, as it comes."""


def find_program(
    *,
    code: str | None,
    words: Sequence[str],
    language: str | None = None,
    image: str | None = None,
    packages: Sequence[str] = (),
    uploads: Sequence[Upload] = (),
    workspace: Path | None = None,
    read_stdin: Callable[[], bytes] | None = None,
) -> Program:
    """Decide what to run, before anything is started.

    Args:
      code: The code itself, if it is on the command line.
      words: Its arguments; without *code* the first is the file, and none or ``-`` standard input.
      language: None: what the file's name or its first line says, else what the image is for.
      image: None: one that has the language.
      packages: Requirements, of Python's packages or npm's, as the language is, besides those that a file names itself (PEP 723).
      uploads: A file in a directory of these is run where that is in the guest.
      workspace: The directory that is the working directory in the guest; a file has to be in it.
      read_stdin: Reads all of our standard input, as Python does before it runs a line of it; for tests.

    Raises:
      OSError: if the file can't be read.
      ValueError: if Python's source is no text in the encoding that it declares; for a language that nobody speaks, or not in that
        image; for what can't be a requirement; or for a file that is not in the workspace.
    """
    if language is not None:
        _check_language(language)
    content = b""
    file = None
    if code is None and words and words[0] != "-":
        file, content = words[0], Path(words[0]).read_bytes()
        language = language or _language_of_file(file, content)
    image, language = _choose_image(image, language)
    interpreter = _INTERPRETERS[language]
    name = stdin = None
    needs = ""
    if code is not None:
        argv = (*interpreter.code, code, *interpreter.after_code, *words)
    elif file is None:
        argv = (*interpreter.standard_input, *words[1:])
        if language == "python":
            with _naming("standard input"):
                stdin = _as_utf8((read_stdin or sys.stdin.buffer.read)())
            needs = stdin.decode("utf-8", "replace")
    else:
        if language == "python":
            with _naming(file):
                needs = importlib.util.decode_source(content)
        name, there = _place(file, uploads if workspace is None else (Upload(workspace, "."), *uploads))
        if workspace is not None and not there:
            raise ValueError(f"{file} is not in the workspace {workspace}, where it would have to be to run there")
        # Not to be taken for an option.
        argv = (*interpreter.file, f"./{name}" if name.startswith("-") else name, *words[1:])
        name = None if there else name
    return Program(
        language=language,
        image=image_for_program(image, packages, language, needs),
        argv=argv,
        name=name,
        content=content,
        stdin=stdin,
    )


@contextlib.contextmanager
def _naming(source: str) -> Generator[None]:
    """Say of what can't be decoded what it is."""
    try:
        yield
    except (SyntaxError, UnicodeDecodeError) as exc:
        raise ValueError(
            f"{source} is not Python in the encoding that it declares, which is UTF-8 unless it says otherwise: {exc}"
        ) from exc


def _as_utf8(source: bytes) -> bytes:
    """Return source text in UTF-8: that is all that Python takes from its standard input, whatever is declared there."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    if encoding in ("utf-8", "utf-8-sig"):
        return source
    text = source.decode(encoding)
    first, second, rest = (*text.split("\n", 2), "", "")[:3]
    declared = [_DECLARATION.sub(r"\1utf-8", line, count=1) for line in (first, second)]
    return "\n".join([*declared, rest]).encode()


def _check_language(language: str) -> None:
    if language not in _INTERPRETERS:
        raise ValueError(f"there is no language {language!r}; there are: {', '.join(_INTERPRETERS)}")


def _language_of_file(file: str, content: bytes) -> str | None:
    extension = posixpath.splitext(file)[1].lower()
    if extension in _TYPESCRIPT:
        raise ValueError(f"{file} is TypeScript, which no image runs: compile it to JavaScript first")
    if extension in _EXTENSIONS:
        return _EXTENSIONS[extension]
    if not content.startswith(b"#!"):
        return None
    line = content[2:].split(b"\n", 1)[0][:1000].decode("utf-8", "replace")
    words = [word for word in line.split() if not word.startswith("-") and "=" not in word]
    names = [posixpath.basename(word) for word in words]
    if names[:1] == ["env"]:
        del names[0]
    for pattern, language in _FIRST_LINES:
        if names and pattern.fullmatch(names[0]):
            return language
    raise ValueError(
        f"{file} starts with {'#!' + line!r}, which is no language that trio-sandbox runs; say --language, one of {', '.join(_INTERPRETERS)}"
    )


def _choose_image(image: str | None, language: str | None) -> tuple[str, str]:
    """Return an image that has the language, and the language, which is what the image is for where none was asked for."""
    if image is None:
        image = _DEFAULT_IMAGE
        if language is not None and language not in IMAGES[image].languages:
            image = images_with(language)[0]
    name = image.partition(LAYER_MARK)[0]
    if language is None and is_oci(name):
        raise ValueError(f"{image} is a container image: say which of its interpreters with --language")
    if name not in IMAGES:  # the host says so, and what there is
        return image, language or "python"
    languages = IMAGES[name].languages
    if language is not None and language not in languages:
        raise ValueError(
            f"the image {image!r} has no {language}; images that have it: {', '.join(images_with(language))}"
        )
    return image, language or languages[0]


def _place(file: str, uploads: Sequence[Upload]) -> tuple[str, bool]:
    """Return what a file is called in the guest, and whether it is there as part of what is uploaded."""
    path = Path(file).resolve()
    for upload in uploads:
        top = upload.local.resolve()
        if path == top or top in path.parents:
            return posixpath.normpath(posixpath.join(upload.remote, path.relative_to(top).as_posix())), True
    # As it was named, not as what a link leads to.
    return os.path.basename(file), False
