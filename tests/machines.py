"""Other machines to try this checkout on: fresh Debian trees, in namespaces of their own. ``nox -s machines`` runs it.

A tree has Python, git and sudo, as a machine has on which somebody has just cloned this repository; it is kept in a cache directory,
and made anew when its recipe changes. What a run does in it goes to a layer over the tree, which is thrown away with
everything else when the run ends. Package indexes, proxies and certificates are those of this machine, read when it runs.
The kernel is this machine's, too.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-sandbox-machines"

#: Debian's names, and what is different there.
SUITES = {"trixie": "Debian 13: QEMU 10.0, Python 3.13", "bookworm": "Debian 12: QEMU 7.2, Python 3.11"}
PACKAGES = ("ca-certificates", "git", "mount", "python3", "sudo")
#: An ordinary user who may become root, as the first user of a machine may.
USER = "ann"
ADD_USER = (
    f'chroot "$1" useradd --create-home --shell /bin/bash {USER}; '
    f'echo "{USER} ALL=(ALL) NOPASSWD: ALL" > "$1/etc/sudoers.d/{USER}"'
)
#: Tests of what differs most from machine to machine.
TELLING = ("templates", "forks", "lifecycle", "vm", "sandbox", "overlay_pool", "storage_daemon")
COMMANDS = (
    "python3 bootstrap.py hello",
    f"python3 bootstrap.py tests -- -rs {' '.join(f'tests/qemu/test_{name}.py' for name in TELLING)}",
)
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
#: What package clients take from the environment, beside what pip tells of itself.
VARIABLES = re.compile(r"(?i:https?_proxy|no_proxy)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE")

#: Run as process 1 of namespaces of its own: what it mounts ends with it. $1 is the work directory, $2 the tree, $3 the user, $4 the
#: command, and the others are directories to show.
ENTER = """
set -e
work=$1 tree=$2 user=$3 command=$4; shift 4
mount --make-rprivate /
mount -t overlay -o "lowerdir=$tree,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cd "$work/root"
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup || echo "no control groups here"
for directory; do mkdir -p "./$directory"; mount --bind -o ro "$directory" "./$directory"; done
pivot_root . mnt  # in a chroot there are no user namespaces for ordinary users
cd /
umount -l /mnt
su - "$user" -c "$command"
exit $?  # not exec: process 1 is to reap what others leave
"""


def main() -> int:
    """Run the commands on each machine; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="nox -s machines --", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--suite", choices=SUITES, action="append", help="which Debian; default: all")
    parser.add_argument("--root", action="store_const", const="root", dest="user", help="as root only")
    parser.add_argument("--user", action="store_const", const=USER, dest="user", help="as an ordinary user only")
    parser.add_argument("command", nargs="*", help=f"what to run in the checkout; default: {'; '.join(COMMANDS)}")
    options = parser.parse_args()
    if problem := missing_rights():
        print(f"machines: {problem}", file=sys.stderr)
        return 2
    commands = [shlex.join(options.command)] if options.command else COMMANDS
    failed = 0
    with lock_cache():
        for suite in options.suite or SUITES:
            tree = make_tree(suite)
            for user in [options.user] if options.user else ("root", USER):
                print(f"machines: {SUITES[suite]}, as {user}", flush=True)
                failed |= run(tree, user, commands)
    return failed


@contextmanager
def lock_cache() -> Generator[None]:
    """Be the only one that works there, and remove what runs left that were killed: their mounts went with them."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in (*CACHE.glob("run-*"), *CACHE.glob("staging-*")):
            shutil.rmtree(leftover)
        yield


def missing_rights() -> str:
    """Say why trees can't be entered here, "" if they can."""
    if os.geteuid() != 0:
        return "only root can enter a tree: run it as root, or on a machine of your own"
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is needed: apt-get install mmdebstrap"
    with tempfile.TemporaryDirectory() as directory:
        attempt = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", directory],
            capture_output=True,
            text=True,
            check=False,
        )
    if attempt.returncode != 0:
        return f"this root may not mount anything: {attempt.stderr.strip()}; it takes the capability SYS_ADMIN"
    return ""


def make_tree(suite: str) -> Path:
    """Return the tree of *suite*, which is made unless there is one of this recipe; those of other recipes are removed."""
    digest = hashlib.sha256(repr((suite, PACKAGES, ADD_USER)).encode()).hexdigest()[:16]
    tree = CACHE / f"{suite}-{digest}"
    if tree.is_dir():
        return tree
    for other in CACHE.glob(f"{suite}-*"):
        shutil.rmtree(other)
    print(f"machines: making a tree of {SUITES[suite]}", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="staging-") as staging:
        made = Path(staging, "tree")
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        argv += ["--dpkgopt=force-unsafe-io"]
        subprocess.run([*argv, f"--customize-hook={ADD_USER}", suite, made, *mirrors()], check=True)
        made.rename(tree)
    return tree


