"""Configuration: frozen values that can be compared, printed and sent elsewhere."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping, Set as AbstractSet
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypedDict, cast

import attrs

from . import constants
from ._checks import (
    check_callable,
    check_flag,
    check_seconds,
    check_text,
    instance,
    number,
    one_of,
    or_none,
    to_path,
    whole_number,
)
from ._image import AnyImage, Image, to_image
from ._metadata import mark_public
from ._network import Network
from ._refused import check_refused


def _timeout(default: float) -> float:
    field: float = attrs.field(default=default, validator=check_seconds)
    return field


@attrs.frozen(kw_only=True)
class Timeouts:
    """Bounds on the library's own operations, in seconds; `math.inf` switches one off.

    They catch what hangs. Your own cancel scopes say how long *your* code may run.
    """

    qmp_connect: float = _timeout(constants.QMP_CONNECT_TIMEOUT)
    """From connecting to a QMP server until its capabilities are negotiated."""
    qmp_command: float = _timeout(constants.QMP_COMMAND_TIMEOUT)
    """One QMP command that this library sends on its own account."""
    storage_daemon_start: float = _timeout(constants.STORAGE_DAEMON_START_TIMEOUT)
    """From spawning the storage daemon until it answers."""
    overlay: float = _timeout(constants.OVERLAY_TIMEOUT)
    """Making one overlay with the storage daemon."""
    balloon: float = _timeout(constants.BALLOON_TIMEOUT)
    """Until the guest follows a new balloon target."""
    accelerator_probe: float = _timeout(constants.ACCELERATOR_PROBE_TIMEOUT)
    """Until the tiny guest has proved an accelerator."""
    boot: float = _timeout(constants.BOOT_TIMEOUT)
    """From spawning QEMU until the guest's agent says hello."""
    agent_silence: float = _timeout(constants.AGENT_SILENCE_TIMEOUT)
    """How long a guest may leave a ping unanswered before its VM is destroyed."""
    interrupt_grace: float = _timeout(constants.INTERRUPT_GRACE)
    """Between SIGINT and SIGKILL when a run or process in the guest is cancelled."""
    kill: float = _timeout(constants.KILL_TIMEOUT)
    """Until the guest acknowledges a SIGKILL; after that its VM is destroyed."""
    connect: float = _timeout(constants.CONNECT_TIMEOUT)
    """Until a connection from a guest to the outside is made; see `Network`."""
    admission: float = _timeout(constants.ADMISSION_TIMEOUT)
    """How long a sandbox waits for memory or disk that other processes' sandboxes hold, see `HostConfig.memory_budget_mib`, or for memory that is
    tight, see `HostConfig.memory_overcommit`."""
    process_exit: float = _timeout(constants.PROCESS_EXIT_GRACE)
    """Between asking one of the host's processes to end and killing it."""


@attrs.frozen
class Progress:
    """One step of long work, to show to people."""

    stage: str
    """What is being done, for instance ``"image python"``."""
    message: str
    """What is happening just now."""
    fraction: float | None = None
    """How much of the stage is done, from 0 to 1, where that is known."""


def _ignore_progress(progress: Progress) -> None:
    """Take no notice: what `HostConfig.progress` does unless asked otherwise."""


class _Counts(Protocol):
    """What type checkers take for `HostConfig.warm`: a mapping, whose keys they would have invariant otherwise.

    So the field's own type, each kind of key alone and both in one mapping are all good, and `HostConfig` is a function
    without necessary parameters, as in ``attrs.field(factory=HostConfig)``.
    """

    def items(self) -> AbstractSet[tuple[AnyImage | tuple[AnyImage, SandboxConfig], int]]: ...


