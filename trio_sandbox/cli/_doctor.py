"""``trio-sandbox doctor``: what is there, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import pwd
import shutil
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs
import trio

from .. import __version__
from .._errors import ImageError, SandboxError
from .._programs import FOR_CONTAINERS, REQUIREMENTS, Requirement, missing, unsupported_platform
from ..image import ImageStore, StoredImage, default_cache_directory, examine_building
from ..machines import LedgerEntry, Room, memory_rooms, open_ledger
from ..network import find_proxy, look_up
from ..qemu import detect_accelerator, open_runtime, open_vm_manager
from ._signals import end_on_signal

#: Bytes that building the system disk and the image `python` takes while it goes on.
BUILD_BYTES = 4 * 2**30

#: What is looked up to find out whether names can be, and how long that may take.
_KNOWN_NAME, _RESOLVE_SECONDS = "pypi.org", 5.0

Verdict = Literal["ok", "note", "missing"]
_MARKS: dict[Verdict, str] = {"ok": "ok", "note": "note", "missing": "MISSING"}


@attrs.frozen
class Finding:
    """One thing that was looked at."""

    subject: str
    verdict: Verdict
    """"missing" where sandboxes can't run or images can't be built; "note" where one should know."""
    detail: str
    remedy: str = ""
    """What to do about it, where there is something to do."""
    package: str = ""
    """The Debian package to install, where that is what to do."""


def doctor(options: argparse.Namespace) -> int:
    """Examine this machine and show the findings; 0 if sandboxes can run here."""

    async def show() -> int:
        findings = await examine(options.cache_dir)
        print(as_json(findings) if options.json else as_text(findings))
        return exit_status(findings)

    return trio.run(end_on_signal, show, "cleaning up")


async def examine(cache_dir: Path | None) -> list[Finding]:
    """Look at everything; *cache_dir* None: at the user's."""
    findings = [versions(), *programs(REQUIREMENTS), *programs(FOR_CONTAINERS, absence="note")]
    if os.geteuid() != 0:
        findings.append(subordinate_ids(user_name(os.geteuid())))
    try:
        cache_dir = cache_dir or default_cache_directory()
    except SandboxError as exc:
        return [*findings, Finding("cache directory", "missing", str(exc))]  # noqa: ASYNC910 (nothing to wait for)
    stored = ImageStore(cache_dir).list()
    built = {image.name for image in stored if image.current} >= {"python", "system"}
    findings += [
        cache_directory(cache_dir),
        free_space(cache_dir),
        images(stored),
        await building(cache_dir, built=built),
    ]
    findings += [budgets(), memory_stalls(), await names(), proxy()]
    findings += await accelerator(cache_dir)
    return findings


def budgets(directory: Path | None = None) -> Finding:
    """Whether this user's processes know of each other's sandboxes, and what those take."""
    subject = "shared budgets"
    with open_ledger(directory) as ledger:
        ledger.publish(LedgerEntry(pid=os.getpid(), memory_total=0))
        others = ledger.others()
        if ledger.problem:
            return Finding(
                subject,
                "note",
                f"processes with sandboxes don't know of each other, and may together take more memory than there is: {ledger.problem}",
                "make that directory this user's own with mode 0700, or give each HostConfig.memory_budget_mib",
            )
    taken = ", ".join(f"process {entry.pid} has {entry.memory_reserved} MiB" for entry in others)
    return Finding(subject, "ok", taken or "no other process of this user has a host open")


def memory_stalls(rooms: Callable[[], list[Room]] = memory_rooms) -> Finding:
    """Whether the kernel tells how long programs wait for memory, and what is left."""
    subject = "memory pressure"
    try:
        found = rooms()
    except OSError as exc:
        return Finding(subject, "note", f"what memory is left can't be read, and no sandbox can be opened: {exc}")
    left = "; ".join(map(str, found))
    if any(room.stalls is not None for room in found):
        return Finding(subject, "ok", left)
    return Finding(
        subject,
        "note",
        f"{left}. With HostConfig.memory_overcommit only what is left decides who is admitted",
        "boot a kernel that has pressure stall information (CONFIG_PSI) with psi=1",
    )


