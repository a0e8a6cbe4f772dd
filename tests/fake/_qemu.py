"""A fake QEMU: speaks QMP and the guest's hello over the descriptors that it inherits, and misbehaves.

It keeps count of what a snapshot asks it for: descriptors, nodes, and whether the machine runs.

`fake_build` makes the program; words ``fake=...`` in the kernel's arguments choose what it does. That the
real one is like it, as far as it goes, is what tests/qemu/test_vm.py shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trio_sandbox.qemu import Accelerator, Confinement, MachineConfig, QemuBuild, Vm

_SCRIPT = r"""
import json, mmap, os, re, selectors, socket, struct, sys, time

argv = " ".join(sys.argv)
modes = re.findall(r"fake=(\S+)", argv)

def inherited(name):
    return socket.socket(fileno=int(re.search(rf"socket,id={name},fd=(\d+)", argv)[1]))

def frame(kind, payload, stream=0):
    return struct.pack(">IBI", len(payload), kind, stream) + payload

qmp, agent, console = (inherited(name) for name in ("qmp", "agent", "console"))
if "refuse" in modes:
    sys.exit("qemu: could not do it")
console.sendall(b"booting\r\n\x1b[31mred\r\n" + b"line\r\n" * 100 + b"last line\r\n")
if "panic" in modes:
    console.sendall(b"[    1.0] Kernel panic - not syncing: of fear\r\n")
    sys.exit(0)
if "no-qmp" not in modes:
    major, minor = (10, 0) if "ten" in modes else (7, 2)
    greeting = {"QMP": {"version": {"qemu": {"major": major, "minor": minor, "micro": 0}, "package": ""}, "capabilities": []}}
    qmp.sendall(json.dumps(greeting).encode() + b"\r\n")
incoming = "-incoming defer" in argv
if "no-hello" not in modes and not incoming:
    agent.sendall(b"\xff" * 64 if "garbage" in modes else frame(1, b'{"version":%d,"agent":"fake"}' % (2 if "newer" in modes else 1)))

if memory := re.search(r'"mem-path":"(/proc/self/fd/\d+)","share":false', argv):
    if "hides-memory" not in modes:
        with open(memory[1], "rb") as file:
            ram = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        ram[4096] = 1

state = {"status": "inmigrate" if incoming else "running", "fdsets": {}, "nodes": ["overlay"], "received": [], "job": None, "opaque": {}}

def obey(command, arguments):
    # Do what a snapshot asks for, and return the answer.
    match command:
        case "add-fd":
            fd = state["received"].pop(0)
            state["fdsets"].setdefault(arguments["fdset-id"], []).append(fd)
            state["opaque"][fd] = arguments.get("opaque")
            return {"fdset-id": arguments["fdset-id"], "fd": fd}
        case "remove-fd":
            fds = state["fdsets"].get(arguments["fdset-id"])
            if fds is None:
                raise ValueError("no such set")
            for fd in [arguments["fd"]] if "fd" in arguments else list(fds):
                fds.remove(fd)
                os.close(fd)
            if not fds:
                del state["fdsets"][arguments["fdset-id"]]
        case "getfd":
            state["file"] = state["received"].pop(0)
        case "xen-save-devices-state":
            number = int(arguments["filename"].rpartition("/")[2])
            os.pwrite(state["fdsets"][number][0], bytes(4096), 0)
        case "migrate" | "migrate-incoming":
            # Newer ones have deprecated the one kind of address, older ones do not know the other.
            if "ten" in modes:
                number = re.fullmatch(r"file:/dev/fdset/(\d+)", arguments["uri"])[1]
                fd = os.dup(state["fdsets"][int(number)][0])
            else:
                assert arguments["uri"].startswith("fd:")
                fd = state.pop("file")
            if command == "migrate":
                # Like the real one, it says that it is done a moment before it is.
                state["status"] = "finish-migrate"
                os.pwrite(fd, bytes(4096), 0)
            os.close(fd)
        case "stop":
            state["status"] = "paused"
        case "cont":
            if state["status"] == "finish-migrate":
                raise ValueError("Migration is not finalized yet")
            state["status"] = "running"
        case "blockdev-add":
            state["nodes"].append(arguments["node-name"])
        case "blockdev-del":
            state["nodes"].remove(arguments["node-name"])
        case "block-stream":
            state["job"] = arguments["job-id"]
        case "block-job-cancel" if state["job"] != arguments["device"]:
            raise ValueError("no such job")
        case "query-blockstats":
            stats = {"failed_wr_operations": int("loses-writes" in modes), "failed_flush_operations": int("loses-flushes" in modes)}
            return [{"node-name": name, "stats": stats} for name in state["nodes"]]
        case "query-block-jobs":
            return [{"device": state["job"], "offset": 0}]
        case "query-status":
            status = state["status"]
            if status == "finish-migrate":
                state["status"] = "postmigrate"
            return {"status": status, "running": status == "running"}
        case "query-fdsets":
            return [
                {"fdset-id": number, "fds": [{"fd": fd, "opaque": state["opaque"][fd]} for fd in fds]}
                for number, fds in state["fdsets"].items()
            ]
        case "query-named-block-nodes":
            return [{"node-name": name} for name in state["nodes"]]
    return {}

