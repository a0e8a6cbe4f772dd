"""Runs nox, having installed it: ``python3 bootstrap.py hello`` is ``nox -s hello``, from nothing but Python.

nox gets a virtual environment of its own, in ``.nox/bootstrap``, since systems' own Pythons let nobody install into them. The
standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOX = "nox>=2025.5.1"
#: Whose packages apt-get installs; elsewhere a program of that name may do anything.
APT_SYSTEMS = {"debian", "ubuntu"}


def main(arguments: Sequence[str]) -> None:
    """Become nox, with the sessions and arguments named."""
    if reason := runpy.run_path(str(HERE / "trio_sandbox" / "_programs.py"))["unsupported_platform"]():
        sys.exit(reason)
    if sys.version_info < (3, 11):  # noqa: UP036 - this one runs in whatever Python there is
        sys.exit(f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}: run this with a newer one.")
    environment = HERE / ".nox" / "bootstrap"
    nox = environment / "bin" / "nox"
    if not works(nox):
        if importlib.util.find_spec("ensurepip") is None and (problem := apt_install(["python3-venv"])):
            sys.exit(f"Python's own packages venv and ensurepip are needed. {problem}")
        venv.create(environment, clear=True, with_pip=True)
        subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "-q", NOX], check=True)
    os.execv(nox, [os.fspath(nox), *(["-s", *arguments] if arguments else ["--list"])])


def works(program: Path) -> bool:
    """Tell whether the program runs: the Python that it was installed with may be gone."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def apt_install(packages: Sequence[str]) -> str:
    """Install packages of the system's by apt, with sudo if need be; return what to do if that can't be, else ""."""
    by_hand = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if not system_names() & APT_SYSTEMS or shutil.which("apt-get") is None:
        return (
            "This system's packages can't be installed from here: that is done by apt-get, on Debian and Ubuntu, where they "
            f"are {' '.join(packages)}. Install them, then try again."
        )
    as_root: tuple[str, ...] = ()
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            return f"Run this as root, then try again: {by_hand}"
        as_root = ("sudo",) if sys.stdin.isatty() else ("sudo", "-n")  # -n: fail rather than ask nobody
    apt_get = (*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300")
    # Lists of unrelated sources that can't be reached are apt's warnings, not our failure.
    subprocess.run([*apt_get, "update"], check=False)
    if subprocess.run([*apt_get, "install", "-y", "--no-install-recommends", *packages], check=False).returncode != 0:
        return f"apt could not install what is missing. Run this as root, then try again: {by_hand}"
    return ""


def system_names(release: Path = Path("/etc/os-release")) -> set[str]:
    """Give the names of this system, and of those that it is like; see os-release(5)."""
    try:
        lines = release.read_text("utf-8", "replace").splitlines()
    except OSError:
        return set()
    values = [value for name, _, value in (line.partition("=") for line in lines) if name in ("ID", "ID_LIKE")]
    return {word for value in values for word in value.strip("\"'").split()}


if __name__ == "__main__":
    main(sys.argv[1:])
