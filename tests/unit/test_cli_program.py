"""Which interpreter `trio-sandbox run` starts, decided by names and first lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_sandbox.cli._copies import Download, Upload
from trio_sandbox.cli._program import find_program


@pytest.mark.parametrize(
    ("name", "content", "language", "image"),
    [
        ("a.py", "", "python", "python"),
        ("a.PY", "", "python", "python"),
        ("a.js", "", "javascript", "node"),
        ("a.mjs", "", "javascript", "node"),
        ("a.cjs", "", "javascript", "node"),
        ("a.sh", "", "shell", "python"),
        ("a.bash", "", "shell", "python"),
        ("a.js", "#!/bin/sh", "javascript", "node"),  # the name is what its author gave it
        ("a", "", "python", "python"),
        ("a.txt", "print(1)", "python", "python"),
        ("a", "#!/usr/bin/env python3\n", "python", "python"),
        ("a", "#!/usr/bin/python3.11 -I\r\n", "python", "python"),
        ("a", "#!/usr/bin/env -S node --no-warnings\n", "javascript", "node"),
        ("a", "#! /usr/bin/env A=b nodejs\n", "javascript", "node"),
        ("a", "#!/bin/sh -e\n", "shell", "python"),
        ("a", "#!/bin/bash", "shell", "python"),
    ],
)
def test_the_language_of_a_file(name: str, content: str, language: str, image: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    program = find_program(code=None, words=[str(file)])
    assert (program.language, program.image) == (language, image)
    assert find_program(code=None, words=[str(file)], language="shell").argv == ("bash", name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ts", "let a: number = 1", "TypeScript"),
        ("a", "#!/usr/bin/perl\n1", r"'#!/usr/bin/perl'.*--language"),
        ("a", "#!\n1", r"'#!'.*--language"),
    ],
)
def test_files_of_no_language_of_ours(name: str, content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        find_program(code=None, words=[str(file)])


@pytest.mark.parametrize(
    ("language", "image", "found"),
    [
        (None, None, ("python", "python")),
        ("shell", None, ("shell", "python")),
        ("javascript", None, ("javascript", "node")),
        (None, "node", ("javascript", "node")),
        ("shell", "node", ("shell", "node")),
        (None, "unheard-of", ("python", "unheard-of")),  # the host says what there is
    ],
)
def test_language_and_image_of_code(language: str | None, image: str | None, found: tuple[str, str]) -> None:
    program = find_program(code="1", words=[], language=language, image=image)
    assert (program.language, program.image) == found


def test_standard_input_of_python_alone_is_read_before_the_start() -> None:
    assert find_program(code=None, words=[], read_stdin=lambda: b"1").stdin == b"1"
    assert find_program(code=None, words=["-", "a"], read_stdin=lambda: b"1").argv == ("python3", "-u", "-", "a")
    for language, argv in (("shell", ("bash", "-s", "--", "a")), ("javascript", ("node", "-", "a"))):
        program = find_program(code=None, words=["-", "a"], language=language)
        assert (program.argv, program.stdin) == (argv, None)


def test_a_file_in_an_uploaded_directory_is_run_there(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "main.py"
    file.write_text("1")
    (tmp_path / "link.py").symlink_to(file)
    for upload, name in ((tmp_path, "there/src/main.py"), (file, "there"), (tmp_path / "src", "there/main.py")):
        program = find_program(code=None, words=[str(file)], uploads=[Upload(upload, "there")])
        assert (program.argv[-1], program.name) == (name, None)
    program = find_program(code=None, words=[str(tmp_path / "link.py")])
    assert (program.argv[-1], program.name, program.content) == ("link.py", "link.py", b"1")


def test_what_is_downloaded_has_its_own_name_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for local, target in (("", "name"), ("other", "other"), ("file", "file")):
        assert Download("/a/name/", tmp_path / local).resolve().local == tmp_path / target
    for local in ("none/x", "file/x"):
        with pytest.raises(OSError, match="there is no directory"):
            Download("name", tmp_path / local).resolve()
