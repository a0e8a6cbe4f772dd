"""The command `trio-sandbox` as a shell runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from trio_sandbox._programs import REQUIREMENTS
from trio_sandbox.bench import MEASURES

pytestmark = pytest.mark.qemu

COMMAND = (sys.executable, "-m", "trio_sandbox")


def trio_sandbox(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def test_output_and_exit_status_are_the_codes() -> None:
    code = b"import sys\nprint('out', end='')\nprint('err', end='', file=sys.stderr)\nsys.exit(7)\n"
    completed = trio_sandbox("run", "--quiet", "-", stdin=code)
    assert (completed.returncode, completed.stdout, completed.stderr) == (7, b"out", b"err")


def test_a_timeout_keeps_what_was_printed() -> None:
    code = "print('before', flush=True)\nwhile True: pass"
    completed = trio_sandbox("run", "--quiet", "--timeout", "1", "-c", code)
    assert (completed.returncode, completed.stdout) == (124, b"before\n")
    assert b"stopped after 1 seconds" in completed.stderr


def test_sigterm_leaves_nothing() -> None:
    code = "print('ready', flush=True)\nwhile True: pass"
    # Not tmp_path: the path of a runtime directory has to be short.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with subprocess.Popen(
            [*COMMAND, "run", "--quiet", "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": name}
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                assert list(directory.iterdir())  # the runtime directory
                process.terminate()
                assert process.wait() == 128 + signal.SIGTERM
            finally:
                process.kill()
        assert list(directory.iterdir()) == []


def test_an_unknown_image_is_a_failure_that_lists_the_known(tmp_path: Path) -> None:
    completed = trio_sandbox("run", "--image", "windows", "--cache-dir", str(tmp_path), "-c", "1")
    assert completed.returncode == 125
    assert b"windows" in completed.stderr
    assert b"python" in completed.stderr
    assert b"Traceback" not in completed.stderr


def test_an_image_that_must_not_be_built_is_a_failure_that_says_how_to(tmp_path: Path) -> None:
    completed = trio_sandbox("run", "--no-build", "--cache-dir", str(tmp_path), "-c", "1")
    assert completed.returncode == 125
    assert b"trio-sandbox image build" in completed.stderr


def test_a_missing_qemu_is_named_with_its_package(tmp_path: Path) -> None:
    for requirement in REQUIREMENTS:
        found = requirement.find()
        if found is not None and requirement.name != "qemu-system-x86_64":
            (tmp_path / Path(found).name).symlink_to(found)
    completed = trio_sandbox("run", "-c", "1", environment={"PATH": str(tmp_path)})
    assert completed.returncode == 125
    assert b"qemu-system-x86" in completed.stderr
    assert b"Traceback" not in completed.stderr


def test_doctor_is_content_where_these_tests_run() -> None:
    completed = trio_sandbox("doctor", "--json")
    report = json.loads(completed.stdout)
    assert completed.returncode == 0, report
    assert report["ok"]
    (accelerator,) = [finding for finding in report["findings"] if finding["subject"] == "accelerator"]
    assert accelerator["detail"].startswith(("kvm", "tcg"))
    if accelerator["detail"].startswith("tcg"):
        assert "no security boundary" in accelerator["detail"]


def test_doctor_finds_what_is_missing(tmp_path: Path) -> None:
    completed = trio_sandbox("doctor", environment={"PATH": str(tmp_path)})
    assert completed.returncode == 1
    assert b"apt-get install" in completed.stdout
    assert b"qemu-system-x86" in completed.stdout
    assert completed.stderr == b""


def test_bench_measures_this_machine() -> None:
    measures = [name for name in MEASURES if name != "cold"]
    completed = trio_sandbox("bench", "--quick", "--only", ",".join(measures), "-n", "2", "--json")
    assert completed.returncode == 0, completed.stderr
    report = json.loads(completed.stdout)
    figures = {(figure["measure"], figure["n"]): figure for figure in report["figures"]}
    for measure in measures:
        assert figures[measure, 2]["samples"] >= 1
        assert 0 < figures[measure, 2]["median"] <= figures[measure, 2]["p95"]
    assert report["accelerator"]["name"] in ("kvm", "tcg")
    assert report["machine"]["cpus"] > 0
    assert b"template, n = 2: measuring" in completed.stderr


def test_an_empty_cache_has_no_images(tmp_path: Path) -> None:
    completed = trio_sandbox("image", "list", "--cache-dir", str(tmp_path / "cache"))
    assert completed.returncode == 0
    assert b"no images" in completed.stdout
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    assert json.loads(trio_sandbox("image", "list", "--json", "--cache-dir", str(tmp_path)).stdout) == []


def test_removing_an_image_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    completed = trio_sandbox("image", "rm", "python", "--cache-dir", str(tmp_path))
    assert completed.returncode == 1
    assert b"python" in completed.stderr
    assert b"Traceback" not in completed.stderr