services = {}
still = set()  # streams for which it holds still, and reads nothing but their ends

def serve(kind, stream, payload):
    # The services of the guest: code, getting ready for being saved, and mounting.
    if kind == 2:
        header = json.loads(payload)
        services[stream] = header["service"]
        if services[stream] == "snapshot" and "refuses-to-freeze" in modes:
            agent.sendall(frame(5, b"not now", stream))
        if services[stream] == "snapshot" and not {"never-frozen", "refuses-to-freeze"} & set(modes):
            still.update([stream] if "token" in header else [])
            agent.sendall(frame(3, b"frozen", stream) + (b"" if "token" in header else frame(4, b"", stream)))
        if services[stream] == "idle":
            agent.sendall(frame(3, b"idle", stream) + frame(4, b"", stream))
        if services[stream] == "disk":
            agent.sendall(frame(3, b"sealed" if "seal" in header else b"limited", stream) + frame(4, b"", stream))
        if services[stream] == "process" and "no-shell" in modes:
            failed = {"errno": 2, "strerror": "No such file or directory", "filename": "/bin/sh"}
            record = json.dumps({"failed": failed}).encode()
            agent.sendall(frame(3, b"J" + struct.pack(">I", len(record)) + record, stream) + frame(4, b"", stream))
        elif services[stream] == "process" and "never-starts" not in modes:
            agent.sendall(frame(5, b"no processes here", stream))
        if services[stream] == "clock":
            agent.sendall(frame(3, time.time_ns().to_bytes(8, "big"), stream) + frame(4, b"", stream))
    elif kind == 3 and services.get(stream) == "snapshot":
        if "never-goes-on" in modes or state["status"] != "running":
            return
        still.discard(stream)
        agent.sendall(frame(5, b"enough", stream) if "gives-up" in modes else frame(4, b"", stream))
    elif kind == 3 and services.get(stream) == "mounts":
        wanted = json.loads(payload[5:])["mounts"]
        failed = {"errno": 20, "strerror": "Not a directory", "filename": wanted[0]["target"]}
        record = json.dumps({"failed": failed} if "mount-fails" in modes else {"mounted": len(wanted)}).encode()
        agent.sendall(frame(3, b"J" + struct.pack(">I", len(record)) + record, stream) + frame(4, b"", stream))
    if services.get(stream) == "code" and (kind == 3 or kind == 2 and "request" in header):
        if "dies-warming-up" in modes:
            sys.exit(4)
        code = int("warm-up-fails" in modes)
        finished = {"exit_code": code, "restarted": False, "state_kept": True, "expired": False, "oom": False}
        record = json.dumps({"finished": finished}).encode()
        data = b"J" + struct.pack(">I", len(record)) + record
        agent.sendall(frame(3, data, stream) + frame(4, b"", stream))

