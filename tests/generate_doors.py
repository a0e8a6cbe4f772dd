"""Write `trio_sandbox.blocking` and `trio_sandbox.aio` from the API for Trio: ``python -m tests.generate_doors``.

Each class that has to do with a guest gets a class of the same name in both, with the same methods. A test compares what is
there with what this makes, so that the doors can't fall behind.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import trio

import trio_sandbox
import trio_sandbox.sessions
from tests.unit.test_exports import PUBLIC

PACKAGE = Path(trio_sandbox.__file__).parent

Kind = Literal["blocking", "aio"]

#: The classes of each file, in which a class comes after those that its methods return.
FILES: Final[dict[str, list[type]]] = {
    "_files": [
        trio_sandbox.GuestFile,
        trio_sandbox.GuestTextFile,
    ],
    "_paths": [
        trio_sandbox.GuestPath,
        trio_sandbox.FileChange,
        trio_sandbox.FileChanges,
    ],
    "_processes": [
        trio_sandbox.GuestInput,
        trio_sandbox.GuestOutput,
        trio_sandbox.GuestTerminal,
        trio_sandbox.GuestProcess,
        trio_sandbox.RunEvents,
        trio.abc.HalfCloseableStream,
    ],
    "_sandbox": [
        trio_sandbox.Checkpoint,
        trio_sandbox.NetworkWatch,
        trio_sandbox.Sandbox,
    ],
    "_host": [
        trio_sandbox.Host,
    ],
    "_sessions": [
        trio_sandbox.sessions.Session,
        trio_sandbox.sessions.Sessions,
    ],
}
#: Functions that open what is in a file.
OPENERS: Final[dict[str, list[Callable[..., object]]]] = {
    "_host": [trio_sandbox.open_host, trio_sandbox.open_sandbox],
    "_sessions": [trio_sandbox.sessions.open_sessions],
}
#: What each of them opens.
OPENED: Final = {"open_host": "Host", "open_sandbox": "Sandbox", "open_sessions": "Sessions"}
#: What a class is called in a door, where Trio's own name would say something else.
RENAMED: Final = {"HalfCloseableStream": "GuestConnection"}
#: What each class of a door stands for, by the name that it has there.
ORIGINALS: Final = {RENAMED.get(kind.__name__, kind.__name__): kind for kinds in FILES.values() for kind in kinds}
#: Each class of a door, and the file that it is in.
DOORS: Final = {RENAMED.get(kind.__name__, kind.__name__): name for name, kinds in FILES.items() for kind in kinds}
#: Methods that only compute with what they hold: any thread may call them.
PURE: Final = {"GuestPath": None, "Session": None, "Sandbox": {"path"}}
#: Methods for Trio's sake, or the library's own.
LEFT_OUT: Final = {"start", "wait_send_all_might_not_block"}
#: Names in annotations, and where they come from.
ORIGINS: Final[dict[str, str]] = {
    **dict.fromkeys(["Callable", "Iterable", "Iterator", "Mapping", "Sequence"], "collections.abc"),
    **dict.fromkeys(["AbstractContextManager", "AbstractAsyncContextManager"], "contextlib"),
    "PathLike": "os",
    "date": "datetime",
    "PurePosixPath": "pathlib",
    **dict.fromkeys(["Any", "Literal", "TypeAlias", "Unpack", "cast", "final", "overload"], "typing"),
    **dict.fromkeys(PUBLIC["trio_sandbox"].split(), ".."),
    **dict.fromkeys(["SessionEnd", "SessionsConfig", "SessionsStatistics"], "..sessions"),
    "Accelerator": "..qemu",
    **dict.fromkeys(["Functions", "Stderr"], "..client"),
    **dict.fromkeys(["BinaryMode", "ChangeKind", "OnConflict", "TextMode"], "..sandbox"),
    **dict.fromkeys(["plain", "plain_all", "start_service"], "..portal"),
    **dict.fromkeys(["AioDoor", "BlockingDoor", "open_beside", "open_root"], "._door"),
    "refuse": ".._refused",
    **{name: f".{file}" for name, file in DOORS.items()},
    "AnyGuestPath": "._paths",
}
MODULES: Final = ("os", "signal", "subprocess")

WIDTH: Final = 120


class Writer:
    """Writes the classes of one door."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.is_async = kind == "aio"
        self.door = "AioDoor" if self.is_async else "BlockingDoor"
        self.manager = "AbstractAsyncContextManager" if self.is_async else "AbstractContextManager"

    def doc(self, text: str | None, path: str) -> str:
        """Give the docstring of a method or property."""
        return doc(text, path, is_async=self.is_async)

    # --- Files ---

    def file(self, name: str) -> str:
        """Give the text of one file of the door."""
        parts: list[str] = []
        if name == "_paths":
            parts.append(
                '#: What may stand for a path in the guest.\nAnyGuestPath: TypeAlias = "str | PurePosixPath | GuestPath"'
            )
        parts += [self.class_(kind) for kind in FILES[name]]
        parts += [self.opener(function) for function in OPENERS.get(name, [])]
        body = "\n\n\n".join(parts) + "\n"
        gap = "\n" if body.startswith("@") else ""
        head = f'"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""\n\n{self.imports(name, body)}\n\n{gap}'
        return head + body

    def imports(self, file: str, body: str) -> str:
        """Give the import statements that *body* needs."""
        tree = ast.parse(body)
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | {
            node.target.id
            for node in tree.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if "cast" in used:
            used.add("Any")  # in the text of a type
        if "TypeAlias" in used:
            used.add("PurePosixPath")  # in the text of an alias
        origins: dict[str, set[str]] = {}
        for name in used & ORIGINS.keys() - defined:
            origins.setdefault(ORIGINS[name], set()).add(name)
        groups: list[list[str]] = [["from __future__ import annotations"], [], [], [], []]
        groups[1] += [f"import {name}" for name in MODULES if name in used]
        groups[2] += [f"import {name}" for name in ("trio",) if name in used]
        if "trio_sandbox" in used:
            groups[3].append(f"import {'trio_sandbox.sessions' if file == '_sessions' else 'trio_sandbox'}")
        for origin in sorted(origins, key=lambda origin: (not origin.startswith(".."), origin)):
            groups[4 if origin.startswith(".") else 1].append(
                import_line(origin, sorted(origins[origin], key=isort_key))
            )
        return "\n\n".join("\n".join(group) for group in groups if group)

    def opener(self, function: Callable[..., object]) -> str:
        """Give one of the functions that open something."""
        path = f"{function.__module__}.{function.__name__}"
        result = OPENED[function.__name__]
        parameters, arguments = self.parameters(inspect.signature(function), method=False)
        how = "open_root("
        if arguments[:1] == ["host"]:  # it lives where that does
            parameters[0], arguments[0] = "host: Host", "plain(host)"
            how = "open_beside(host, "
        head = signature(f"def {function.__name__}", parameters, f"{self.manager}[{result}]", "")
        inner = f"{how}lambda: {calling(path, arguments)}, {result})"
        return wrap(f"{head}\n{self.doc(function.__doc__, path)}\n    return {inner}")

    # --- Classes ---

    def class_(self, kind: type) -> str:
        """Give the class of the door that stands for *kind*."""
        name = RENAMED.get(kind.__name__, kind.__name__)
        inner = f"{kind.__module__}.{kind.__name__}"
        lines = ["@final", f"class {name}({self.door}[{inner}]):"]
        about = "A TCP connection to a server in the guest." if name == "GuestConnection" else kind.__doc__
        lines += [self.doc(about, inner), "", "    __slots__ = ()"]
        for member in self.members(kind, name):
            lines += ["", textwrap.indent(member, "    ")]
        return wrap("\n".join(lines))

    def members(self, kind: type, name: str) -> Iterator[str]:
        """Give the text of each method, property and attribute."""
        for attribute, annotation, text in attributes(kind):
            yield self.property_(attribute, annotation, text, f"self._inner.{attribute}")
        found: dict[str, tuple[object, type]] = {}
        for base in reversed(kind.__mro__):
            if base.__module__.startswith(("trio_sandbox", "trio.abc")):
                found |= {key: (value, base) for key, value in vars(base).items()}
        has_close = "close" in found
        for key, (value, base) in found.items():
            pure = name in PURE and (PURE[name] is None or key in (PURE[name] or ()))
            if key in LEFT_OUT or (key == "aclose" and has_close):
                continue
            if key == "__aenter__":
                yield self.enter(name, "close" if has_close else "aclose")
            elif key == "__anext__":
                assert inspect.isfunction(value)
                annotation = returns(kind.receive if base.__name__ == "ReceiveChannel" else value)  # type: ignore[attr-defined]
                yield self.next_(name, annotation)
            elif key in COMPARISONS and (name == "GuestPath" or key in ("__eq__", "__hash__")):
                if name in ("GuestPath", "FileChange"):
                    yield COMPARISONS[key]
            elif key == "__truediv__":
                yield "def __truediv__(self, other: AnyGuestPath) -> GuestPath:\n    return GuestPath(self._portal, self._inner / plain(other))"
            elif key.startswith("_"):
                continue
            elif isinstance(value, property):
                assert value.fget is not None
                read = f"self._inner.{key}"
                yield self.property_(
                    key, returns(value.fget), value.fget.__doc__, read if pure else f"self._now(lambda: {read})"
                )
            elif inspect.isfunction(value):
                room = "trio_sandbox" if kind.__module__ == "trio.abc" else kind.__module__
                refused = ", ".join(f'"{name}"' for name in getattr(value, "__refuses__", ()))
                refusing = f"@refuse({refused})\n" if refused else ""
                yield refusing + self.method(key, value, f"{room}.{kind.__name__}.{key}", pure=pure)

    def property_(self, name: str, annotation: str, text: str | None, read: str) -> str:
        """Give a property."""
        return f"@property\ndef {name}(self) -> {annotation}:\n{self.doc(text, '')}\n" + textwrap.indent(
            convert(annotation, read), "    "
        )

    def enter(self, name: str, close: str) -> str:
        """Give what makes an object its own context manager."""
        if self.is_async:
            waits = close == "aclose"
            call, why = (
                f"{'await ' * waits}self.{close}()",
                "" if waits else "  # noqa: ASYNC910 - as where it comes from",
            )
            return (
                f"async def __aenter__(self) -> {name}:\n    return self{why}\n\n"
                f"async def __aexit__(self, *_: object) -> None:\n    {call}"
            )
        return f"def __enter__(self) -> {name}:\n    return self\n\ndef __exit__(self, *_: object) -> None:\n    self.close()"

    def next_(self, name: str, annotation: str) -> str:
        """Give what makes an object an iterator."""
        call = "self._next(self._inner.__anext__)"
        if self.is_async:
            body = textwrap.indent(convert(annotation, f"await {call}"), "    ")
            return (
                f"def __aiter__(self) -> {name}:\n    return self\n\nasync def __anext__(self) -> {annotation}:\n{body}"
            )
        body = textwrap.indent(convert(annotation, call), "    ")
        return f"def __iter__(self) -> {name}:\n    return self\n\ndef __next__(self) -> {annotation}:\n{body}"

    def method(self, name: str, function: Callable[..., Any], path: str, *, pure: bool) -> str:
        """Give a method."""
        inner = inspect.unwrap(function)
        shape = inspect.signature(function)
        parameters, arguments = self.parameters(shape)
        annotation = str(shape.return_annotation)
        own = "close" if name == "aclose" and not self.is_async else name
        target = f"self._inner.{name}"
        overloads = typing.get_overloads(function)
        if overloads:
            target = f'cast("Any", self._inner).{name}'
        call = calling(target, arguments)
        deferred = target if not arguments else f"lambda: {call}"
        word = "async def" if self.is_async else "def"
        wait = "await " if self.is_async else ""
        status = shape.parameters.get("task_status")
        if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
            annotation = re.sub(r"^(Async)?Generator\[(.*)\]$", r"\2", annotation)
            how = "_block" if inspect.isasyncgenfunction(inner) else "_block_now"
            return before(
                parameters, self.block(f"def {own}", parameters, annotation, f"self.{how}({deferred}", function, path)
            )
        if status is not None and annotation == "None":
            annotation = re.sub(r"^trio\.TaskStatus\[(.*)\]$", r"\1", str(status.annotation))
            service = f"self._block(lambda: start_service({', '.join([target, *arguments])}, kind={annotation})"
            return self.block(f"def {own}", parameters, annotation, service, function, path)
        text = self.doc(function.__doc__, path)
        if not inspect.iscoroutinefunction(inner):
            body = convert(annotation, call if pure else f"self._now({deferred})")
            return signature(f"def {own}", parameters, annotation) + f"\n{text}\n" + textwrap.indent(body, "    ")
        body = convert(annotation, f"{wait}self._call({deferred})")
        heads = [
            "@overload\n"
            + signature(f"{word} {own}", self.parameters(inspect.signature(each))[0], returns(each))
            + " ..."
            for each in overloads
        ]
        whole = signature(f"{word} {own}", parameters, annotation) + f"\n{text}\n" + textwrap.indent(body, "    ")
        return before(parameters, "\n".join([*heads, whole]))

    def block(
        self, head: str, parameters: list[str], annotation: str, opening: str, function: Callable[..., Any], path: str
    ) -> str:
        """Give a method that opens a block."""
        many = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", annotation)
        if annotation in DOORS:
            how = annotation
        elif many:
            how = f"lambda portal, values: tuple({many[1]}(portal, each) for each in values)"
        else:
            how = "lambda _, value: value"
        text = self.doc(function.__doc__, path)
        return f"{signature(head, parameters, f'{self.manager}[{annotation}]')}\n{text}\n    return {opening}, {how})"

    def parameters(self, shape: inspect.Signature, *, method: bool = True) -> tuple[list[str], list[str]]:
        """Give parameters as a definition has them, and the arguments of the call that it passes them on by."""
        parameters: list[str] = []
        arguments: list[str] = []
        starred = False
        for parameter in shape.parameters.values():
            name, annotation = parameter.name, str(parameter.annotation)
            if name == "self":
                parameters.append(name)
                continue
            if name == "task_status":
                continue
            annotation = re.sub(r"\bFunctions\b", "Mapping[str, Callable[..., object]]", annotation)
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                parameters.append("*")
                starred = True
            passed = name
            if "GuestPath" in annotation:
                passed = (
                    f"plain_all({name})"
                    if "Sequence" in annotation or parameter.kind is parameter.VAR_POSITIONAL
                    else f"plain({name})"
                )
            elif annotation.partition(" ")[0] in DOORS:
                passed = f"plain({name})"
            elif name == "functions":
                passed = "called"
            if parameter.kind is parameter.VAR_KEYWORD:
                parameters.append(f"**{name}: {annotation}")
                arguments.append(f"**{name}")
            elif parameter.kind is parameter.VAR_POSITIONAL:
                starred = True
                parameters.append(f"*{name}: {annotation}")
                arguments.append(f"*{passed}")
            else:
                default = "" if parameter.default is parameter.empty else f" = {literal(name, parameter.default)}"
                parameters.append(f"{name}: {annotation}{default}")
                arguments.append(f"{name}={passed}" if parameter.kind is parameter.KEYWORD_ONLY else passed)
        if "self" in parameters and parameters[-1] == "*":
            parameters.pop()
        return parameters, arguments


def before(parameters: list[str], method: str) -> str:
    """Have functions made ready before the call that they go along with, by who calls."""
    if not any(parameter.startswith("functions:") for parameter in parameters):
        return method
    return re.sub(r"\n    return ", "\n    called = self._functions(functions)\n    return ", method, count=1)


COMPARISONS: Final = {
    "__eq__": "def __eq__(self, other: object) -> bool:\n    return bool(self._inner == plain(other))",
    "__hash__": "def __hash__(self) -> int:\n    return hash(self._inner)",
    "__lt__": "def __lt__(self, other: GuestPath) -> bool:\n    return bool(self._inner < plain(other))",
    "__str__": "def __str__(self) -> str:\n    return str(self._inner)",
}


def attributes(kind: type) -> Iterator[tuple[str, str, str]]:
    """Give the attributes of an object that are no properties: names, annotations and docstrings."""
    if kind.__module__ == "trio.abc":
        return
    tree = definition(kind)
    yield from documented(tree.body, {})
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            known = {a.arg: ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None}
            yield from documented(node.body, known)


def definition(kind: type) -> ast.ClassDef:
    """Find where a class is written: ours say that they are of the module that users import them from."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith("trio_sandbox.") and getattr(module, kind.__name__, None) is kind:
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                    return node
    raise LookupError(kind)


def documented(body: list[ast.stmt], known: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Give what is assigned and has a docstring; *known* has the types of values."""
    for node, after in itertools.pairwise(body):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name), annotation=annotated):
                annotation = ast.unparse(annotated)
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Name(id=value)):
                annotation = known[value]
            case _:
                continue
        match after:
            case ast.Expr(value=ast.Constant(value=str(text))) if not name.startswith("_"):
                yield name, annotation, text
            case _:
                pass