async def names() -> Finding:
    """Whether this machine can resolve names: what guests reach by `Network`, it resolves."""
    subject = "names of hosts"
    try:
        with trio.fail_after(_RESOLVE_SECONDS):
            await trio.to_thread.run_sync(look_up, f"{_KNOWN_NAME}.", abandon_on_cancel=True)
    except (OSError, trio.TooSlowError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else f"no answer within {_RESOLVE_SECONDS:g} s"
        detail = f"{_KNOWN_NAME} can't be looked up ({why}): sandboxes with a network reach nothing by name here"
        return Finding(  # noqa: ASYNC910 - there is nothing to wait for
            subject, "note", detail, "Let this machine use a resolver, or give it a proxy: HostConfig(proxy=...)."
        )
    return Finding(subject, "ok", f"{_KNOWN_NAME} can be looked up")


def proxy() -> Finding:
    """Whether this machine's programs go through a proxy, which sandboxes do only if asked to."""
    subject = "proxy"
    try:
        found = find_proxy("environment")
    except ValueError as exc:
        return Finding(subject, "note", f"the one that the environment names can't be used: {exc}")
    if found is None:
        return Finding(subject, "ok", "the environment names none")
    return Finding(
        subject,
        "note",
        f"the environment names {found.host}:{found.port}, which sandboxes with a network go through only if asked to",
        "HostConfig(proxy='environment'), or --proxy environment",
    )


def versions() -> Finding:
    """The platform and our own version."""
    detail = (
        f"trio-sandbox {__version__}, Python {platform.python_version()}, trio {importlib.metadata.version('trio')}, "
        f"{platform.system()} {platform.release()} on {platform.machine()}"
    )
    if unsupported_platform():
        return Finding("platform", "missing", detail, "use a machine with Linux on x86_64")
    return Finding("platform", "ok", detail)


def programs(
    requirements: Iterable[Requirement], *, root: bool | None = None, absence: Verdict = "missing"
) -> list[Finding]:
    """The programs and files of the operating system; *absence*: what it is if one is not there."""
    absent = missing(requirements, root=root)
    findings: list[Finding] = []
    for requirement in requirements:
        subject = Path(requirement.name).name
        if requirement in absent:
            detail, remedy = f"not found; it {requirement.purpose}", f"install the package {requirement.package}"
            findings.append(Finding(subject, absence, detail, remedy, requirement.package))
        elif (path := requirement.find()) is not None:
            findings.append(Finding(subject, "ok", path))
    return findings


async def building(
    cache_dir: Path, *, built: bool, examine: Callable[[Path, Mapping[str, str]], Awaitable[str]] = examine_building
) -> Finding:
    """Whether images can be built here, by trying what a build does first; where they are there already it matters less."""
    try:
        return Finding("building images", "ok", await examine(cache_dir, {}))
    except (SandboxError, OSError) as exc:
        return Finding("building images", "note" if built else "missing", str(exc))  # noqa: ASYNC910 (it waited for its failure)


def user_name(uid: int) -> str:
    """Give a user's name, or the number of one who has none; the files of subordinate ids take either."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def subordinate_ids(user: str, files: Sequence[Path] = (Path("/etc/subuid"), Path("/etc/subgid"))) -> Finding:
    """Whether *user* has ranges of user and group ids to hand out, which image builds need."""
    without = [file for file in files if not _has_range(file, user)]
    if not without:
        return Finding("subordinate ids", "ok", f"{user} has ranges in {' and '.join(map(str, files))}")
    return Finding(
        "subordinate ids",
        "missing",
        f"{user} has no range of 65536 in {' and '.join(map(str, without))}; images can't be built by this user",
        f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
    )


def _has_range(file: Path, user: str) -> bool:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        name, _, numbers = line.partition(":")
        _, _, count = numbers.partition(":")
        if name == user and count.isdigit() and int(count) >= 65536:
            return True
    return False


def _existing_parent(directory: Path) -> Path:
    """Give *directory* itself, or the closest directory above it that exists."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


def cache_directory(directory: Path) -> Finding:
    """Whether images can be kept."""
    existing = _existing_parent(directory)
    try:
        ImageStore(directory).check_trusted()
    except ImageError as exc:
        return Finding("cache directory", "missing", str(exc))
    if os.access(existing, os.W_OK | os.X_OK) and existing.is_dir():
        return Finding("cache directory", "ok", str(directory) + ("" if existing == directory else " (not made yet)"))
    return Finding(
        "cache directory",
        "missing",
        f"{directory}: {existing} can't be written",
        "set XDG_CACHE_HOME, HostConfig.cache_dir or --cache-dir to a directory that can",
    )


def free_space(directory: Path, *, needed: int = BUILD_BYTES) -> Finding:
    """Whether there is room to build images."""
    existing = _existing_parent(directory)
    free = shutil.disk_usage(existing).free
    detail = f"{free / 2**30:.1f} GiB in {existing}"
    if free >= needed:
        return Finding("free space", "ok", detail)
    return Finding(
        "free space",
        "note",
        f"{detail}; building images takes up to {needed / 2**30:.0f} GiB",
        "free some, or use --cache-dir",
    )


def images(stored: Iterable[StoredImage]) -> Finding:
    """What is built already."""
    names = sorted({image.name for image in stored if image.current})
    if names:
        return Finding("images", "ok", ", ".join(names))
    return Finding(
        "images", "note", "none is built", "nothing: the first use builds what it needs; or: trio-sandbox image build"
    )


async def accelerator(cache_dir: Path) -> list[Finding]:
    """What will run the guests and why, and what QEMU will be confined by."""
    try:
        async with open_runtime(None) as runtime:
            chosen = await detect_accelerator(cache_dir=cache_dir, environment=runtime.environment)
            async with open_vm_manager(runtime=runtime, accelerator=chosen, cgroup="auto") as machines:
                confined = machines.confinement
    except (SandboxError, OSError) as exc:
        return [Finding("accelerator", "missing", str(exc))]  # noqa: ASYNC910 (it waited for its failure)
    confinement = Finding("confinement", "ok", confined.describe())
    if weaknesses := confined.weaknesses():
        detail = "; ".join([confinement.detail, *(weakness for weakness, _ in weaknesses)])
        confinement = Finding("confinement", "note", detail, "; ".join(remedy for _, remedy in weaknesses))
    if chosen.hardware:
        return [Finding("accelerator", "ok", f"{chosen.name}: {chosen.reason}"), confinement]
    emulation = Finding(
        "accelerator",
        "note",
        f"{chosen.name} (software emulation): {chosen.reason}. It is slow, and by QEMU's own policy "
        "no security boundary: code that means harm may break out of it",
        "to run hostile code use a machine with KVM, and require_hardware=True",
    )
    return [emulation, confinement]


def exit_status(findings: Iterable[Finding]) -> int:
    """Give 1 if something is missing, else 0."""
    return int(any(finding.verdict == "missing" for finding in findings))


def as_json(findings: Iterable[Finding]) -> str:
    """Write the findings for programs."""
    rows = [attrs.asdict(finding) for finding in findings]
    return json.dumps({"ok": exit_status(findings) == 0, "findings": rows}, indent=2)


def as_text(findings: Sequence[Finding], *, columns: int = 100) -> str:
    """Write the findings for people; the packages that are missing come as one command at the end."""
    indent = " " * (10 + max(len(finding.subject) for finding in findings))
    lines: list[str] = []
    for finding in findings:
        head = f"{_MARKS[finding.verdict]:8}{finding.subject}".ljust(len(indent))
        lines += textwrap.wrap(finding.detail, columns, initial_indent=head, subsequent_indent=indent)
        if finding.remedy:
            lines += textwrap.wrap(
                finding.remedy, columns, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   "
            )
    if packages := sorted({finding.package for finding in findings if finding.package}):
        lines += ["", "As root: apt-get install --no-install-recommends " + " ".join(packages)]
    lines += ["", "Something is missing." if exit_status(findings) else "Sandboxes can run here."]
    return "\n".join(lines)
