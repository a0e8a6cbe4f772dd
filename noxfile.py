# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.5.1"]
# ///
"""Every task of this project: ``nox -s hello`` to see it work, ``nox -s tests`` to check it.

Nothing has to be prepared. Python packages go into nox's own virtual environments, system
packages are installed by apt where they are missing.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests"]
# virtualenv comes with nox; uv is faster where it is installed.
nox.options.default_venv_backend = "uv|virtualenv"

HERE = Path(__file__).resolve().parent
PYPROJECT = nox.project.load_toml(HERE / "pyproject.toml")

#: Files of tests side by side: a virtual machine under emulation keeps one processor busy, and waits a lot.
IN_PARALLEL = ("-n", "2", "--dist", "loadfile")

#: Programs that only tests use, their Debian packages, and what for.
TESTS_NEED = (
    ("busybox", "busybox-static", "is the guest of confinement tests without a virtual machine"),
    ("gcc", "build-essential", "builds a static program, which resolves names by itself"),
    ("git", "git", "reads our diffs in tests"),
    ("go", "golang-go", "builds one that brings its own resolver"),
    ("musl-gcc", "musl-tools", "builds programs with another libc"),
    ("node", "nodejs", "runs the guest's JavaScript in tests without a virtual machine"),
    ("npm", "npm", "chooses and fetches packages for JavaScript"),
    ("skopeo", "skopeo", "fetches container images"),
    ("umoci", "umoci", "is what the merging of layers is compared with"),
    ("zstd", "zstd", "unpacks some layers of container images"),
)

#: Modules of `trio_sandbox.integrations` that need large packages, which only `integrations` installs.
LARGE = ("inspect", "deepagents", "pydantic_ai")

#: What `tests` runs as well, unless it is given arguments of its own.
CHECKS = ("lint", "typing", "docs")

HELLO = """\
import platform
print("Hello from Linux", platform.release(), "and Python", platform.python_version(), "in a virtual machine.")
"""


@nox.session
def hello(session: nox.Session) -> None:
    """Run a line of Python in a fresh virtual machine; builds its image the first time."""
    install_system_packages(session)
    session.install("-e.[cli]")
    session.run("trio-sandbox", "run", "--timings", "-c", HELLO)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, then `lint`, `typing` and `docs`; with arguments: pytest alone, with them."""
    install_system_packages(session, *TESTS_NEED)
    session.install("-e.[cli]", *group("tests"))
    if not session.posargs:
        for name in CHECKS:
            session.notify(name)
    session.run("pytest", *(session.posargs or (*IN_PARALLEL, "-rs")))  # what is skipped is said, and why


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and Trio usage; ``-- --fix`` corrects what can be corrected."""
    session.install(*group("lint"))
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix", ".")
        session.run("ruff", "format", ".")
    else:
        session.run("ruff", "check", ".")
        session.run("ruff", "format", "--check", ".")
    # It reads no configuration file of its own outside flake8.
    session.run("flake8-async", *FLAKE8_ASYNC, *python_files("trio_sandbox", without=INNER))
    session.run("flake8-async", *FLAKE8_ASYNC_INNER, *trio_files(*INNER))
    session.run("flake8-async", *FLAKE8_ASYNC_TESTS, *python_files("pytest_trio_sandbox", "tests"))


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types twice, and that the public interface is typed completely."""
    # Not editable: `--verifytypes` looks at the installed package, as a user's checker does.
    session.install(".[cli,mcp]", *group("typing"))
    session.run("mypy", *session.posargs)
    # The wheel that pyright[nodejs] brings; no download at run time.
    session.run("pyright", *session.posargs)
    # `integrations` checks these, where their frameworks are.
    for name in LARGE:
        for module in Path(session.virtualenv.location).glob(
            f"lib/python*/site-packages/trio_sandbox/integrations/{name}.py"
        ):
            module.unlink()
    session.chdir(session.create_tmp())
    session.run("pyright", "--verifytypes", "trio_sandbox", "--ignoreexternal")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into ``docs/_build``; every warning is an error."""
    session.install(".", *group("docs"))
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")
    session.run("towncrier", "build", "--draft", "--version", "next")
    session.log(f"open {HERE / 'docs/_build/html/index.html'}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, and compare with the limits; ``-- NAME ...`` picks benchmarks, ``-- --json``."""
    install_system_packages(session)
    session.install("-e.[ray]", *group("bench"))
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Choose the packages of the image `data` anew, and write their lock; more arguments are uv's, ``-- --upgrade-package pandas``."""
    session.install("uv")
    path = HERE / "trio_sandbox" / "image" / "pylock.data.toml"
    session.run(
        *("uv", "pip", "compile", "--python-version", "3.13", "--python-platform", "x86_64-manylinux_2_40"),
        *("--only-binary", ":all:", "--format", "pylock.toml", "--no-header", "--output-file", str(path)),
        *(session.posargs or ("--upgrade",)),
        str(path.with_name("data.in")),
    )
    path.write_text(public_addresses(path.read_text("utf-8")), "utf-8")


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Do thousands of operations, and look for what is lost, hangs or grows; ``-- --minutes N --seed S [PART ...]``."""
    install_system_packages(session)
    session.install("-e.", *group("soak"))
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session(default=False)
def integrations(session: nox.Session) -> None:
    """Have frameworks check what works with them, by their own suites: inspect_ai, deepagents, Pydantic AI, MCP; run examples."""
    install_system_packages(session)
    session.install("-e.[cli,mcp,inspect,deepagents,pydantic-ai]", *group("integrations"))
    modules = [str(HERE / "trio_sandbox" / "integrations" / f"{name}.py") for name in LARGE]
    session.run("mypy", *modules, *python_files("tests/integrations"))
    asyncio = ("-o", "asyncio_mode=auto")
    for checks, *options in (("inspect_self_check",), ("pydantic_ai_conformance",), ("deepagents_standard", *asyncio)):
        session.run("pytest", "-c", "tests/integrations/pytest.ini", *options, f"tests/integrations/{checks}.py")
    for backend in ("asyncio", "trio"):
        session.run("python", "tests/integrations/inspect_eval.py", env={"INSPECT_ASYNC_BACKEND": backend})
    for example in ("deepagents", "pydantic_ai", "shell_tool", "smolagents"):
        session.run("python", f"tests/integrations/{example}_example.py")
    session.run("python", "-m", "tests.integrations.mcp_conformance", env={"NPM_PREFIX": session.create_tmp()})


@nox.session(default=False)
def fleet(session: nox.Session) -> None:
    """Try sandboxes on the nodes of a Ray cluster, which is on this machine; with arguments: pytest with them."""
    install_system_packages(session)
    session.install("-e.[cli,ray]", *group("tests"))
    # Ray warns of much that is its own affair.
    session.run("pytest", "-W", "default", "-o", "python_files=on_*.py", *(session.posargs or ("-rP", "tests/fleet")))
    session.run("python", "tests/fleet/example.py")


@nox.session(default=False)
def machines(session: nox.Session) -> None:
    """Try the two commands on fresh machines: Debian 12 and 13, as root and as a user; ``-- --suite trixie --user [COMMAND]``."""
    session.install("pip")  # it tells where packages come from here
    session.run("python", "-m", "tests.machines", *session.posargs)


# --- What the sessions share ---

#: Everything is on, the optional rules about checkpoints as well, except three that misfire here:
#: 114 wants a list of the names of all functions with `task_status`, 128 does not see that
#: `task_status` is handed on, and 119 does not know our decorator, as 900 does.
FLAKE8_ASYNC = (
    "--enable=ASYNC",
    "--disable=ASYNC114,ASYNC119,ASYNC128",
    "--transform-async-generator-decorators=open_block",
)
#: In the guest, in the gateway and in a fleet's nodes, besides: nobody but the agent calls the agent's functions, and a checkpoint
#: that nobody needs costs each run, and each piece of what is relayed, a turn of the scheduler (910 to 913).
FLAKE8_ASYNC_INNER = (
    "--enable=ASYNC",
    "--disable=ASYNC114,ASYNC119,ASYNC128,ASYNC91",
    "--transform-async-generator-decorators=open_block",
)
INNER = ("trio_sandbox/guest", "trio_sandbox/network", "trio_sandbox/fleet")
#: In tests and in the pytest plugin, besides: fixtures are generators (119, 900, 911), fakes have the signatures of what they
#: stand for (109, 124), nobody who waits for a test cares where its checkpoints are (910 to 913), and a test may hold its own
#: event loop up, or look again and again at what tells nobody when it changes (110, 230, 232).
FLAKE8_ASYNC_TESTS = (
    "--enable=ASYNC",
    "--disable=ASYNC109,ASYNC110,ASYNC114,ASYNC119,ASYNC124,ASYNC128,ASYNC230,ASYNC232,ASYNC900,ASYNC91",
)


def public_addresses(lock: str) -> str:
    """Return a lock in which files are where everybody finds them: a mirror's addresses are of no use to others."""
    return re.sub(r'url = "[^"]*?/packages/', 'url = "https://files.pythonhosted.org/packages/', lock)