def returns(function: Callable[..., object]) -> str:
    """Give the annotation of what a function returns."""
    return str(inspect.signature(function).return_annotation)


def convert(annotation: str, expression: str) -> str:
    """Give the statements that return *expression* as what *annotation* says."""
    if annotation == "None":
        return expression
    if annotation == "trio.abc.HalfCloseableStream":
        annotation = "GuestConnection"
    if annotation in DOORS:
        return f"return {annotation}(self._portal, {expression})"
    optional = re.fullmatch(r"(\w+) \| None", annotation)
    if optional and optional[1] in DOORS:
        return f"inner = {expression}\nreturn None if inner is None else {optional[1]}(self._portal, inner)"
    many = re.fullmatch(r"(tuple|Iterator)\[(\w+)(, \.\.\.)?\]", annotation)
    if many and many[2] in DOORS:
        each = f"({many[2]}(self._portal, each) for each in {expression})"
        if many[1] == "tuple":
            return f"return tuple{each}"
        return f"found = {expression}\nreturn ({many[2]}(self._portal, each) for each in found)"
    if annotation == "GuestFile | GuestTextFile":
        return (
            f"file: object = {expression}\n"
            "if isinstance(file, trio_sandbox.GuestFile):\n    return GuestFile(self._portal, file)\n"
            "assert isinstance(file, trio_sandbox.GuestTextFile)\n"
            "return GuestTextFile(self._portal, file)"
        )
    return f"return {expression}"


