"""What interpreters of container images say of themselves: what is made of it, and what is not believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from trio_sandbox import PackagesError
from trio_sandbox.image._choices import NODE, PYTHON, choice_name, is_choice
from trio_sandbox.image._interpreters import (
    find_answer,
    in_guest_program,
    is_version,
    missing_interpreter,
    node_question,
    parse_node,
    parse_python,
    python_question,
    same_version,
)
from trio_sandbox.image._pylock import Pin
from trio_sandbox.image._recipe import digest_of
from trio_sandbox.image._target import Target
from trio_sandbox.image.in_guest import python_place

ANSWER: dict[str, object] = {
    "implementation": "cpython",
    "version": "3.12",
    "wide": True,
    "threaded": False,
    "libc": ["glibc", "2.36"],
    "interpreter": "/usr/local/bin/python3",
    "site": "/usr/local/lib/python3.12/site-packages",
    "scripts": "/usr/local/bin",
    "prefix": "/usr/local",
    "looked_for": True,
    "installed": [["Pip", "24.0"], ["ruamel.yaml", "0.18"], ["-x-", "1"]],
}
NODE_ANSWER = {"interpreter": "/usr/bin/node", "version": "22.1.0", "architecture": "x64", "libc": "musl"}


def python(**changes: object) -> str:
    return json.dumps({**ANSWER, **changes})


def test_packages_are_for_what_it_says_it_is() -> None:
    found = parse_python(python())
    assert found.installed == (Pin("pip", "24.0"), Pin("ruamel-yaml", "0.18"))
    assert found.target("x") == Target(
        "3.12",
        "x86_64-manylinux_2_36",
        "usr/local/lib/python3.12/site-packages",
        "usr/local/bin",
        "usr/local",
        "/usr/local/bin/python3",
        container=True,
    )
    assert parse_python(found.text) == found


@pytest.mark.parametrize(
    ("libc", "platform"),
    [
        (["glibc", "2.41"], "x86_64-manylinux_2_40"),
        (["glibc", "2.17"], "x86_64-manylinux_2_17"),
        (["musl", "1.2.5"], "x86_64-unknown-linux-musl"),
        (["musl", "1.2.3-git-1"], "x86_64-unknown-linux-musl"),
    ],
)
def test_wheels_are_for_its_c_library(libc: list[str], platform: str) -> None:
    assert parse_python(python(libc=libc)).target("x").platform == platform


@pytest.mark.parametrize(
    ("libc", "words"),
    [
        (["glibc", "2.12"], r"glibc 2\.12"),
        (["musl", "1.1.24"], r"musl 1\.1\.24"),
        (["", ""], "neither glibc nor musl"),
        (["musl", "?"], r"musl \?"),
    ],
)
def test_there_are_no_wheels_for_every_c_library(libc: list[str], words: str) -> None:
    with pytest.raises(PackagesError, match=rf"'docker://x:1': there are none for its .*{words}"):
        parse_python(python(libc=libc)).target("docker://x:1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"implementation": "pypy"},
            r"it is pypy, and wheels are chosen for CPython .* Its own pip can do it: \.script",
        ),
        ({"threaded": True}, "it is threads without a lock"),
        ({"wide": False}, "it is 32 bits"),
        ({"looked_for": False}, "does not look for them"),
        ({"version": "3.12; import os"}, "can't be one"),
        ({"site": "usr/lib"}, "its site is 'usr/lib'"),
        ({"site": "/usr/../etc"}, "its site"),
        ({"site": "/run/x"}, "which is on no disk"),
        ({"site": "/usr//lib"}, "its site"),
        ({"prefix": "/a\nb"}, "its prefix"),
        ({"scripts": '/a"b'}, "its scripts"),
        ({"interpreter": "/$HOME/python"}, "its interpreter"),
        ({"interpreter": ""}, "its interpreter"),
        ({"interpreter": "/" + "a/" * 600 + "b"}, "its interpreter"),
        ({"site": "/usr/local/bin"}, "its modules are in '/usr/local/bin', and other files in '/usr/local/bin'"),
        ({"site": "/usr/local/share/python"}, "its modules are in"),
        ({"site": "/usr/local", "scripts": "/usr/local/bin"}, "its modules are in"),
        ({"libc": "glibc"}, "a list of 2 texts"),
        ({"libc": ["a" * 300, ""]}, "a list of 2 texts"),
        ({"installed": {}}, "its list of packages"),
        ({"installed": [["a", "1"]] * 5001}, "too long"),
        ({"installed": [["a", 1]]}, "a list of 2 texts"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(PackagesError, match=words):
        parse_python(python(**changes))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '"x"', "NaN"])
def test_what_is_no_answer_is_refused(text: str) -> None:
    for parse in (parse_python, parse_node):
        with pytest.raises(PackagesError, match="an answer that can't be one"):
            parse(text)


@pytest.mark.parametrize(
    "change", [{"libc": "bionic"}, {"architecture": "arm64"}, {"version": "v22"}, {"interpreter": "node"}]
)
def test_a_node_that_can_not_be(change: dict[str, str]) -> None:
    assert parse_node(json.dumps(NODE_ANSWER)).libc == "musl"
    with pytest.raises(PackagesError, match=r"Node\.js of the image"):
        parse_node(json.dumps({**NODE_ANSWER, **change}))


def test_an_answer_is_found_among_what_else_is_printed() -> None:
    mark = python_question()[-1]
    assert find_answer(f"hello\n{mark}a\r\nmore{mark}b\n".encode(), "x") == "a\r"
    with pytest.raises(PackagesError, match="'x': its interpreter does not say"):
        find_answer(b"\xff\n", "x")


def test_a_stored_answer_says_which_kind_it_is() -> None:
    for kind, text in ((PYTHON, parse_python(python()).text), (NODE, parse_node(json.dumps(NODE_ANSWER)).text)):
        assert is_choice(choice_name(kind, "a" * 64), f"{digest_of(text)}\n{text}")


def test_a_missing_interpreter_is_named_with_the_image() -> None:
    assert "packages of Python can't be added to the image 'docker://x:1': it has no python3" in str(
        missing_interpreter("docker://x:1", "python3")
    )
    assert "packages of Node.js" in str(missing_interpreter("x", "node"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.0", "1.0.0", True),
        ("2024.01", "2024.1", True),
        ("1.0-RC1", "1.0rc1", True),
        ("1!1.0", "1.0", False),
        ("2.1.0+cu121", "2.1.0", False),
        ("1.10", "1.1", False),
        ("unknown", "unknown", True),
    ],
)
def test_versions_are_written_in_several_ways(one: str, other: str, same: bool) -> None:
    assert same_version(one, other) is same


def test_what_uv_reads_as_a_version() -> None:
    assert all(is_version(text) for text in ("1", "2024.1", "1!2.0rc1.post2.dev3", "2.1.0+cu121"))
    assert not any(is_version(text) for text in ("", "unknown", "1.0-custom", "1 --index-url=x", "1\n2"))


# --- The texts, run by interpreters of this machine ---


def ask(*command: str, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"], **variables}
    said = subprocess.run(command, check=True, capture_output=True, env=environment, cwd="/").stdout
    return find_answer(said, "x")


def test_this_python_says_what_it_is() -> None:
    found = parse_python(ask(*python_question(sys.executable), PYTHONHOME="/nowhere", PYTHONPATH="/tmp"))
    assert found.version == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert found.interpreter == sys.executable
    paths = sysconfig.get_paths()
    assert (found.site, found.scripts, found.prefix) == (paths["purelib"], paths["scripts"], paths["data"])
    assert found.libc[0] in ("glibc", "musl")
    assert "pytest" in {pin.name for pin in found.installed}


def test_a_virtual_environment_is_where_packages_go(tmp_path: Path) -> None:
    """Which is on PATH in an image, perhaps."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    found = parse_python(ask(*python_question(os.fspath(tmp_path / "venv" / "bin" / "python3"))))
    assert found.interpreter == f"{tmp_path}/venv/bin/python3"
    assert found.site == f"{tmp_path}/venv/lib/python{found.version}/site-packages"
    assert (found.scripts, found.prefix, found.installed) == (f"{tmp_path}/venv/bin", f"{tmp_path}/venv", ())
    assert found.target("x").first_line == f"#!{tmp_path}/venv/bin/python3\n".encode()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node (Debian: apt-get install nodejs)")
