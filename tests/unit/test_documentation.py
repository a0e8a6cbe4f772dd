"""What the README and the documentation say can be typed."""

from __future__ import annotations

import ast
import builtins
import json
import re
import shlex
import tomllib

import pytest

from tests.documented import ROOT, Block, blocks
from tests.unit.test_exports import PUBLIC
from trio_sandbox.cli import build_parser
from trio_sandbox.fleet._demand import SLOTS

#: Types of news fragments, and what a fragment's file is called.
FRAGMENT = re.compile(r"(\d+|\+[\w-]+)\.(?P<type>\w+)\.md")


def commands() -> list[str]:
    """Give the command lines behind the prompts of all `console` blocks."""
    found: list[str] = []
    for block in blocks("console"):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                found += [part.strip() for part in line.removeprefix("$ ").split("&&")]
    return found


def sessions() -> set[str]:
    """Give the names of nox's sessions."""
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).partition("(")[0] == "nox.session" for decorator in node.decorator_list)
    }


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_documented_command_can_be_typed(command: str) -> None:
    words = shlex.split(re.split(" [<>] ", command)[0])
    match words:
        case ["trio-sandbox", *arguments]:
            build_parser().parse_args(arguments)  # SystemExit if it can't
        case ["python3", "bootstrap.py", session, *_] | [".v/bin/nox", "-s", session, *_]:
            assert session in sessions()
        case ["python3", "-m", "venv", ".v"] | [".v/bin/pip", "install", "nox"]:
            pass
        case ["ray", "start", ("--head" | "--address"), *_, "--resources", resources]:
            assert set(json.loads(resources)) == {SLOTS}
        case _:
            pytest.fail(f"no rule says how to check {command!r}")


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 10
    assert {"hello", "tests", "lint", "typing", "docs", "bench", "soak"} <= sessions()


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    readme = [line for block in blocks("console") if block.page.name == "README.md" for line in block.text.splitlines()]
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    did = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert did == ["python3 bootstrap.py tests"]
    assert f"$ {did[0]}" in readme


def test_links_of_the_readme_lead_to_files_and_headings() -> None:
    """Sphinx does not build the README; those of the other pages are checked where it has."""
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\((?!https://)([^)#]+)(?:#([^)]+))?\)", text)
    assert len(links) > 20
    for target, fragment in links:
        assert (ROOT / target).is_file(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert fragment in anchors, f"{target}#{fragment}"


def test_every_guide_leads_to_other_pages() -> None:
    for page in (ROOT / "docs" / "howto").glob("*.md"):
        if page.name != "index.md":
            links = re.findall(r"\]\((?!https?://)([^)#]+\.md)", page.read_text("utf-8"))
            assert links, page.name
            assert all((page.parent / link).is_file() for link in links), page.name


def test_every_public_name_is_in_the_reference_once() -> None:
    directives = re.compile(r"^\.\. auto(?:class|function|exception):: trio_sandbox\.(\w+)(?:\(\))?$", re.MULTILINE)
    pages = (ROOT / "docs" / "reference").glob("*.md")
    documented = [name for page in pages for name in directives.findall(page.read_text("utf-8"))]
    assert sorted(documented) == sorted(PUBLIC["trio_sandbox"].split())


#: What examples take for granted, as the pages say: an open host and an open sandbox.
GIVEN = {"host", "sandbox"}


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in blocks("python")])
def test_python_blocks_can_be_pasted(block: Block) -> None:
    """Every name in an example is imported or made in that example."""
    made = GIVEN | set(dir(builtins))
    used: set[str] = set()
    for node in ast.walk(ast.parse(block.text)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                made.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                made.add(name)
            case ast.alias(name=name, asname=alias):
                made.add(alias or name.split(".")[0])
            case _:
                pass
    assert sorted(used - made) == []


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in blocks("python")])
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_expected_output_is_read_from_comments() -> None:
    text = "# not this\nprint(1)  # 1\nx = 2  # nor this\nif x:\n    print('a # b')  # a # b\nprint(3)\n# 3\n# 4\n"
    assert Block(ROOT / "x.md", 1, "python", text).expected_output() == "1\na # b\n3\n4\n"
    assert Block(ROOT / "x.md", 1, "python", "x = 2  # nothing\n").expected_output() is None


def test_news_fragments_have_names_that_towncrier_reads() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["towncrier"]
    types = {entry["directory"] for entry in configuration["type"]}
    for path in (ROOT / "newsfragments").iterdir():
        if path.name not in ("README.md", "template.md.jinja"):
            match = FRAGMENT.fullmatch(path.name)
            assert match is not None, path.name
            assert match["type"] in types
