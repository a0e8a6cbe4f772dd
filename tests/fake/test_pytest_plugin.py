"""The pytest plugin, in pytest runs of its own, with a host that opens nothing."""

from __future__ import annotations

import pytest

CONFTEST = """
from contextlib import asynccontextmanager
import attrs, pytest

@attrs.define
class FakeSandbox:
    image: str
    config: object
    accelerator: str = "tcg"
    open: bool = True
    def console(self):
        return "".join(f"console line {n}\\n" for n in range(100)) if self.image == "python" else ""
    def recent_runs(self):
        from trio_sandbox import RunOutput
        fields = {"language": "python", "outcome": "ended", "stdout_bytes": b"run's output\\n"}
        return (RunOutput(exit_code=1, stderr_bytes=b"ZeroDivisionError: \\x1b[2J\\n", **fields),) if self.image == "python" else ()
    def qmp_log(self):
        return '-> {"execute": "cont"}\\n'

class FakeHost:
    @asynccontextmanager
    async def open_sandbox(self, image, config):
        sandbox = FakeSandbox(image, config)
        try:
            yield sandbox
        finally:
            sandbox.open = False

@pytest.fixture
def sandbox_host():
    return FakeHost()
"""


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    """Give a project with Trio mode and a fake host."""
    pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\nstrict = true\n")
    pytester.makeconftest(CONFTEST)
    return pytester