def test_this_node_says_what_it_is() -> None:
    found = parse_node(ask(*node_question()))
    assert Path(found.interpreter).name.startswith("node")
    assert found.libc == parse_python(ask(*python_question(sys.executable))).libc[0]


def test_interpreters_with_long_names_run_scripts_all_the_same() -> None:
    plain = Target("3.12", "x")
    assert plain.first_line == b"#!/usr/bin/python3\n"
    for interpreter in ("/opt/my tools/python3", "/" + "a" * 130):
        line = Target("3.12", "x", interpreter=interpreter).first_line
        assert line == f"#!/bin/sh\n'''exec' \"{interpreter}\" \"$0\" \"$@\"\n' '''\n".encode()


def test_what_is_put_into_an_image_leaves_what_is_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source / "bin", source / "new", target / "usr" / "bin"):
        directory.mkdir(parents=True)
    (target / "usr" / "bin").chmod(0o750)
    (target / "bin").symlink_to("usr/bin")  # as merged distributions have it
    (target / "bin" / "other").write_text("other")
    (target / "bin" / "link").symlink_to("other")
    (source / "bin" / "tool").write_text("tool")
    (source / "bin" / "tool").chmod(0o755)
    os.utime(source / "bin" / "tool", (1, 1))
    (source / "bin" / "link").write_text("mine")
    (source / "new" / "dangling").symlink_to("nowhere")
    python_place._copy(os.fspath(source), os.fspath(target))
    status = (target / "usr" / "bin" / "tool").stat()
    assert (status.st_mode & 0o777, int(status.st_mtime)) == (0o755, 1)
    assert (target / "usr" / "bin").stat().st_mode & 0o777 == 0o750
    assert (target / "bin" / "other").read_text() == "other"
    assert (target / "bin" / "link").read_text() == "mine"
    assert os.readlink(target / "new" / "dangling") == "nowhere"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node (Debian: apt-get install nodejs)")
