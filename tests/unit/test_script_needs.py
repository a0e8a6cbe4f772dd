"""Scripts that say what they need (PEP 723), and on which Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_sandbox import Image
from trio_sandbox._requirements import ScriptNeeds, allows, read_script
from trio_sandbox.cli._parser import build_parser
from trio_sandbox.cli._program import find_program
from trio_sandbox.image import image_for_script

SCRIPT = """#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "rich>=13",  # for colours
#
#   "idna",
# ]
# [tool.uv]
# exclude-newer = "2026-11-01"
# ///
# a comment
import rich
"""
NEEDS = ScriptNeeds(("rich>=13", "idna"), ">=3.11", "2026-11-01")


@pytest.mark.parametrize("text", [SCRIPT, SCRIPT.replace("\n", "\r\n"), SCRIPT.partition("# a comment")[0]])
def test_the_block_is_read(text: str) -> None:
    assert read_script(text) == NEEDS


@pytest.mark.parametrize("text", ["", "import rich\n", " # /// script\n", "# /// other\n# x = 1\n# ///\n"])
def test_a_script_without_a_block_needs_nothing(text: str) -> None:
    assert read_script(text) == ScriptNeeds()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# /// script\n# dependencies = []\n", "has no end, '# ///'"),
        ("# /// script\n# dependencies = []\nx = 1\n# ///\n", "has no end"),
        # The last end of the comment counts.
        ("# /// script\n# dependencies = ['''\n# ///\n# ''']\n# ///\n", "a requirement must be one line"),
        (SCRIPT + SCRIPT, "has two blocks"),
        ("# /// script\n# dependencies = 1\n# ///\n", "dependencies is no list of texts"),
        ("# /// script\n# dependencies = ['-e .']\n# ///\n", "is an option"),
        ("# /// script\n# requires-python = 3\n# ///\n", "requires-python is no text"),
        ("# /// script\n# tool = 1\n# ///\n", "# /// script"),
        ("# /// script\n# [\n# ///\n", "# /// script"),
    ],
)
def test_a_block_that_can_not_be_read(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_script(text)


@pytest.mark.parametrize(
    "specifier",
    (">=3.11|>= 3.13|>3.12|<4|<3.14|<=3.13|==3.13.*|~=3.12|~=3.13.2|!=3.12|!=3.13.1|>=3.9,<4|<3.13.9|==3.*").split("|"),
)
def test_these_allow_python_3_13(specifier: str) -> None:
    assert allows(specifier, "3.13")


@pytest.mark.parametrize(
    "specifier", ">=3.14|>3.13.99,<3.13|<3.13|<=3.12|==3.12.*|~=3.12.1|~=4.0|!=3.13.*|>=3.9,<3.13|==2.*".split("|")
)
def test_these_do_not(specifier: str) -> None:
    assert not allows(specifier, "3.13")


@pytest.mark.parametrize("specifier", ["", "3.13", ">=", ">=x", ">=3.9;", "=>3.9"])
def test_what_says_nothing_of_python(specifier: str) -> None:
    with pytest.raises(ValueError, match="requires-python is"):
        allows(specifier, "3.13")


def test_the_image_is_what_the_script_needs() -> None:
    wanted = Image("python").packages("rich>=13", "idna", exclude_newer="2026-11-01")
    assert image_for_script("python", SCRIPT) == wanted
    base = Image("python").env({"A": "b"})
    assert image_for_script(base, SCRIPT) == Image("python", steps=(*base.steps, *wanted.steps))
    assert image_for_script("python", "import os") == "python"
    assert image_for_script("python", more=["tqdm"]) == Image("python").packages("tqdm")
    with pytest.raises(ValueError, match=r"the script requires Python >=3\.14, and the image 'python' has 3\.13"):
        image_for_script("python", SCRIPT.replace(">=3.11", ">=3.14"))


def test_the_command_line_honours_the_block(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    options = build_parser().parse_args(["run", "--with", "tqdm", "--with", "numpy<3", str(file), "--with", "x"])
    assert options.packages == ["tqdm", "numpy<3"]
    program = find_program(code=None, words=options.words, packages=options.packages)
    packages = ("rich>=13", "idna", "tqdm", "numpy<3")
    assert program.image == Image("python").packages(*packages, exclude_newer="2026-11-01")
    assert find_program(code="1", words=[], packages=["tqdm"]).image == Image("python").packages("tqdm")
    given = find_program(code=None, words=["-"], read_stdin=SCRIPT.encode, language="python")
    assert given.image == image_for_script("python", SCRIPT)
    there = find_program(code="1", language="javascript", words=[], packages=["zod@3"])
    assert there.image == Image("node").npm("zod@3")
    # A language without packages: those of what the image is for.
    assert find_program(code="1", language="shell", words=[], packages=["x"]).image == Image("python").packages("x")
    in_node = find_program(code="1", language="shell", image="node", words=[], packages=["x"])
    assert in_node.image == Image("node").npm("x")
    assert find_program(code="1", language="python", image="node", words=[], packages=["x"]).image == Image(
        "node"
    ).packages("x")
    with pytest.raises(ValueError, match="is an option, not a requirement"):
        find_program(code="1", words=[], packages=["-r x"])