def calling(target: str, arguments: list[str]) -> str:
    """Give a call."""
    return f"{target}({', '.join(arguments)})"


def signature(head: str, parameters: list[str], annotation: str, indent: str = "    ") -> str:
    """Give the head of a definition, on one line if it fits."""
    if annotation == "trio.abc.HalfCloseableStream":
        annotation = "GuestConnection"
    line = f"{head}({', '.join(parameters)}) -> {annotation}:"
    if len(indent + line) <= WIDTH:
        return line
    return f"{head}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f") -> {annotation}:"


def literal(name: str, value: object) -> str:
    """Give a default value as a program says it."""
    text = f"0o{value:o}" if name == "mode" and isinstance(value, int) else repr(value)
    assert value is None or isinstance(value, (str, bytes, int, float, tuple)), text
    return f'"{value}"' if isinstance(value, str) else text.replace("'", '"')


def doc(text: str | None, path: str, *, is_async: bool, indent: str = "    ") -> str:
    """Give the first paragraph of a docstring, and where to read more."""
    assert text is not None
    first = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    if not is_async:
        first = first.replace("an async iterator", "an iterator")
    first = re.sub(r": ``[^`]*\b(async|await)\b.*", ".", first)  # an example for Trio
    start = 'r"""' if "\\" in text else '"""'
    if not path or path.startswith("trio.abc") or "\n\n" not in inspect.cleandoc(text):
        return f'{indent}{start}{first}"""'
    return f'{indent}{start}{first}\n\n{indent}See `{path}`.\n{indent}"""'


