"""Defaults and limits that users may want to know, each with its unit and its reason."""

from __future__ import annotations

# --- Machines (MiB) ---

#: RAM of a sandbox unless asked otherwise.
DEFAULT_MEMORY_MIB = 256
#: With less than this the guest's kernel, the agent and one interpreter do not fit.
MINIMUM_MEMORY_MIB = 128
#: What an idle guest is shrunk to by the balloon.
BALLOON_INFLATE_TARGET_MIB = 96
#: Enough for any guest we build for; QEMU's own limit on q35 is higher.
MAXIMUM_VCPUS = 64

# --- Output (bytes) ---

#: Bytes that one run may print on each of stdout and stderr.
DEFAULT_MAX_OUTPUT_BYTES = 16 * 2**20
#: Source text of one run, or argv and environment of one process, as UTF-8. On the wire it may be
#: six times as large, and the smallest guest has to hold it.
MAXIMUM_REQUEST_BYTES = 4 * 2**20

# --- QMP (bytes, items) ---

#: QEMU's own limit on one line of QMP input is 64 MiB; no reply we ask for comes near this one.
QMP_LINE_LIMIT = 10 * 2**20
#: Events that a slow subscriber may lag behind before it loses the oldest.
QMP_EVENT_BUFFER = 256

# --- Timeouts (seconds), the defaults of `trio_sandbox.Timeouts` ---
# Generous on purpose: they catch what hangs, not what is slow. Under software emulation on a
# loaded machine everything takes ten times as long as on a quiet one.

QMP_CONNECT_TIMEOUT = 30.0
QMP_COMMAND_TIMEOUT = 60.0
STORAGE_DAEMON_START_TIMEOUT = 30.0
OVERLAY_TIMEOUT = 60.0
BALLOON_TIMEOUT = 60.0
ACCELERATOR_PROBE_TIMEOUT = 5.0
BOOT_TIMEOUT = 180.0
AGENT_SILENCE_TIMEOUT = 60.0
INTERRUPT_GRACE = 1.0
KILL_TIMEOUT = 20.0
PROCESS_EXIT_GRACE = 5.0