def _warm(counts: _Counts) -> Mapping[tuple[AnyImage, SandboxConfig], int]:
    """Check the counts of a pool, and give each its whole configuration; a copy, so that nobody can change it."""
    if not isinstance(counts, Mapping):
        raise TypeError(f"`warm` must be a mapping from images to numbers, not {counts!r}")
    checked: dict[tuple[AnyImage, SandboxConfig], int] = {}
    for key, count in cast("Mapping[object, object]", counts).items():
        match key:
            case str() | Image():
                image, config = to_image(key), SandboxConfig()
            case (str() | Image() as image, SandboxConfig() as config):
                image = to_image(image)
            case _:
                raise TypeError(
                    f"a key of `warm` must be an image's name, or a pair (name, SandboxConfig), not {key!r}; "
                    "an Image can take the place of the name"
                )
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"`warm[{key!r}]` must be a number of machines, not {count!r}")
        if not image or count < 0:
            raise ValueError(f"`warm` must have the names of images, and numbers from 0, not {key!r}: {count}")
        if config.mounts:
            raise ValueError(
                "`warm` must have no configuration with `mounts`: a mount is a copy of the directory when the sandbox opens"
            )
        if (image, config) in checked:
            raise ValueError(f"`warm` has image {image!r} with one and the same configuration twice")
        checked[image, config] = count
    return checked


