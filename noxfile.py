# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.5.1"]
# ///
"""Every task of this project: ``nox -s hello`` to see it work, ``nox -s tests`` to check it.

Nothing has to be prepared. Python packages go into nox's own virtual environments, system
packages are installed by apt where they are missing.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests"]
# virtualenv comes with nox; uv is faster where it is installed.
nox.options.default_venv_backend = "uv|virtualenv"

HERE = Path(__file__).resolve().parent
PYPROJECT = nox.project.load_toml(HERE / "pyproject.toml")

#: Files of tests side by side: a virtual machine under emulation keeps one processor busy, and waits a lot.
IN_PARALLEL = ("-n", "2", "--dist", "loadfile")

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
    install_system_packages(session)
    session.install("-e.[cli]", *group("tests"))
    if not session.posargs:
        for name in CHECKS:
            session.notify(name)
    session.run("pytest", *(session.posargs or IN_PARALLEL))


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
    session.run("flake8-async", *FLAKE8_ASYNC, *python_files("trio_sandbox", without="trio_sandbox/guest"))
    session.run("flake8-async", *FLAKE8_ASYNC_GUEST, *trio_files("trio_sandbox/guest"))
    session.run("flake8-async", *FLAKE8_ASYNC_TESTS, *python_files("pytest_trio_sandbox", "tests"))


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types twice, and that the public interface is typed completely."""
    # Not editable: `--verifytypes` looks at the installed package, as a user's checker does.
    session.install(".[cli]", *group("typing"))
    session.run("mypy", *session.posargs)
    # The wheel that pyright[nodejs] brings; no download at run time.
    session.run("pyright", *session.posargs)
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
    session.install("-e.", *group("bench"))
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


# --- What the sessions share ---

#: Everything is on, the optional rules about checkpoints as well, except two that misfire here:
#: 114 wants a list of the names of all functions with `task_status`, and 128 does not see that
#: `task_status` is handed on.
FLAKE8_ASYNC = ("--enable=ASYNC", "--disable=ASYNC114,ASYNC128")
#: In the guest, besides: nobody but the agent calls the agent's functions, and a checkpoint that nobody
#: needs costs each run a turn of the scheduler, which is slow under emulation (910 to 913).
FLAKE8_ASYNC_GUEST = ("--enable=ASYNC", "--disable=ASYNC114,ASYNC128,ASYNC91")
#: In tests and in the pytest plugin, besides: fixtures are generators (119, 900, 911), fakes have the signatures of what they
#: stand for (109, 124), nobody who waits for a test cares where its checkpoints are (910 to 913), and a test may hold its own
#: event loop up, or look again and again at what tells nobody when it changes (110, 230, 232).
FLAKE8_ASYNC_TESTS = (
    "--enable=ASYNC",
    "--disable=ASYNC109,ASYNC110,ASYNC114,ASYNC119,ASYNC124,ASYNC128,ASYNC230,ASYNC232,ASYNC900,ASYNC91",
)


def group(name: str) -> tuple[str, ...]:
    """Give the requirements of a dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def python_files(*directories: str, without: str | None = None) -> list[str]:
    """Give every Python file below *directories*, for tools that take no directory."""
    excluded: set[str] = set() if without is None else set(python_files(without))
    files = [str(path) for directory in directories for path in sorted((HERE / directory).rglob("*.py"))]
    return [file for file in files if file not in excluded]


def trio_files(directory: str) -> list[str]:
    """Give the Python files below *directory* that use Trio; in others there is no `Cancelled` to think of."""
    return [
        file
        for file in python_files(directory)
        if re.search(r"^ *import trio$", Path(file).read_text("utf-8"), re.MULTILINE)
    ]


def install_system_packages(session: nox.Session) -> None:
    """Install by apt what is missing of the operating system; do nothing where all is there."""
    # The library's own list, run by itself: nothing of ours is installed yet.
    programs = runpy.run_path(str(HERE / "trio_sandbox" / "_programs.py"))
    missing = programs["missing"]()
    if not missing:
        return
    wanted = ", ".join(f"{requirement.name} ({requirement.purpose})" for requirement in missing)
    packages = sorted({requirement.package for requirement in missing})
    by_hand = f"apt-get install --no-install-recommends {' '.join(packages)}"
    session.log(f"not installed: {wanted}")
    if shutil.which("apt-get") is None:
        session.error(
            f"These are needed and not installed: {wanted}. There is no apt-get here to install them with; "
            f"on Debian and Ubuntu they are in the packages {' '.join(packages)}. Install them, then try again."
        )
    as_root: tuple[str, ...] = ()
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            session.error(f"Run this as root, then try again: {by_hand}")
        as_root = ("sudo",) if sys.stdin.isatty() else ("sudo", "-n")  # -n: fail rather than ask nobody
    apt_get = (*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300")
    try:
        # Lists of unrelated sources that can't be reached are apt's warnings, not our failure.
        session.run(*apt_get, "update", external=True, success_codes=[0, 100])
        session.run(*apt_get, "install", "-y", "--no-install-recommends", *packages, external=True)
    except CommandFailed:
        session.error(f"apt could not install what is missing. Run this as root, then try again: {by_hand}")
    if still := [requirement.name for requirement in programs["missing"]()]:
        session.error(f"{' '.join(packages)} are installed, and yet {', '.join(still)} can't be found")


if __name__ == "__main__":
    nox.main()