def test_it_imports_nothing_unless_used(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile("""
        import sys

        def test_innocent(request):
            assert request.config.pluginmanager.hasplugin("pytest_trio_sandbox")
            ours = [name for name in sys.modules if name.split(".")[0] in ("trio_sandbox", "trio", "attrs")]
            assert ours == []
    """)
    # Alone, since others import Trio for themselves; and in a process of its own: in ours all is imported.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.runpytest_subprocess("-p", "pytest_trio_sandbox").assert_outcomes(passed=1)


def test_with_pytest_trio_it_imports_nothing_of_ours_either(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_innocent(request):
            assert request.config.pluginmanager.hasplugin("trio_sandbox fixtures")
            assert [name for name in sys.modules if name.split(".")[0] == "trio_sandbox"] == []
    """)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_fixtures_and_the_marker_are_listed_with_what_they_do(inner: pytest.Pytester) -> None:
    fixtures = inner.runpytest_inprocess("--fixtures", "-p", "no:cacheprovider").stdout.str()
    for name in ("sandbox_host_config", "sandbox_factory", "sandbox", "requires_hardware"):
        (line,) = (line for line in fixtures.splitlines() if line.startswith(f"{name} "))
        assert line
    assert (
        "no docstring available" not in fixtures.partition("sandbox_host_config")[2].partition("requires_hardware")[0]
    )
    assert "@pytest.mark.sandbox(*, image='python', **fields)" in inner.runpytest_inprocess("--markers").stdout.str()


def test_a_sandbox_is_as_the_closest_marker_says_and_gone_after_the_test(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest
        from trio_sandbox import SandboxConfig

        seen = []

        async def test_default(sandbox):
            assert (sandbox.image, sandbox.config) == ("python", SandboxConfig())
            assert sandbox.open
            seen.append(sandbox)

        @pytest.mark.sandbox(memory_mib=512, vcpus=2)
        class TestMarked:
            async def test_class(self, sandbox):
                assert not seen[0].open
                assert (sandbox.image, sandbox.config) == ("python", SandboxConfig(memory_mib=512, vcpus=2))

            @pytest.mark.sandbox(image="node", vcpus=1)
            async def test_closest(self, sandbox, sandbox_factory):
                expected = SandboxConfig(memory_mib=512, vcpus=1)
                assert (sandbox.image, sandbox.config) == ("node", expected)
                async with sandbox_factory(image="python", vcpus=4) as other, sandbox_factory() as third:
                    assert (other.image, other.config) == ("python", SandboxConfig(memory_mib=512, vcpus=4))
                    assert (third.image, third.config) == ("node", expected)
                    assert sandbox.open and third.open
                assert sandbox.open and not third.open

        async def test_a_wrong_field_is_an_error_where_it_is_given(sandbox_factory):
            with pytest.raises(TypeError, match="there is no 'memory'; there are image, memory_mib, "):
                async with sandbox_factory(memory=1):
                    pass

        @pytest.mark.trio
        async def test_explicitly_marked(sandbox):
            assert sandbox.open
    """)
    inner.runpytest_inprocess().assert_outcomes(passed=5)


def test_the_network_of_a_sandbox_is_as_the_closest_marker_says(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest
        from trio_sandbox import Network, NetworkRule

        pytestmark = pytest.mark.sandbox(network=Network.allow("a.test"), vcpus=2)

        async def test_module(sandbox, sandbox_factory):
            assert sandbox.config.network == Network.allow("a.test")
            async with sandbox_factory(network=Network.none()) as offline:
                assert (offline.config.network, offline.config.vcpus) == (Network.none(), 2)

        @pytest.mark.sandbox(network=Network.allow(NetworkRule("b.test", port=7)))
        async def test_closest(sandbox):
            assert sandbox.config.network == Network.allow("b.test:7")
            assert sandbox.config.vcpus == 2
    """)
    inner.runpytest_inprocess().assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("network='a.test'", "*marker `sandbox` of test_wrong is wrong: *Network*"),
        (
            "memory=512",
            "*marker `sandbox` of test_wrong is wrong: there is no 'memory'; there are image, memory_mib, vcpus,*",
        ),
        ("memory_mib=64", "*marker `sandbox` of test_wrong is wrong: `memory_mib` must be at least 128 MiB, not 64*"),
        ("image=3", "*marker `sandbox` of test_wrong is wrong: `image` must be the name of an image, not 3*"),
        ("'node'", "*the marker `sandbox` takes keyword arguments only, not 'node'*"),
    ],
)
def test_a_wrong_marker_is_an_error_before_anything_starts(inner: pytest.Pytester, marker: str, message: str) -> None:
    inner.makepyfile(f"""
        import pytest

        @pytest.mark.sandbox({marker})
        async def test_wrong(sandbox):
            print("was run")
    """)
    result = inner.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    assert "Traceback" not in result.stdout.str()
    assert "During handling" not in result.stdout.str()
    assert "was run" not in result.stdout.str()


@pytest.mark.parametrize("fixture", ["sandbox_factory", "sandbox"])
def test_a_test_that_is_not_asynchronous_gets_a_helpful_message(inner: pytest.Pytester, fixture: str) -> None:
    inner.makepyfile(f"def test_sync({fixture}): pass")
    result = inner.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_sync is no test that pytest-trio runs: make it an `async def`*"])


def test_so_does_the_host_itself(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_sync(sandbox_host): pass")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_sync is no test that pytest-trio runs: make it an `async def`*"])


def test_an_asynchronous_test_that_nobody_runs_gets_one_too(inner: pytest.Pytester) -> None:
    inner.makeini("[pytest]\n")
    inner.makepyfile("async def test_async(sandbox): pass")
    result = inner.runpytest_inprocess()
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*test_async is no test that pytest-trio runs: set `trio_mode = true`*@pytest.mark.trio*"]
    )


@pytest.mark.parametrize("fixture", ["sandbox_host", "sandbox_factory", "sandbox"])
def test_without_pytest_trio_it_says_what_is_missing(pytester: pytest.Pytester, fixture: str) -> None:
    pytester.makepyfile(f"def test_it({fixture}): pass")
    result = pytester.runpytest_inprocess("-p", "no:trio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*need pytest-trio, which is not installed, or switched off*"])


FAILING = """
    import pytest

    async def test_fails(sandbox, sandbox_factory):
        async with sandbox_factory(image="node", memory_mib=512):
            assert sandbox.image == "cobol"

    async def test_passes(sandbox):
        pass

    async def test_skips(sandbox):
        pytest.skip("not today")
"""


@pytest.mark.parametrize("arguments", [[], ["-n2"]], ids=["alone", "xdist"])
def test_what_the_machines_said_is_in_a_failed_tests_report(inner: pytest.Pytester, arguments: list[str]) -> None:
    inner.makepyfile(FAILING)
    result = inner.runpytest_inprocess("-rA", *arguments)
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*sandbox 1 (python, 256 MiB, tcg): last runs*",
            "a run of python: ended, exit code 1",
            "stdout:",
            "| run's output",
            "stderr:",
            "| ZeroDivisionError: \\x1b[[]2J",
            "*sandbox 1 (python, 256 MiB, tcg): console*",
            "(40 lines left out)",
            "console line 40",
            "console line 99",
            "*sandbox 1 (python, 256 MiB, tcg): QMP*",
            '-> {"execute": "cont"}',
            "*sandbox 2 (node, 512 MiB, tcg): console*",
            "(empty)",
            "*sandbox 2 (node, 512 MiB, tcg): QMP*",
        ]
    )
    assert result.stdout.str().count("console line 99") == 1, "not in that of the others"


def test_only_the_last_of_many_are_reported(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        async def test_fails(sandbox_factory):
            for number in range(20):
                async with sandbox_factory(memory_mib=200 + number):
                    pass
            assert False
    """)
    output = inner.runpytest_inprocess().stdout.str()
    assert output.count("MiB, tcg): console") == 4
    assert "219 MiB" in output
    assert "215 MiB" not in output


def test_progress_is_shown_though_output_is_captured(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        from trio_sandbox import Progress

        def test_it(sandbox_host_config):
            for fraction in (0.1, 0.2):
                sandbox_host_config.progress(Progress("image x", "unpacking", fraction))
            print("what tests print")
    """)
    output = inner.runpytest_inprocess().stdout.str()
    assert output.count("image x: unpacking") == 1
    assert "what tests print" not in output


def test_an_error_of_the_host_is_the_tests(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ntrio_mode = true\n")
    pytester.makeconftest("""
        import pytest
        from trio_sandbox import HostConfig

        @pytest.fixture(scope="session")
        def sandbox_host_config():
            return HostConfig(runtime_dir="/nowhere")
    """)
    pytester.makepyfile("async def test_it(sandbox): pass")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*/nowhere*"])