def _cache_dir(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else to_path(value, "cache_dir")


def _certificates(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else to_path(value, "ca_certificates", "file")


def _cgroup(value: str | os.PathLike[str]) -> Literal["auto", "off"] | Path:
    if value == "auto":
        return "auto"
    if value == "off":
        return "off"
    path = to_path(value, "cgroup", "control group")
    if not path.is_absolute() or "\n" in str(path):
        raise ValueError(
            f"`cgroup` must be 'auto', 'off' or the absolute path of a control group, not {str(path)!r:.100}"
        )
    return path


def _runtime_dir(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else to_path(value, "runtime_dir")


@attrs.frozen(kw_only=True)
class HostConfig:
    """How a host works. Every field has a default."""

    cache_dir: Path | None = attrs.field(default=None, converter=_cache_dir)
    """Where images live; None: ``trio-sandbox`` in the user's cache directory (XDG)."""
    runtime_dir: Path | None = attrs.field(default=None, converter=_runtime_dir)
    """Where a host makes its own directory, with sockets and overlays; None: ``TMPDIR`` if that is set, else ``/var/tmp``.

    Guests' writes go there, so it should not be in memory. Its path may have at most 66 bytes.
    """
    accelerator: Literal["auto", "kvm", "tcg"] = attrs.field(default="auto", validator=one_of("auto", "kvm", "tcg"))
    """What runs the guests' instructions; "auto" takes hardware if a guest has proved that it works."""
    require_hardware: bool = attrs.field(default=False, validator=check_flag)
    """Refuse software emulation, which QEMU's own policy does not count as a security boundary."""
    confinement: Literal["best", "require"] = attrs.field(default="best", validator=one_of("best", "require"))
    """How QEMU is confined. "best" leaves out what this host does not allow, and logs it; "require" raises `ConfinementRequiredError` instead.

    `Sandbox.confinement` and ``trio-sandbox doctor`` say what applies.
    """
    cgroup: Literal["auto", "off"] | Path = attrs.field(default="auto", converter=_cgroup)
    """Where QEMU gets control groups (cgroup v2). Each has a limit of memory, a little above its guest's RAM. All VMs of a host together get half as
    much processor time as another group when processors are short.

    "auto": below this program's own group, if that is allowed, as it is for root in the topmost group; else there are none. A path: below that
    directory, which was delegated to this user (by systemd's ``Delegate=`` and ``DelegateSubgroup=``, for instance) and has no processes of its
    own. "off": none. `Sandbox.confinement` and ``trio-sandbox doctor`` say which of these applies.
    """
    memory_budget_mib: int | None = attrs.field(default=None, validator=or_none(whole_number(1, unit="MiB")))
    """What all sandboxes together may take of the host's memory, in MiB: RAM, and `constants.VM_OVERHEAD_MIB` for each.

    None: nine tenths of what is available when the host is opened, within the limits of our control groups.

    All hosts of one user on this machine, in whatever processes, together take no more than those nine tenths, or than this host's own budget where
    that is larger: where others hold too much, `Host.open_sandbox` waits, for `Timeouts.admission` at most.
    """
    memory_overcommit: float = attrs.field(default=1.0, validator=number(1, constants.MAXIMUM_MEMORY_OVERCOMMIT))
    """How many times the memory budget sandboxes may have together, for those that are idle most of the time: each counts with its RAM and
    `constants.VM_OVERHEAD_MIB`, divided by this number. From 1 to `constants.MAXIMUM_MEMORY_OVERCOMMIT`.

    Above 1 a guard watches the memory that is really left. While it is tight, no sandbox is opened or woken up: `Host.open_sandbox` waits, for
    `Timeouts.admission` at most. If it gets short, or somebody waits, the host closes VMs of `warm`, and then puts idle sandboxes to sleep, the longest
    idle first, as `SandboxConfig.hibernate_after` does: the next request wakes them up. 1: what sandboxes may have is there, and nothing is watched.
    """
    vcpu_budget: int | None = attrs.field(default=None, validator=or_none(whole_number(1)))
    """How many virtual CPUs all sandboxes together may have; None: `constants.VCPUS_PER_CORE` for each processor that we may use."""
    disk_budget_mib: int | None = attrs.field(
        default=None, validator=or_none(whole_number(constants.MINIMUM_DISK_MIB, unit="MiB"))
    )
    """What all sandboxes together may write to their disks, in MiB: each counts with its `SandboxConfig.disk_mib`, or with
    `constants.IMAGE_DISK_MIB` without one, also while it hibernates. Those hosts of one user that have such a budget, and the same disk, together take no
    more than what was left there beside the reserve, or than this host's own budget where that is larger.

    None: disks are not counted, since few sandboxes fill theirs. Either way no sandbox is opened while less than `constants.DISK_RESERVE_MIB`
    is left on the disk of `runtime_dir`, or less than `constants.DISK_RESERVE_SHARE` of a small one.
    """
    build_images: bool = attrs.field(default=True, validator=check_flag)
    """Build an image that is missing; otherwise a missing image is an error."""
    image_budget_mib: int | None = attrs.field(default=None, validator=or_none(whole_number(1, unit="MiB")))
    """What all images and layers in the cache may take of the disk, in MiB: when this host has built one, those used longest ago are removed.

    The images that come with the library are never removed, nor is anything that an open sandbox of any process, a template, a saved sandbox or
    another layer needs. So the cache may be larger. A host that builds no images removes none. None: they stay until ``trio-sandbox image prune`` or
    ``rm`` removes them.
    """
    templates: bool = attrs.field(default=True, validator=check_flag)
    """Save the state of a booted VM in the cache, as a template, and start all later ones from it.

    The files hold the RAM of a guest before any code ran in it, except `SandboxConfig.warmup`. False: neither write nor use
    any.
    """
    template_budget_mib: int = attrs.field(
        default=constants.DEFAULT_TEMPLATE_BUDGET_MIB, validator=whole_number(1, unit="MiB")
    )
    """How much of the disk all templates in the cache may take, in MiB; those used longest ago are removed first.

    A sandbox with more memory than that has no template.
    """
    warm: Mapping[tuple[AnyImage, SandboxConfig], int] = attrs.field(
        factory=dict[tuple[AnyImage, "SandboxConfig"], int], converter=_warm, hash=False
    )
    """How many running, idle VMs to keep for `Host.open_sandbox`.

    Of an image with the default configuration, ``{"python": 2}``, or of an image and a configuration,
    ``{("python", SandboxConfig(memory_mib=512)): 1}``; an `Image` can take the place of the name. A sandbox gets only a VM
    of exactly its own configuration. They are opened in the background, count in the budgets, and are closed if a sandbox
    would have to wait for them.
    """
    proxy: str | None = attrs.field(default=None, validator=or_none(check_text), repr=False)
    """An HTTP proxy that guests' connections to the outside go through, ``"http://user:password@proxy:3128"``, or "environment"
    for the one that the variables ``https_proxy`` and ``all_proxy`` name. It resolves the names,
    so it has to check their addresses itself. None: your process connects directly.
    """
    ca_certificates: Path | None = attrs.field(default=None, converter=_certificates)
    """A PEM file with certificates to trust besides the system's: those of a company that inspects TLS, for instance. Guests
    with a network trust them, and so does this process for secrets; see `NetworkRule`. At most 32 KiB."""
    timeouts: Timeouts = attrs.field(factory=Timeouts, validator=instance(Timeouts))
    """Bounds on the library's own operations."""
    progress: Callable[[Progress], object] = attrs.field(
        default=_ignore_progress, validator=check_callable, eq=False, repr=False
    )
    """Called at every step of long work, in the host's task; must not block.

    Each new message is also logged at INFO, by the logger ``trio_sandbox.progress``.
    """


#: Checks of a machine's memory and of its number of processors.
check_memory_mib = whole_number(constants.MINIMUM_MEMORY_MIB, unit="MiB")
check_vcpus = whole_number(1, constants.MAXIMUM_VCPUS)


def _mounts(value: Mapping[str, str | os.PathLike[str]]) -> Mapping[str, Path]:
    if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"`mounts` must be a mapping from places in the guest to directories, as in {{'/data': '/srv/data'}}, not {value!r:.100}"
        )
    mounts: dict[str, Path] = {}
    for target, source in value.items():
        if type(target) is not str:
            raise TypeError(f"a place in `mounts` must be str, not {type(target).__name__}")
        place = posixpath.normpath(target)
        if place in mounts:
            raise ValueError(f"`mounts` has two directories for {place!r}")
        mounts[place] = to_path(source, f"mounts[{target!r}]")
    return mounts


def _check_mounts(_: object, _attribute: attrs.Attribute[Mapping[str, Path]], value: Mapping[str, Path]) -> None:
    if len(value) > constants.MAXIMUM_MOUNTS:
        raise ValueError(
            f"`mounts` must be at most {constants.MAXIMUM_MOUNTS}, not {len(value)}; mount a directory that has several of them in it"
        )
    for target in value:
        place = PurePosixPath(target)
        if not place.is_absolute() or len(place.parts) == 1 or target.startswith("//") or "\0" in target:
            raise ValueError(f"a place in `mounts` must be an absolute path below /, not {target!r}")
        if place.parts[1] in ("dev", "proc", "sys"):
            raise ValueError(f"a place in `mounts` must not be in /{place.parts[1]}, which is the kernel's: {target!r}")
        for other in value:
            if place in PurePosixPath(other).parents:
                raise ValueError(f"`mounts` must not be one inside the other, but {other!r} is in {target!r}")


@attrs.frozen(kw_only=True)
class SandboxConfig:
    """What one sandbox gets."""

    memory_mib: int = attrs.field(default=constants.DEFAULT_MEMORY_MIB, validator=check_memory_mib)
    """RAM of the virtual machine, in MiB; at least `constants.MINIMUM_MEMORY_MIB`."""
    vcpus: int = attrs.field(default=1, validator=check_vcpus)
    """Virtual CPUs, from 1 to `constants.MAXIMUM_VCPUS`."""
    disk_mib: int | None = attrs.field(
        default=None, validator=or_none(whole_number(constants.MINIMUM_DISK_MIB, unit="MiB"))
    )
    """How much the guest may write to its own disk, in MiB, beyond what is there when the sandbox opens; at least `constants.MINIMUM_DISK_MIB`.

    Writing more fails with "No space left on device" (``ENOSPC``), for root too. The disk itself is fine, and removing files makes room.
    What `warmup` wrote, and what was there when a saved sandbox was saved, does not count. A copy of a sandbox has as much left as its original.
    None: as much as the image's disk has, some 8 GiB, or what is left on the disk of `HostConfig.runtime_dir` beside the reserve, where that is less.
    """
    max_output_bytes: int = attrs.field(
        default=constants.DEFAULT_MAX_OUTPUT_BYTES, validator=whole_number(1, unit="bytes")
    )
    """How much one run may print to each of stdout and stderr, and display in all, before it is stopped."""
    hibernate_after: float | None = attrs.field(default=None, validator=or_none(check_seconds))
    """Put the sandbox to sleep when it has been idle for that many seconds, as `Sandbox.hibernate` does. The next request
    wakes it up, and takes longer by that. A sandbox is idle if no request is under way, and no process or thread that a run
    left in the background. None: never.
    """
    reclaim_after: float | None = attrs.field(default=constants.RECLAIM_AFTER, validator=or_none(check_seconds))
    """When the sandbox was idle for so many seconds, idle as for `hibernate_after`, have its guest give the host what it keeps
    in caches. That is for sandboxes with all of their memory for themselves, those of a host without `HostConfig.templates`; others
    share it with their template. The sandbox has its whole memory all the time but for some seconds, which a request ends. None: never.
    """
    warmup: str = attrs.field(default="", validator=check_text)
    """Code that runs before the sandbox opens, for instance ``"import numpy"``: what it imports and defines is there. It is
    in the image's own language. With `HostConfig.templates` it runs once, not once for each sandbox, and all of them have
    the same result. `random` and the other generators of the standard library, and NumPy's global one, are seeded anew, so
    seeding them here has no effect; the seed of `hash`, and generators that the code makes itself, stay the same. It must
    not leave threads or processes behind that depend on time.

    If an interpreter ends (`RunResult.state_kept` is False, and `RunResult.restarted` True in the next run), the new one has
    nothing of the warm-up: run it again yourself, with `Sandbox.run`.
    """
    guest_namespaces: bool = attrs.field(default=False, validator=check_flag)
    """Whether the guest's ordinary users may make user namespaces, which bubblewrap, rootless containers and a browser's own
    sandbox need. They open a large part of the guest's kernel. The guest's root may always make them.
    """
    network: Network = attrs.field(factory=Network.none, validator=instance(Network, "Network.allow('pypi.org')"))
    """What the sandbox may reach; see `Network`. `warmup` runs without a network. `Sandbox.network` applies another policy for a block."""
    mounts: Mapping[str, Path] = attrs.field(
        factory=dict[str, Path], converter=_mounts, validator=_check_mounts, hash=False
    )
    """Directories of the host's to be read in the guest, by their places there: ``{"/data": "/srv/data"}``.

    The guest gets a copy as of when the sandbox is opened, on a disk that it can't write to: what changes on the host
    later it does not see. There everything belongs to user 1000 and keeps its permission bits, and set-user-id bits and
    devices are void. Symbolic links are kept as they are, and lead to what is there in the *guest*. A place is made where it
    is missing, and what was in it can't be seen. `warmup` runs without the mounts.

    At most `constants.MAXIMUM_MOUNTS`, none inside another, and together no larger than `constants.MOUNTS_DISK_BYTES`.
    """


class SandboxFields(TypedDict, total=False):
    """The fields of a `SandboxConfig`, as keyword arguments of what opens sandboxes.

    For functions of yours that pass them on: ``**fields: Unpack[SandboxFields]``.
    """

    memory_mib: int
    vcpus: int
    disk_mib: int | None
    max_output_bytes: int
    hibernate_after: float | None
    reclaim_after: float | None
    warmup: str
    guest_namespaces: bool
    network: Network
    mounts: Mapping[str, str | os.PathLike[str]]


def sandbox_config(config: SandboxConfig | None, fields: Mapping[str, object]) -> SandboxConfig | None:
    """Return the configuration that a whole one, or some fields of one, ask for; None if neither is given.

    Raises:
      TypeError, ValueError: if there is no such field, if it can't have that value, or if both are given and contradict
        each other.

    """
    if config is not None and not isinstance(config, SandboxConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`config` must be a SandboxConfig, not {config!r:.100}")
    check_refused("opening a sandbox", fields, "timeout")
    known = [field.name for field in attrs.fields(SandboxConfig)]
    if wrong := sorted(fields.keys() - set(known)):
        raise TypeError(f"there is no argument {', '.join(map(repr, wrong))}; a sandbox has {', '.join(known)}")
    if not fields:
        return config
    made = SandboxConfig(**cast("SandboxFields", fields))
    if config is None:
        return made
    for name in fields:
        if getattr(made, name) != getattr(config, name):
            raise TypeError(
                f"`{name}` is {getattr(made, name)!r}, and in `config` it is {getattr(config, name)!r}: say it once, or "
                "change the configuration with attrs.evolve()"
            )
    return config


mark_public(__name__, globals())
