"""``trio-sandbox template`` on a store of files that no machine made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests._saved import saved_template
from trio_sandbox.cli import main
from trio_sandbox.machines._named import NamedTemplateStore
from trio_sandbox.machines._templates import TemplateStore, new_template


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    store = TemplateStore(tmp_path, budget_mib=1000)
    keys = ["a" * 24, "b" * 24]
    for age, key in enumerate(keys):
        template = new_template(key, image="python", memory_mib=128, vcpus=2, warmup="import this\nimport that")
        with store.lock(key), store.make(template) as staged:
            staged.devices.write_bytes(bytes(2**20))
            staged.overlay.touch()
        os.utime(tmp_path / "templates" / key / "template.json", (age, age))
    return keys


def command(tmp_path: Path, *arguments: str) -> int:
    return main(["template", *arguments, "--cache-dir", str(tmp_path)])


def test_list(tmp_path: Path, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{keys[1]}  python     128 MiB   2 vCPU")
    assert first.endswith("  import this...")
    assert second.startswith(keys[0])
    assert command(tmp_path, "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["key"], row["used"], row["memory_mib"]) for row in rows] == [(keys[1], 1, 128), (keys[0], 0, 128)]


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "list") == 0
    assert "no templates" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_rm(tmp_path: Path, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "rm", "aaaaaa") == 0
    assert capsys.readouterr().out == "aaaaaa: 1 MiB freed\n"
    assert command(tmp_path, "rm", "aaaaaa") == 1
    assert f"there is no template 'aaaaaa'; there are: {keys[1]}" in capsys.readouterr().err


def test_prune(tmp_path: Path, keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "templates" / keys[0] / "devices").unlink()
    assert command(tmp_path, "prune") == 0
    assert capsys.readouterr().out == "0 MiB freed\n"
    assert [template.key for template in TemplateStore(tmp_path, budget_mib=1000).list()] == [keys[1]]


def save(tmp_path: Path, name: str) -> None:
    with NamedTemplateStore(tmp_path).make(name, memory_mib=1) as staged:
        staged.template = saved_template(name, staged.directory, memory_mib=128, vcpus=1)
        for path in staged.template.files:
            path.write_bytes(bytes(2**20))


def test_saved_sandboxes_are_listed_and_removed_by_name(
    tmp_path: Path, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "mine")
    save(tmp_path, "aaaaaa")
    save(tmp_path, "torn")
    for path in (tmp_path / "saved").glob("torn~*/memory"):
        path.unlink()
    assert command(tmp_path, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["aaaaaa", "mine", "torn", *reversed(keys)]
    assert "python     128 MiB   1 vCPU" in lines[1]
    assert "is damaged" in lines[2]
    assert command(tmp_path, "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("name") for row in rows] == ["aaaaaa", "mine", "torn", None, None]
    assert (rows[1]["memory_mib"], "error" in rows[2]) == (128, True)
    assert command(tmp_path, "rm", "aaaaaa", "torn") == 0
    assert command(tmp_path, "rm", "aaaaaa") == 0, "now it means the key"
    assert NamedTemplateStore(tmp_path).names() == ["mine"]
    assert [template.key for template in TemplateStore(tmp_path, budget_mib=1000).list()] == [keys[1]]
