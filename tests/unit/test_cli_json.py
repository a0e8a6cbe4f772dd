"""What each command prints with ``--json`` is what the reference says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tests.fake._fleet import LocalHost
from tests.unit.test_cli_parser import REFERENCE
from tests.unit.test_cli_ps import ONE
from tests.unit.test_cli_template import save
from trio_sandbox.cli import _doctor, _fleet, _image, _ps, main
from trio_sandbox.cli._doctor import Finding
from trio_sandbox.fleet import NodeReport
from trio_sandbox.image import ImageStore, StoredImage
from trio_sandbox.machines._templates import TemplateStore, new_template


def documented() -> dict[str, tuple[bool, set[str]]]:
    """Give for each command of the reference's table whether it prints an array, and the members."""
    _, _, section = REFERENCE.read_text("utf-8").partition("\n## JSON\n")
    rows = re.findall(r"^\| `(.*?)` \| (an? \w+).*? \| (.*) \|$", section, re.MULTILINE)
    # What is said of a member may name values, in parentheses or after a colon.
    plain = ((command, kind, re.sub(r"\(.*?\)|: .*", "", members)) for command, kind, members in rows)
    return {command: (kind == "an array", set(re.findall(r"`(\w+)`", members))) for command, kind, members in plain}


def stored() -> StoredImage:
    return cast(
        "StoredImage",
        SimpleNamespace(
            name="python",
            digest="d",
            size_bytes=1,
            current=True,
            used=1.0,
            below="",
            step="",
            path=Path("/image"),
            created=1.0,
            details={},
        ),
    )


async def _answer(value: object) -> Any:
    await trio.lowlevel.checkpoint()
    return value


def give(value: object) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        return value

    return call


def answer(value: object) -> Callable[..., object]:
    def ask(*_: object, **__: object) -> object:
        return _answer(value)

    return ask


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have one of everything; return the cache directory."""
    store = TemplateStore(tmp_path, budget_mib=1000)
    template = new_template("a" * 24, image="python", memory_mib=128, vcpus=2, warmup="")
    with store.lock("a" * 24), store.make(template) as staged:
        staged.devices.touch()
        staged.overlay.touch()
    for name in ("mine", "torn"):
        save(tmp_path, name)
    for path in (tmp_path / "saved").glob("torn~*/memory"):
        path.unlink()
    monkeypatch.setattr(_ps, "running_sandboxes", give(([ONE], list[str]())))
    monkeypatch.setattr(_ps, "kill_sandbox", give(True))
    monkeypatch.setattr(ImageStore, "list", give([stored()]))
    monkeypatch.setattr(ImageStore, "remove", answer(1))
    monkeypatch.setattr(ImageStore, "prune", answer(1))
    monkeypatch.setattr(_image, "export_image", answer(1))
    monkeypatch.setattr(_image, "import_images", answer(["python"]))
    monkeypatch.setattr(_image, "ensure_bootable", answer((stored(), None)))
    monkeypatch.setattr(_doctor, "examine", answer([Finding("free space", "ok", "some")]))
    report = NodeReport("one", LocalHost(memory_mib=2000, open=3).statistics(), draining=False)
    monkeypatch.setattr(_fleet, "read_reports", give([report]))
    monkeypatch.setattr(_fleet, "drain_node", give(0))
    return tmp_path


#: Arguments of each command besides --json.
COMMANDS = {
    "ps": [],
    "kill": ["0123abcd4567"],
    "doctor": [],
    "image build": ["python"],
    "image list": [],
    "image inspect": ["python"],
    "image export": ["python", "file"],
    "image import": ["file"],
    "image rm": ["python"],
    "image prune": [],
    "fleet status": [],
    "fleet drain": ["one"],
    "template list": [],
    "template rm": ["mine"],
    "template prune": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_says_what_is_printed(command: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command.split(), *COMMANDS[command], "--json"]
    if words[0] in ("image", "template"):
        words += ["--cache-dir", str(machine)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    value = json.loads(text)
    is_array, members = documented()[command]
    assert isinstance(value, list) is is_array
    rows = value if is_array else [value]
    assert rows
    for row in rows:
        assert set(row) == members


def test_every_command_is_in_the_table() -> None:
    # The others print what tests of their own look at.
    assert set(documented()) == {*COMMANDS, "run", "bench"}


def test_what_was_done_before_a_failure_is_printed(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "rm", "mine", "nothing", "--json", "--cache-dir", str(machine)]) == 1
    captured = capsys.readouterr()
    assert [row["name"] for row in json.loads(captured.out)] == ["mine"]
    assert "there is no template 'nothing'" in captured.err


def test_a_template_and_a_saved_sandbox_have_the_same_members(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["template", "list", "--json", "--cache-dir", str(machine)]) == 0
    mine, torn, template = json.loads(capsys.readouterr().out)
    assert (mine["name"], mine["key"], mine["error"], mine["memory_mib"]) == ("mine", None, None, 128)
    assert (torn["name"], torn["memory_mib"]) == ("torn", None)
    assert "is damaged" in torn["error"]
    assert (template["name"], template["key"], template["vcpus"]) == (None, "a" * 24, 2)
