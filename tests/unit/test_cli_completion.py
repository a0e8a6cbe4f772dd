"""Scripts by which shells complete the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trio_sandbox.cli import main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["im"], {"image"}),
        (["k"], {"kill"}),
        (["image", "pru"], {"prune"}),
        (["image", "prune", "--t"], {"--to"}),
        (["ps", "--j"], {"--json"}),
        (["run", "--accelerator", "k"], {"kvm"}),
        (["run", "progr"], {"program.py"}),
        (["run", "--workspace", "d"], {"directory"}),
    ],
)
def test_bash_completes(
    words: list[str], completed: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "program.py").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "data").touch()
    line = " ".join(f"'{word}'" for word in ("trio-sandbox", *words))
    ask = (
        f"{script('bash', capsys)}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
        "name=$(complete -p trio-sandbox | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        "$name; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert {each.strip().rstrip("/") for each in answer.stdout.splitlines()} == completed


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(word in text for word in ("kill", "prune", "--workspace"))


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 125
    assert "pip install 'trio-sandbox[cli]'" in capsys.readouterr().err