buffers = {qmp: b"", agent: b""}
selector = selectors.DefaultSelector()
for sock in buffers:
    selector.register(sock, selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        sock = key.fileobj
        data, fds, _, _ = socket.recv_fds(sock, 65536, 4)
        state["received"] += fds
        if not data:
            # Like the real one, it goes on without its peers.
            selector.unregister(sock)
            continue
        buffers[sock] += data
        if sock is qmp:
            *lines, buffers[qmp] = buffers[qmp].split(b"\n")
            for line in filter(None, lines):
                command = json.loads(line)
                if command["execute"] == "quit":
                    sys.exit(3)
                if command["execute"] == "qmp-garbage":
                    qmp.sendall(b"{]\r\n")
                if command["execute"] == "flood":
                    for _ in range(300):
                        console.sendall(b"x" * 1023 + b"\n")
                if f"refuses-{command['execute']}" in modes:
                    error = {"class": "CommandNotFound", "desc": "no such command"}
                    qmp.sendall(json.dumps({"error": error, "id": command.get("id")}).encode() + b"\r\n")
                    continue
                if f"dies-at-{command['execute']}" in modes:
                    print("qemu: Assertion failed", flush=True)
                    sys.exit(5)
                try:
                    answer = {"return": obey(command["execute"], command.get("arguments", {}))}
                except (OSError, KeyError, ValueError) as exc:
                    desc = os.strerror(exc.errno) if isinstance(exc, OSError) else str(exc)
                    answer = {"error": {"class": "GenericError", "desc": desc}}
                if f"hangs-after-{command['execute']}" in modes:
                    continue
                qmp.sendall(json.dumps({**answer, "id": command.get("id")}).encode() + b"\r\n")
                if command["execute"] == "migrate-incoming" and "load-fails" in modes:
                    sys.exit("qemu: load of migration failed")
                if command["execute"] == "migrate-incoming" and "no-memory-to-load" in modes:
                    sys.exit("qemu: unable to map backing store for guest RAM: Cannot allocate memory")
                if command["execute"] == "migrate-incoming" and "killed-loading" in modes:
                    os.kill(os.getpid(), 9)
                if command["execute"] in ("migrate", "migrate-incoming"):
                    status = "failed" if "save-fails" in modes else "completed"
                    event = {"event": "MIGRATION", "data": {"status": status}, "timestamp": {"seconds": 0, "microseconds": 0}}
                    qmp.sendall(json.dumps(event).encode() + b"\r\n")
                if command["execute"] == "block-stream" and "stream-hangs" not in modes or command["execute"] == "block-job-cancel":
                    name = "BLOCK_JOB_CANCELLED" if command["execute"] == "block-job-cancel" else "BLOCK_JOB_COMPLETED"
                    about = {"device": state["job"], **({"error": "no space"} if "stream-fails" in modes else {})}
                    event = {"event": name, "data": about, "timestamp": {"seconds": 0, "microseconds": 0}}
                    qmp.sendall(json.dumps(event).encode() + b"\r\n")
                if command["execute"] == "guest-garbage":
                    agent.sendall(b"\xff" * 64)  # Only now: it is the end of us.
        else:
            if incoming:
                incoming = False
                # What is left from the machine that was saved comes first.
                agent.sendall(b"left over" + buffers[agent] + frame(1, b'{"version":%d,"agent":"fake"}' % (2 if "newer" in modes else 1)))
                buffers[agent] = b""
            while len(buffers[agent]) >= 9:
                length, kind, stream = struct.unpack(">IBI", buffers[agent][:9])
                if len(buffers[agent]) < 9 + length:
                    break
                payload = buffers[agent][9 : 9 + length]
                buffers[agent] = buffers[agent][9 + length :]
                serve(kind, stream, payload)
                if kind == 7 and still:
                    sys.exit("spoken to while it held still")
                if kind == 7 and "silent" not in modes:
                    agent.sendall(frame(8, payload))
"""


_FILES = ("kernel", "initrd", "system_disk", "image", "overlay")


def fake_accelerator(directory: Path) -> Accelerator:
    """Write the fake QEMU, and a machine's files, empty, into *directory*; return an accelerator that nothing proved."""
    path = directory / "fake-qemu"
    # Without `site`: it starts in a third of the time.
    path.write_text(f"#!{sys.executable} -IS\n{_SCRIPT}", encoding="utf-8")
    path.chmod(0o755)
    for name in _FILES:
        (directory / name).touch()
    unconfined = Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False)
    return Accelerator("tcg", False, "it is a fake", QemuBuild(str(path), 0, 0, (7, 2, 0)), unconfined)


async def check_fdsets(vm: Vm) -> None:
    """Assert that QEMU has just the descriptors that it needs, and can write to no file but its overlay."""
    current, frozen = vm._node, vm._layer_nodes  # pyright: ignore[reportPrivateUsage]
    for fdset in await vm.qmp.execute("query-fdsets"):
        opaque = [fd["opaque"] for fd in fdset["fds"]]
        if fdset["fdset-id"] == current.fdset:
            assert opaque == ["writable", None]
        else:
            assert fdset["fdset-id"] in {node.fdset for node in frozen}
            assert opaque == [None]


def fake_config(directory: Path, *modes: str) -> MachineConfig:
    """Return a machine of those files, and make the fake QEMU behave as *modes* say."""
    return MachineConfig(
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        system_disk=directory / "system_disk",
        image=directory / "image",
        overlay=directory / "overlay",
        kernel_args=tuple(f"fake={mode}" for mode in modes),
    )