def group(name: str) -> tuple[str, ...]:
    """Give the requirements of a dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def python_files(*directories: str, without: Sequence[str] = ()) -> list[str]:
    """Give every Python file below *directories*, for tools that take no directory."""
    excluded: set[str] = set(python_files(*without)) if without else set()
    files = [str(path) for directory in directories for path in sorted((HERE / directory).rglob("*.py"))]
    return [file for file in files if file not in excluded]


def trio_files(*directories: str) -> list[str]:
    """Give the Python files below *directories* that use Trio; in others there is no `Cancelled` to think of."""
    return [
        file
        for file in python_files(*directories)
        if re.search(r"^ *import trio$", Path(file).read_text("utf-8"), re.MULTILINE)
    ]


def install_system_packages(session: nox.Session, *more: tuple[str, str, str]) -> None:
    """Install what is missing of the operating system, *more* (name, package, purpose) besides; nothing where all is there.

    Also what only ordinary users need: root may have to install it, and the next to come may be none.
    """
    # The library's own list, run by itself: nothing of ours is installed yet.
    programs = runpy.run_path(str(HERE / "trio_sandbox" / "_programs.py"))
    if reason := programs["unsupported_platform"]():
        session.error(reason)
    requirements = [*programs["REQUIREMENTS"], *(programs["Requirement"](*requirement) for requirement in more)]
    missing = programs["missing"](requirements, root=False)
    if not missing:
        return
    wanted = ", ".join(f"{requirement.name} ({requirement.purpose})" for requirement in missing)
    packages = sorted({requirement.package for requirement in missing})
    session.log(f"not installed: {wanted}")
    if problem := runpy.run_path(str(HERE / "bootstrap.py"))["apt_install"](packages):
        session.error(f"These are needed and not installed: {wanted}. {problem}")
    if still := [requirement.name for requirement in programs["missing"](requirements, root=False)]:
        session.error(f"{' '.join(packages)} are installed, and yet {', '.join(still)} can't be found")


if __name__ == "__main__":
    nox.main()