def run(tree: Path, user: str, commands: Sequence[str]) -> int:
    """Run *commands* as *user* on a machine that has just this tree and the checkout; return 1 if one failed, else 0."""
    pip = pip_configuration()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as directory:
        work = Path(directory)
        for name in ("upper", "work", "root"):
            (work / name).mkdir()
        work.chmod(0o755)
        (work / "upper").chmod(0o755)
        configure(work / "upper", pip)
        home = Path("root") if user == "root" else Path("home", user)
        copy_checkout(work / "upper" / home / "trio-sandbox", user, tree)
        assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables(os.environ).items())
        for command in commands:
            line = f"cd trio-sandbox && env {assignments} {command}"
            print(f"machines: $ {command}", flush=True)
            argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
            if subprocess.run([*argv, work, tree, user, line, *local_indexes(pip)], check=False).returncode != 0:
                print(f"machines: failed: {command}", flush=True)
                return 1
    return 0


def mirrors() -> list[str]:
    """Return where this machine gets Debian's packages from, if it is a Debian."""
    try:
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return []
    return [uri for uri in dict.fromkeys(listed.stdout.split()) if uri.rstrip("/").endswith("/debian")][:1]


def configure(upper: Path, pip: Mapping[str, str]) -> None:
    """Give a machine this one's name servers, certificates, and the settings of its apt and pip."""
    for path in ("/etc/resolv.conf", CERTIFICATES, *pip.values()):
        copy(Path(path), upper)
    write(upper / "etc/hosts", "127.0.0.1 localhost\n")  # every machine has one, but a tree that has never been started
    write(upper / "etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")  # it is thrown away soon
    settings = "".join(f"{name} = {value}\n" for name, value in pip.items())
    write(upper / "etc/pip.conf", f"[global]\n{settings}")
    if shutil.which("apt-config"):
        acquire = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True)
        write(upper / "etc/apt/apt.conf.d/99machine", acquire.stdout)


def copy(path: Path, upper: Path) -> None:
    """Copy a file of this machine to where it is there, if there is one."""
    if path.is_absolute() and path.is_file():
        write(upper / path.relative_to("/"), path.read_text("utf-8"))


def write(path: Path, text: str) -> None:
    """Make a file that everybody may read, in directories that everybody may enter."""
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        parent.chmod(0o755)
    path.write_text(text, "utf-8")
    path.chmod(0o644)


def copy_checkout(target: Path, user: str, tree: Path) -> None:
    """Copy what git knows of, as it is in the working tree, to be the user's own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    target.mkdir(parents=True)
    for name in os.fsdecode(listed.stdout).split("\0"):
        if name and os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    uid, gid, home = next(
        (fields[2], fields[3], fields[5])
        for fields in (line.split(":") for line in (tree / "etc/passwd").read_text("utf-8").splitlines())
        if fields[0] == user
    )
    # The home's directory comes with the layer: its owner and mode are what the tree has.
    mode = (tree / home.lstrip("/")).stat().st_mode & 0o777
    target.parent.chmod(mode)
    subprocess.run(["chown", "-R", f"{uid}:{gid}", target.parent], check=True)


def pip_configuration() -> dict[str, str]:
    """Return the settings of this machine's pip, from its files and the environment; of one that is there twice, all values."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    return merge_settings(listed.stdout)


def merge_settings(listing: str) -> dict[str, str]:
    """Read what ``pip config list`` says."""
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        values = found.setdefault(name.rpartition(".")[2], [])
        values += [word for word in value.strip("'\"").split() if word not in values]
    return {name: " ".join(values) for name, values in found.items()}


def local_indexes(configuration: Mapping[str, str]) -> list[str]:
    """Return the directories of this machine that pip takes packages from; all that is needed of a tree of them."""
    words = [
        word for name in ("index-url", "extra-index-url", "find-links") for word in configuration.get(name, "").split()
    ]
    paths = [unquote(urlsplit(word).path) if word.startswith("file:") else word for word in words]
    # An index refers to files beside it.
    wanted = (os.path.dirname(path) if path.endswith("/simple") else path for path in paths if os.path.isabs(path))
    return sorted({path for path in wanted if os.path.isdir(path)})


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what package clients here take from the environment."""
    return {name: value for name, value in environment.items() if VARIABLES.fullmatch(name)}


if __name__ == "__main__":
    sys.exit(main())