def wrap(text: str) -> str:
    """Break lines that are too long, as a formatter does; docstrings and heads of definitions are left alone."""
    lines: list[str] = []
    for line in text.splitlines():
        code = line.lstrip()
        is_code = code.startswith(("return ", "self.", "await ", "file: "))
        lines += broken(line[: -len(code)], code) if is_code and len(line) > WIDTH else [line]
    return "\n".join(lines)


def broken(indent: str, code: str) -> list[str]:
    """Break a line at its last pair of parentheses that reaches to its end."""
    comma = "," if code.endswith(",") else ""
    code = code.removesuffix(",")
    depth, start = 0, len(code) - 1
    for start in range(len(code) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(code[start], 0)
        if depth == 0:
            break
    content, deeper = code[start + 1 : -1], indent + "    "
    inner = [deeper + content]
    if len(inner[0]) > WIDTH:
        parts = split(content)
        if len(parts) == 1:
            inner = broken(deeper, content)
        else:
            inner = [
                line
                for part in parts
                for line in ([f"{deeper}{part},"] if len(deeper + part) < WIDTH else broken(deeper, f"{part},"))
            ]
    return [indent + code[: start + 1], *inner, f"{indent}){comma}"]


def split(content: str) -> list[str]:
    """Split arguments at their commas."""
    parts, depth = [""], 0
    for character in content:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    # The comma of a lambda's parameters is none between arguments.
    return [", ".join(parts[-2:])] if parts[-2:-1] == ["lambda portal"] or parts[-2:-1] == ["lambda _"] else parts


def isort_key(name: str) -> tuple[int, str]:
    """Order names as ruff does: constants, classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def import_line(origin: str, names: list[str]) -> str:
    """Give one import statement."""
    line = f"from {origin} import {', '.join(names)}"
    return (
        line if len(line) <= WIDTH else f"from {origin} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
    )


def files() -> Iterator[tuple[Path, str]]:
    """Give each generated file and its text."""
    kinds: tuple[Kind, ...] = ("blocking", "aio")
    for kind in kinds:
        for name in FILES:
            yield PACKAGE / kind / f"{name}.py", Writer(kind).file(name)


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text, "utf-8")
