"""What an import brings along: names of `trio_sandbox` are imported when they are asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trio_sandbox
from tests.unit.test_exports import PUBLIC
from trio_sandbox._metadata import ORIGINS, PUBLIC as BY_MODULE, ROOMS
from trio_sandbox.cli import build_parser
from trio_sandbox.cli._completion import all_parsers

ROOT = Path(trio_sandbox.__file__).parents[1]

#: What takes time to import, and is of no use to a program that opens nothing.
HEAVY = {"trio", "asyncio", "ssl", "rich", "importlib.metadata"}


def loaded_by(statements: str) -> set[str]:
    """Give the modules that are there after *statements* and were not before, in a process of their own."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n{statements}\n"
        "print(*set(sys.modules) - before, file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_the_package_alone_brings_nothing_along() -> None:
    ours = {name for name in loaded_by("import trio_sandbox") if name.startswith("trio_sandbox")}
    assert ours == {"trio_sandbox", "trio_sandbox._metadata"}


@pytest.mark.parametrize(
    "statements",
    [
        "import trio_sandbox",
        "from trio_sandbox import SandboxError",
        "from trio_sandbox.constants import BOOT_TIMEOUT",
    ],
)
def test_what_is_small_brings_no_trio_along(statements: str) -> None:
    assert loaded_by(statements) & HEAVY == set()


@pytest.mark.parametrize("arguments", ["--help", "run --help", "bench --help", "--no-such-option"])
def test_help_brings_nothing_along_that_runs_machines(arguments: str) -> None:
    loaded = loaded_by(
        "import contextlib, io\nfrom trio_sandbox.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), "
        "contextlib.redirect_stderr(io.StringIO()):\n"
        f"    main({arguments.split()!r})"
    )
    assert "trio_sandbox.cli._parser" in loaded
    assert loaded & HEAVY == set()
    layers = {name.split(".")[1] for name in loaded if name.startswith("trio_sandbox.")}
    assert layers <= {"cli", "constants", "_metadata", "_quote"}


def test_no_commands_help_takes_time() -> None:
    commands = [parser.prog.split()[1:] for parser in all_parsers(build_parser())]
    assert ["image", "list"] in commands
    loaded = loaded_by(
        "import contextlib, io\nfrom trio_sandbox.cli import main\n"
        f"for command in {commands!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*command, '--help'])"
    )
    assert loaded & (HEAVY | {"attr", "attrs", "json", "inspect", "shtab"}) == set()
    modules = {name.removeprefix("trio_sandbox.cli.") for name in loaded if name.startswith("trio_sandbox.cli.")}
    described = {"_arguments", "_command_parser", "_descriptors", "_examples", "_main", "_options", "_parser"}
    assert modules <= {*described, "_report", "_status"}


def test_one_name_does_not_bring_other_doors_along() -> None:
    loaded = loaded_by("from trio_sandbox import open_sandbox")
    layers = {name.split(".")[1] for name in loaded if name.startswith("trio_sandbox.")}
    assert "sandbox" in layers
    assert layers & {"aio", "blocking", "portal", "testing", "bench", "cli"} == set()


def test_what_is_imported_late_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(trio_sandbox.__file__).read_text("utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {(module, name) for module, names in BY_MODULE.items() for name in names}
    assert ORIGINS.keys() == set(PUBLIC["trio_sandbox"].split())


def test_every_name_can_be_listed_and_imported_with_the_others() -> None:
    assert set(dir(trio_sandbox)) >= {*ORIGINS, *ROOMS, "__version__"}
    names: dict[str, object] = {}
    exec("from trio_sandbox import *", names)
    assert names.keys() >= ORIGINS.keys()


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'trio_sandbox' has no attribute 'nothing'"):
        getattr(trio_sandbox, "nothing")  # noqa: B009 - type checkers know that it is not there


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_need_no_import_of_their_own(room: str) -> None:
    assert f"trio_sandbox.{room}" in loaded_by(f"import trio_sandbox\ntrio_sandbox.{room}")