def test_node_puts_packages_where_they_belong(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source / "node_modules" / "a", source / "bin", target / "node_modules" / "a", target / "usr"):
        directory.mkdir(parents=True)
    (target / "bin").symlink_to("usr")
    (target / "node_modules" / "a" / "old").write_text("old")
    (target / "node_modules" / "a" / "cli.js").symlink_to("nowhere")
    (source / "node_modules" / "a" / "cli.js").write_text("new")
    (source / "node_modules" / "a" / "cli.js").chmod(0o755)
    (source / "bin" / "a").symlink_to("../node_modules/a/cli.js")
    node, option, text, *places = in_guest_program("node", "node_place.js", f"{source}", f"{target}/node_modules/b")
    (target / "node_modules" / "b").mkdir()
    command = [node, option, text.replace('copy(content, "/")', f"copy(content, {json.dumps(f'{target}')})"), *places]
    subprocess.run(command, check=True)
    assert (target / "node_modules" / "a" / "cli.js").read_text() == "new"
    assert (target / "node_modules" / "a" / "cli.js").stat().st_mode & 0o777 == 0o755
    assert (target / "node_modules" / "a" / "old").read_text() == "old"
    assert not (target / "node_modules" / "b").exists()
    assert os.readlink(target / "usr" / "a") == "../node_modules/a/cli.js"
    assert (target / "bin").is_symlink()


def test_modules_are_compiled_but_their_tests(tmp_path: Path) -> None:
    (tmp_path / "a" / "tests").mkdir(parents=True)
    for path in ("a/one.py", "a/tests/two.py", "three.py", "a/broken.py"):
        (tmp_path / path).write_text("x = (" if "broken" in path else "x = 1\n")
    found = python_place._modules(os.fspath(tmp_path), os.fspath(tmp_path))
    assert sorted(found) == sorted(os.fspath(path) for path in tmp_path.rglob("*.py"))
    command = in_guest_program(sys.executable, "python_place.py")
    probe = f"{command[3].partition('if __name__')[0]}\n_compile({found!r}, '/tests?/')\n"
    subprocess.run([sys.executable, "-I", "-c", probe], check=True, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")} == {"one", "three"}
