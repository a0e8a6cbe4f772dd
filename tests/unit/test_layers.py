"""The layers import in one direction, and through each other's front doors."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_sandbox

PACKAGE = Path(trio_sandbox.__file__).parent

#: Modules directly in `trio_sandbox` that everything but `wire` and `guest` may use.
BASE = (
    "_cgroups",
    "_checks",
    "_config",
    "_display",
    "_entries",
    "_errors",
    "_forked",
    "_image",
    "_image_steps",
    "_stored_json",
    "_metadata",
    "_network",
    "_notebook",
    "_nurseries",
    "_observe",
    "_oci_reference",
    "_otel",
    "_private",
    "_programs",
    "_quote",
    "_quiet_log",
    "_rate",
    "_refused",
    "_requirements",
    "_results",
    "_secrets",
    "_workspace_change",
    "constants",
)

#: What each layer may import of the others, itself aside. Inside a guest there are only `wire` and `guest`.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "wire": set(),
    "guest": {"wire"},
    "qemu": {"base", "wire"},
    "image": {"base", "qemu"},
    "client": {"base", "wire", "qemu", "image"},
    "network": {"base", "wire"},
    "machines": {"base", "wire", "qemu", "image", "client", "network"},
    "sandbox": {"base", "wire", "qemu", "image", "client", "network", "machines"},
    "host": {"base", "qemu", "image", "client", "network", "machines", "sandbox"},
    "sessions": {"base", "machines", "sandbox"},
    "testing": {"base", "wire", "qemu", "image", "client", "network", "machines", "sandbox"},
    # Other doors to the same house: nothing below imports them.
    "portal": {"base"},
    "blocking": {"base", "qemu", "client", "sandbox", "sessions", "portal", "top"},
    "aio": {"base", "qemu", "client", "sandbox", "sessions", "portal", "top"},
    "integrations": {"base", "sessions", "aio", "blocking", "top"},
    "fleet": {"base", "wire", "qemu", "image", "client", "network", "machines", "sandbox", "host"},
    "bench": {"base", "qemu", "image", "client", "machines", "sandbox", "host", "top"},
    "cli": {
        "base",
        "wire",
        "qemu",
        "image",
        "client",
        "network",
        "machines",
        "host",
        "bench",
        "integrations",
        "fleet",
        "top",
    },
    "top": {"base", "wire", "qemu", "image", "client", "network", "machines", "sandbox", "host", "testing", "cli"},
}

#: Modules of the guest that the host's side uses as well: what both do alike is written once.
BOTH_SIDES = {"guest.changes", "guest.trees"}

#: Third-party modules that each layer may import. What comes with Trio is in the guest as well.
THIRD_PARTY: dict[str, set[str]] = {
    "base": {"attrs", "idna", "opentelemetry", "outcome", "trio"},
    "wire": {"outcome", "trio"},
    "guest": {"outcome", "trio"},
    "qemu": {"attrs", "outcome", "trio"},
    "image": {"attrs", "trio", "uv"},
    "client": {"attrs", "trio"},
    "network": {"attrs", "cryptography", "h11", "trio"},
    "machines": {"attrs", "outcome", "trio"},
    "sandbox": {"attrs", "outcome", "trio"},
    "host": {"attrs", "trio"},
    "sessions": {"attrs", "trio"},
    "testing": {"attrs", "outcome", "trio"},
    "portal": {"outcome", "trio"},
    "blocking": {"trio"},
    "aio": {"trio"},
    "integrations": {
        "anyio",
        "attrs",
        "deepagents",
        "hypercorn",
        "inspect_ai",
        "mcp",
        "pydantic",
        "pydantic_ai",
        "trio",
    },
    "fleet": {"attrs", "cryptography", "ray", "trio"},
    "bench": {"attrs", "trio"},
    "cli": {"attrs", "rich", "shtab", "trio"},
    "top": {"trio"},
}

#: The folders of `guest`, each for one process, and what of the others they may import: the agent starts all others.
GUEST_ROOMS: dict[str, set[str]] = {
    "agent": {"spawner", "helpers"},
    "spawner": {"helpers"},  # its forks become helpers
    "helpers": set(),
    "interpreters": set(),
}

#: Modules and folders that run where there is nothing but the standard library.
STANDARD_LIBRARY_ONLY = {
    "_programs",  # noxfile.py runs it before anything is installed
    "guest.changes",
    "guest.messages",
    "guest.process_status",
    "guest.trees",
    # Forks, and must have no Trio in it when it does.
    "guest.spawner",
    "guest.helpers",
    # Their text is run by the image's interpreters.
    "guest.interpreters",
    "image.in_guest",
    "qemu._reaper_main",  # runs with -I -S
}


def layer_of(module: str) -> str:
    """Give the layer of a module, its name relative to `trio_sandbox` (the package itself: "")."""
    first = module.partition(".")[0]
    if first in BASE:
        return "base"
    return first if first in MAY_IMPORT else "top"


def needs_standard_library_only(module: str) -> bool:
    """Tell whether a module, or what is imported of it, is one of `STANDARD_LIBRARY_ONLY`."""
    return any(module == name or module.startswith(f"{name}.") for name in STANDARD_LIBRARY_ONLY)


def guest_room(module: str) -> str | None:
    """Give the folder of `guest` that a module is in, if it is in one."""
    layer, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if layer == "guest" and room in GUEST_ROOMS else None


def may_enter(module: str, target: str) -> bool:
    """Tell whether *module* may import *target*, as far as the folders of `guest` are concerned."""
    ours, theirs = guest_room(module), guest_room(target)
    return theirs is None or theirs == ours or (ours is not None and theirs in GUEST_ROOMS[ours])


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Give the absolute name of whatever the module imports, wherever in it and for whatever purpose.

    ``from a import b`` gives ``a.b``: whether `b` is a module can't be told from here.
    """
    package = ["trio_sandbox", *filter(None, module.split("."))]
    if not is_package:
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def problems(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Say what is wrong with the imports of one module."""
    found: list[str] = []
    layer = layer_of(module)
    for name in imports(source, module, is_package=is_package):
        first, _, rest = name.partition(".")
        if first != "trio_sandbox":
            if first not in sys.stdlib_module_names and first not in THIRD_PARTY[layer]:
                found.append(f"{module} imports {name}, which {layer} may not")
            elif needs_standard_library_only(module) and first not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}, and may import the standard library only")
            continue
        target = layer_of(rest)
        if needs_standard_library_only(module) and not needs_standard_library_only(rest):
            found.append(f"{module} imports {name}, and may import the standard library only")
        elif not may_enter(module, rest):
            found.append(f"{module} imports {name}: that runs in another process")
        elif layer in ("image", "sandbox", "fleet") and rest.rpartition(".")[0] in BOTH_SIDES:
            continue
        elif target != layer and target not in MAY_IMPORT[layer]:
            found.append(f"{module} imports {name}: {layer} may not import {target}")
        elif target not in (layer, "base", "top") and any(part.startswith("_") for part in rest.split(".")[1:]):
            found.append(f"{module} imports {name} past the front door of {target}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Give all of our modules, with their names relative to `trio_sandbox`."""
    names: list[tuple[str, Path]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append((".".join(part for part in parts if part != "__init__"), path))
    return names


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0] or "trio_sandbox") for item in modules()])
def test_imports_keep_to_the_layers(module: str, path: Path) -> None:
    assert problems(path.read_text("utf-8"), module, is_package=path.name == "__init__.py") == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Not even for types: what two files need of each other has a name of its own, below both."""
    files = dict(modules())
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports(path.read_text("utf-8"), module, is_package=path.name == "__init__.py"):
            if name.startswith("trio_sandbox."):
                target = name.removeprefix("trio_sandbox.")
                graph[module].add(target if target in files else target.rpartition(".")[0])
        graph[module].discard(module)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def test_every_package_is_a_layer() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= MAY_IMPORT.keys()
    assert {"wire", "guest", "qemu", "image", "client", "machines", "sandbox", "cli"} <= packages
    assert {path.parent.name for path in PACKAGE.glob("guest/*/__init__.py")} == GUEST_ROOMS.keys()


def test_the_modules_with_rules_of_their_own_exist() -> None:
    names = {name for name, _ in modules()}
    assert names >= STANDARD_LIBRARY_ONLY
    assert set(BASE) <= names


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("wire._channel", "from .._errors import SandboxError", "wire may not import base"),
        ("guest.agent.run", "from ...sandbox import Sandbox", "guest may not import sandbox"),
        ("guest.agent.run", "import trio_sandbox.qemu", "guest may not import qemu"),
        ("qemu._vm", "from ..image import BuiltImage", "qemu may not import image"),
        ("qemu._vm", "def f():\n    from ..host import Host", "qemu may not import host"),
        ("machines._warm", "from ..sandbox import Sandbox", "machines may not import sandbox"),
        ("client._run", "from ..machines import Launcher", "client may not import machines"),
        ("sandbox._path", "from ..qemu._vm import Vm", "past the front door of qemu"),
        ("sandbox._path", "from ..guest.agent import init", "that runs in another process"),
        ("host", "import numpy", "imports numpy"),
        ("wire._framing", "import attrs", "imports attrs"),
        ("_programs", "import attrs", "the standard library only"),
        ("guest.spawner.users", "from ...wire import Channel", "the standard library only"),
        ("guest.spawner.users", "from ..agent import run", "the standard library only"),
        ("guest.interpreters.python_worker", "import trio", "the standard library only"),
        ("guest.helpers.porter", "from ..spawner import users", "that runs in another process"),
        ("guest.messages", "from .spawner import users", "that runs in another process"),
        ("_config", "from .qemu import Vm", "base may not import qemu"),
    ],
)
def test_violations_are_found(module: str, source: str, problem: str) -> None:
    (found,) = problems(source, module)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("guest.agent.code", "import trio\nfrom ...wire import Channel\nfrom .processes import run"),
        ("guest.spawner.becoming", "import os\nfrom ..helpers import porter\nfrom ..messages import send_message"),
        ("sandbox._path", "from .. import constants\nfrom .._errors import SandboxError\nfrom ..qemu import Vm"),
        ("sandbox._files", "from ..guest.trees import record"),
        ("client._process", "import os.path\nfrom ._run import RunEvents"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert problems(source, module) == []
