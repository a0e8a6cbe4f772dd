"""Defaults and limits that users may want to know, each with its unit and its reason."""

from __future__ import annotations

# --- Machines (MiB) ---

#: RAM of a sandbox unless asked otherwise.
DEFAULT_MEMORY_MIB = 256
#: With less than this the guest's kernel, the agent and one interpreter do not fit.
MINIMUM_MEMORY_MIB = 128
#: What an idle guest is shrunk to by the balloon.
BALLOON_INFLATE_TARGET_MIB = 96
#: What a guest keeps of the memory that it says is available when it gives back what it does not need, in MiB.
BALLOON_SPARE_MIB = 32
#: Seconds of idleness after which a guest is asked for that.
RECLAIM_AFTER: float | None = 30.0
#: Enough for any guest we build for; QEMU's own limit on q35 is higher.
MAXIMUM_VCPUS = 64

# --- Admission: what all of a host's sandboxes may have together ---

#: MiB of memory that QEMU takes for itself, beside the guest's RAM. Measured under TCG: 30 after the first run, and 100 at most, with all 64 of
#: translated code in use, 4 virtual CPUs, 10 checkpoints under the disk and 64 threads that read from it. Its program, 16, is a cache of files that
#: all of them share. What a guest can make it take beyond that is in `docs/howto/limits.md`.
VM_OVERHEAD_MIB = 104
#: How much of the memory that was available sandboxes may take, unless told otherwise. The rest is for our own process, the page
#: cache and the neighbours: past the end of memory the kernel kills whom it likes.
MEMORY_BUDGET_SHARE = 0.9
#: The most that `HostConfig.memory_overcommit` can be. A sandbox of 256 MiB then counts with 12 MiB, a third of what an idle one has for itself, so
#: what is really left decides alone.
MAXIMUM_MEMORY_OVERCOMMIT = 32.0
#: Virtual CPUs for each processor, unless told otherwise. They are threads: too many make all slower, but nothing fails, and most
#: sandboxes idle most of the time.
VCPUS_PER_CORE = 16

#: What templates may take on the disk. One of 256 MiB takes some 130 MiB.
DEFAULT_TEMPLATE_BUDGET_MIB = 4096

# --- Disks (MiB) ---

#: What an image's disk has, and a sandbox without `SandboxConfig.disk_mib` may write.
IMAGE_DISK_MIB = 8192
#: With less than this left on the disk that takes the guests' writes, or than `DISK_RESERVE_SHARE` of a small one, no sandbox is
#: opened: those that are open go on, and would get errors of their disks when nothing is left.
DISK_RESERVE_MIB = 1024
#: The same as a part of that disk.
DISK_RESERVE_SHARE = 0.05
#: The least that `SandboxConfig.disk_mib` can be: the guest's interpreters have caches and temporary files.
MINIMUM_DISK_MIB = 16

# --- Output (bytes) ---

#: Bytes that one run may print on each of stdout and stderr.
DEFAULT_MAX_OUTPUT_BYTES = 16 * 2**20
#: RAM of a virtual machine that makes a layer of an image, in MiB: installing is hungrier than using.
BUILD_MEMORY_MIB = 1024
#: The end of each output that is kept for errors, for `Sandbox.last_output` and for the result of `Sandbox.stream`.
OUTPUT_TAIL_BYTES = 8 * 2**10
#: Text of the value of a run's last expression, as UTF-8. The guest cuts what is longer, and says so at its end.
MAXIMUM_VALUE_BYTES = 64 * 2**10
#: Displays of one run that `Sandbox.run` collects.
MAXIMUM_DISPLAYS = 1000
#: Source text of one run, or argv and environment of one process, as UTF-8. On the wire it may be
#: six times as large, and the smallest guest has to hold it.
MAXIMUM_REQUEST_BYTES = 4 * 2**20

# --- Functions of the host that a run may call ---

#: Functions of one run.
MAXIMUM_FUNCTIONS = 64
#: The arguments of one call as JSON, and its result, in bytes.
MAXIMUM_CALL_BYTES = 2**20
#: Values in either, each list, object and member of one counted. To read so many takes the event loop some milliseconds.
MAXIMUM_CALL_VALUES = 20_000
#: Calls of one run that are underway at a time. Others wait, and so do those that come faster than `CALLS_PER_SECOND`.
CALLS_AT_ONCE = 16
#: Calls of one run a second, but for the first `CALLS_AT_ONCE`.
CALLS_PER_SECOND = 1000.0

# --- Files (bytes) ---

#: What `GuestPath.read_bytes` and `GuestFile.read` return at most, and what text takes in memory: a guest's file may have no end.
MAXIMUM_READ_BYTES = 256 * 2**20
#: What one line of a guest's file may have unless asked otherwise: it may have no end either.
MAXIMUM_LINE_BYTES = 2**20
#: What `Sandbox.download` writes to the host's disk unless asked otherwise; as large as a guest's own disk.
DEFAULT_MAX_DOWNLOAD_BYTES = 8 * 2**30
#: What `Sandbox.pull` gets from the guest unless asked otherwise, all of the directory included: half a million files at most are compared.
DEFAULT_MAX_PULL_BYTES = 2 * 2**30

# --- Mounts ---

#: What the directories of `SandboxConfig.mounts` may take together, as a file system.
MOUNTS_DISK_BYTES = 64 * 2**30
#: The partitions that a disk of the guest's has.
MAXIMUM_MOUNTS = 15

# --- QMP (bytes, items) ---

#: QEMU's own limit on one line of QMP input is 64 MiB; no reply we ask for comes near this one.
QMP_LINE_LIMIT = 10 * 2**20
#: Events that a slow subscriber may lag behind before it loses the oldest.
QMP_EVENT_BUFFER = 256

# --- Timeouts (seconds), the defaults of `trio_sandbox.Timeouts` ---
# Generous on purpose: they catch what hangs, not what is slow. Under software emulation on a
# loaded machine everything takes ten times as long as on a quiet one.

#: The default of `Timeouts.qmp_connect`.
QMP_CONNECT_TIMEOUT = 30.0
#: The default of `Timeouts.qmp_command`.
QMP_COMMAND_TIMEOUT = 60.0
#: The default of `Timeouts.storage_daemon_start`.
STORAGE_DAEMON_START_TIMEOUT = 30.0
#: The default of `Timeouts.overlay`.
OVERLAY_TIMEOUT = 60.0
#: The default of `Timeouts.balloon`.
BALLOON_TIMEOUT = 60.0
#: The default of `Timeouts.accelerator_probe`.
ACCELERATOR_PROBE_TIMEOUT = 5.0
#: The default of `Timeouts.boot`.
BOOT_TIMEOUT = 180.0
#: The default of `Timeouts.agent_silence`.
AGENT_SILENCE_TIMEOUT = 60.0
#: The default of `Timeouts.interrupt_grace`.
INTERRUPT_GRACE = 1.0
#: The default of `Timeouts.kill`.
KILL_TIMEOUT = 20.0
#: The default of `Timeouts.process_exit`.
PROCESS_EXIT_GRACE = 5.0
#: The default of `Timeouts.admission`.
ADMISSION_TIMEOUT = 300.0
#: The default of `Timeouts.connect`.
CONNECT_TIMEOUT = 30.0

# --- Network ---

#: Connections of a sandbox to the outside at a time, at most. Each may take 256 KiB of the host's memory.
MAXIMUM_CONNECTIONS = 256
#: The same, unless told otherwise.
DEFAULT_MAX_CONNECTIONS = 128
