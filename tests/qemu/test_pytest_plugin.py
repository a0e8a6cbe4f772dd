"""The pytest plugin with real virtual machines, in workers of pytest-xdist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.documented import blocks
from trio_sandbox.image import default_cache_directory
from trio_sandbox.qemu import detect_accelerator, open_runtime

pytestmark = pytest.mark.qemu

INI = "[pytest]\ntrio_mode = true\nfilterwarnings = error\nstrict = true\n"


@pytest.fixture(scope="session")
def cache_directory() -> Path:
    """Give the user's own cache: pytester gives its runs another home, where all would have to be built anew."""
    return default_cache_directory()


@pytest.mark.usefixtures("python_image", "system_disk")
def test_what_the_guide_shows_and_a_report_of_a_test_that_fails_in_two_workers(
    cache_directory: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_directory.parent))
    # What it shows besides runs in no test of its reader's.
    shown = [
        block.text
        for block in blocks("python")
        if block.page.name == "testing.md" and "async with open_scripted_sandbox" not in block.text
    ]
    (conftest,) = (text for text in shown if text.startswith("# conftest.py"))
    pytester.makeini(INI)
    pytester.makeconftest(conftest)
    pytester.makepyfile(test_shown="\n".join(text for text in shown if text != conftest))
    pytester.makepyfile(
        test_failing="""
        async def test_fails(sandbox):
            await sandbox.run_process("echo c > /proc/sysrq-trigger", shell=True, user="root")
        """
    )
    # In a process of its own: pytest-xdist's workers would inherit what this one has open.
    result = pytester.runpytest_subprocess("-n2", timeout=200)
    outcomes = result.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"] + outcomes.get("skipped", 0)) == (1, 5)
    result.stdout.fnmatch_lines(
        [
            "*OutcomeUnknownError*",
            "*sandbox 1 (python, 256 MiB, *): console*",
            "*Kernel panic - not syncing: sysrq triggered crash*",
            "*sandbox 1 (python, 256 MiB, *): QMP*",
            '<- {"QMP": *',
            '-> {"execute":"qmp_capabilities"*',
        ]
    )


def test_requires_hardware_skips_where_no_guest_ran_on_it(pytester: pytest.Pytester, short_directory: Path) -> None:
    cache = short_directory / "cache"

    async def detect() -> None:
        async with open_runtime(short_directory) as runtime:
            await detect_accelerator(cache_dir=cache, environment=runtime.environment)

    trio.run(detect)
    pytester.makeini(INI)
    pytester.makeconftest(f"""
        import pytest
        from trio_sandbox import HostConfig

        @pytest.fixture(scope="session")
        def sandbox_host_config():
            return HostConfig(cache_dir={str(cache)!r}, runtime_dir={str(short_directory)!r})
    """)
    pytester.makepyfile("""
        import pytest

        @pytest.mark.usefixtures("requires_hardware")
        async def test_it():
            print("ran")
    """)
    # What is remembered of this machine is changed to what it is to be in the test.
    remembered = json.loads((cache / "accelerator.json").read_text())
    for failure, outcome in [("the guest did not move", {"skipped": 1}), (None, {"passed": 1})]:
        (cache / "accelerator.json").write_text(json.dumps(remembered | {"failure": failure}))
        result = pytester.runpytest_inprocess("-rs")
        result.assert_outcomes(**outcome)
        if failure is not None:
            result.stdout.fnmatch_lines([f"SKIPPED*{failure}*"])


@pytest.fixture
def short_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory whose path leaves room for a socket's."""
    return tmp_path_factory.mktemp("p")
