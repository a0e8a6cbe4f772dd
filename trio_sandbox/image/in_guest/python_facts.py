"""Says what packages for the Python that runs it have to be, and where they go: on a line of JSON, behind a mark.

Its text is run by the Python of an image, in a virtual machine of that image, so it stands alone: the standard library of Python 3.8 or later.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig

#: The names that the loader of musl may have.
_MUSL_LOADER = "/lib/ld-musl-x86_64.so.1"
#: More say nothing more.
_MOST_INSTALLED = 5000


def _find_libc() -> list[str]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        name = version = ""
    if not name and os.path.exists(_MUSL_LOADER):
        # Without arguments it says what it is.
        said = subprocess.run([_MUSL_LOADER], stderr=subprocess.PIPE, check=False).stderr.decode("ascii", "replace")
        name = "musl"
        version = next((line.partition(" ")[2] for line in said.splitlines() if line.startswith("Version ")), "")
    return [name, version]


def _find_installed(directories: set[str]) -> list[list[str]]:
    """Return names and versions of what is installed, by the names of the directories that describe it."""
    found: list[list[str]] = []
    for directory in directories:
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            stem, kind = os.path.splitext(name)
            parts = stem.split("-")
            if kind in (".dist-info", ".egg-info") and len(parts) > 1:
                found.append(parts[:2])
    return sorted(found)[:_MOST_INSTALLED]


def _say(mark: str) -> None:
    paths = sysconfig.get_paths()
    facts = {
        "implementation": sys.implementation.name,
        "version": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "wide": sys.maxsize > 2**32,
        "threaded": "t" in sys.abiflags,
        "libc": _find_libc(),
        "interpreter": sys.executable or "",
        "site": paths["purelib"],
        "scripts": paths["scripts"],
        "prefix": paths["data"],
        "looked_for": paths["purelib"] in [*site.getsitepackages(), *sys.path],
        "installed": _find_installed({paths["purelib"], paths["platlib"]}),
    }
    # A line of its own, whatever `sitecustomize` has printed.
    sys.stdout.write("\n" + mark + json.dumps(facts) + "\n")


if __name__ == "__main__":
    _say(sys.argv[1])
