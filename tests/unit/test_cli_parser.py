"""The grammar of the command line."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

import trio_sandbox
from trio_sandbox import Network, NetworkRule
from trio_sandbox.bench import MEASURES
from trio_sandbox.cli import build_parser, main
from trio_sandbox.cli._arguments import MEASURES as NAMES
from trio_sandbox.cli._configs import sandbox_config

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"


def test_run_has_defaults() -> None:
    options = build_parser().parse_args(["run"])
    assert (options.code, options.words, options.image) == (None, [], None)
    assert (options.environment, options.uploads, options.downloads, options.workdir) == ([], [], [], None)
    assert (options.memory, options.vcpus, options.timeout) == (256, 1, math.inf)
    assert (options.accelerator, options.require_hardware, options.no_build) == ("auto", False, False)


def test_run_takes_everything() -> None:
    options = build_parser().parse_args(
        "run --image node --memory 1G --vcpus 2 --timeout 2.5 --accelerator tcg --no-build --timings --trace -q "
        "--cache-dir /var/c file.py".split()
    )
    assert (options.words, options.image, options.memory, options.vcpus) == (["file.py"], "node", 1024, 2)
    assert (options.timeout, options.accelerator, options.no_build) == (2.5, "tcg", True)
    assert (options.timings, options.trace, options.quiet, options.cache_dir) == (True, True, True, Path("/var/c"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("f --memory 1 -c x -- -q", None, "f --memory 1 -c x -- -q"),
        ("-q f -h", None, "f -h"),
        ("-- -f --json", None, "-f --json"),
        ("- --json", None, "- --json"),
        ("-c x -q a --json -- b", "x", "a --json -- b"),
        ("-c x -- -c y", "x", "-c y"),
        ("-qc x a", "x", "a"),
        ("-cx a", "x", "a"),
        ("--memory=512 --cache-dir d f -q", None, "f -q"),
        ("--", None, ""),
    ],
)
def test_what_follows_the_options_is_the_programs(arguments: str, code: str | None, words: str) -> None:
    options = build_parser().parse_args(["run", *arguments.split()])
    assert (options.code, options.words) == (code, words.split())


def test_the_environment() -> None:
    options = build_parser().parse_args(["run", "-e", "SET_HERE", "-e", "A=b=c", "-eD=", "-e", "A=z", "f"])
    assert options.environment == [("SET_HERE", None), ("A", "b=c"), ("D", ""), ("A", "z")]


def test_what_is_copied() -> None:
    texts = ["c", "c:/x", "c:x/", "a:b:", "a:b:x/y/../z", "/d/c", "c:"]
    options = build_parser().parse_args(["run", *(word for text in texts for word in ("--upload", text)), "f"])
    assert [(str(each.local), each.remote) for each in options.uploads] == [
        ("c", "c"),
        ("c", "/x"),
        ("c", "x/c"),
        ("a:b", "a:b"),
        ("a:b", "x/z"),
        ("/d/c", "c"),
        ("c", "c"),
    ]
    texts = ["x", "/d/x", "x/", "x:y", "x:a:b", "x:a/b/"]
    options = build_parser().parse_args(["run", *(word for text in texts for word in ("--download", text)), "f"])
    assert [(each.remote, str(each.local)) for each in options.downloads] == [
        ("x", "."),
        ("/d/x", "."),
        ("x/", "."),
        ("x", "y"),
        ("x", "a:b"),
        ("x", "a/b"),
    ]


@pytest.mark.parametrize(
    ("text", "mebibytes"), [("512", 512), ("512M", 512), ("512MiB", 512), ("2g", 2048), ("2GiB", 2048)]
)
def test_memory_has_units(text: str, mebibytes: int) -> None:
    assert build_parser().parse_args(["run", "--memory", text]).memory == mebibytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["jump"], "invalid choice: 'jump'"),
        (["run", "-c", "1", "-c", "2"], "-c may be given once"),
        (["run", "-c"], "expected one argument"),
        (["run", "-e", "=x", "f"], "'=x' has no name"),
        (["run", "-e", "", "f"], "'' has no name"),
        (["run", "-w", "relative", "f"], "'relative' is not an absolute path"),
        (["run", "--upload", ":x", "f"], "':x' does not say what to upload"),
        (["run", "--upload", "/:..", "f"], "gives it no name in the guest"),
        (["run", "--upload", "/", "f"], "gives it no name in the guest"),
        (["run", "--download", ":x", "f"], "':x' does not say what to download"),
        (["run", "--download", "..", "f"], "'..' does not say what to download"),
        (["run", "--memory", "lots"], "'lots' is not an amount of memory"),
        (["run", "--memory", "1.5G"], "'1.5G' is not an amount of memory"),
        (["run", "--timeout", "0"], "'0' is not a positive number of seconds"),
        (["run", "--timeout", "nan"], "'nan' is not a positive number of seconds"),
        (["run", "--timeout", "soon"], "'soon' is not a positive number of seconds"),
        (["run", "--accelerator", "magic"], "invalid choice: 'magic'"),
        (["run", "--mem", "512"], "unrecognized arguments"),
        (["bench", "-n", "1,0"], "'1,0' are not positive numbers"),
        (["bench", "-n", "1,,8"], "'1,,8' are not positive numbers"),
        (["bench", "--only", "run,astrology"], "'astrology' can't be measured; there are: overlay"),
        (["bench", "--no-templates"], "unrecognized arguments"),
        (["image"], "required: ACTION"),
        (["image", "rm"], "required: NAME"),
        (["template"], "required: ACTION"),
        (["template", "rm"], "required: KEY"),
    ],
)
def test_wrong_use_is_status_2_and_says_what(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        build_parser().parse_args(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Give a parser and those of all its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = cast("argparse._SubParsersAction[argparse.ArgumentParser]", action)
            for command in commands.choices.values():
                found += parsers(command)
    return found


def test_every_command_and_option_is_in_the_reference() -> None:
    text = REFERENCE.read_text("utf-8")
    for parser in parsers(build_parser()):
        assert parser.prog in text
        command, *_ = parser.prog.split()[1:] or [""]
        _, _, section = text.partition(f"\n## trio-sandbox {command}\n")
        section, _, _ = section.partition("\n## ")
        for action in parser._actions:
            names = set(action.option_strings) - {"-h", "--help", "--version"}
            said = {name for name in names if re.search(rf"`{name}[ `]", section)}
            # What another command's section says of both forms holds here as well.
            assert said or not names, f"{parser.prog} {names}"
            assert all(re.search(rf"`{name}[ `]", text) for name in names), names


def test_every_commands_help_has_examples() -> None:
    for parser in parsers(build_parser()):
        _, _, examples = parser.format_help().partition("\nexamples:\n  ")
        group, _, action = parser.prog.removeprefix("trio-sandbox").strip().partition(" ")
        # What is said of all actions together may stand before the action.
        first, *_ = examples.splitlines()
        assert re.match(rf"(source <\()?trio-sandbox( .*)?\b{group}\b.*\b{action}\b", first), parser.prog


def test_every_example_can_be_parsed() -> None:
    found = 0
    for parser in parsers(build_parser()):
        _, _, examples = parser.format_help().partition("\nexamples:\n")
        for line in examples.splitlines():
            if not line.startswith("  trio-sandbox "):
                continue
            command, *_ = re.split(r"\s{2,}| [<>] ", line.strip())
            build_parser().parse_args(shlex.split(command)[1:])
            found += 1
    assert found > 40


def test_every_command_that_says_facts_can_say_them_as_json() -> None:
    # These talk with their user, or print what is no fact.
    others = {"shell", "mcp", "completion"}
    for parser in parsers(build_parser()):
        if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
            continue
        assert ("--json" in parser._option_string_actions) is (parser.prog.split()[1] not in others), parser.prog


def test_what_can_be_measured_is_what_the_benchmarks_measure() -> None:
    assert tuple(MEASURES) == NAMES


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"trio-sandbox {trio_sandbox.__version__}\n"


def test_help_imports_no_more_than_it_needs() -> None:
    script = (
        "import sys; from trio_sandbox.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: print(*sorted(sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    modules = set(completed.stdout.splitlines()[-1].split())
    assert "trio_sandbox.cli._parser" in modules
    slow = {"importlib.metadata", "rich", "trio_sandbox.bench", "trio_sandbox.testing", "trio_sandbox.cli._run"}
    assert not slow & modules


def test_what_may_be_reached() -> None:
    def policy(*arguments: str) -> Network:
        return sandbox_config(build_parser().parse_args(["run", *arguments, "f"])).network

    assert policy() == Network.none()
    assert policy("--network", "pypi.org", "--network", "db.example.org:5432") == Network.allow(
        "pypi.org", "db.example.org:5432"
    )
    assert policy("--network", "open", "--network", "a.org:1") == Network.open(NetworkRule("a.org", port=1))
    with pytest.raises(SystemExit):
        policy("--network", "10.0.0.1")


def test_names_of_container_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parse = build_parser().parse_args
    assert parse(["run", "--image", "oci-archive:app.tar:v1", "f"]).image == f"oci-archive:{tmp_path}/app.tar:v1"
    assert parse(["image", "rm", "oci:app", "node"]).names == [f"oci:{tmp_path}/app", "node"]
    assert parse(["image", "build"]).names == ["python"]
    with pytest.raises(SystemExit):
        parse(["shell", "--image", "docker:debian"])
    assert "write it as in 'docker://debian:12-slim'" in capsys.readouterr().err
