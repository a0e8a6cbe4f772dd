"""A storage daemon that misbehaves on demand; run as a program, with the real one's arguments.

The environment's FAKE says how: see `answer`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from typing import Any

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": ""}, "capabilities": []}
}


def answer(mode: str, command: str, number: int) -> list[dict[str, Any] | bytes]:
    """Say what to send for a command."""
    reply: dict[str, Any] = {"return": {}, "id": number}
    if command == "query-jobs":
        reply["return"] = [{"id": "j0", "status": "running"}]
    elif command == "query-named-block-nodes":
        reply["return"] = [{"node-name": "n0"}]
    elif command == "blockdev-create":
        match mode:
            case "never concludes":
                pass
            case "dies while the job runs":
                return [reply, b"die"]
            case "is killed while the job runs":
                return [reply, b"kill"]
            case "talks nonsense":
                return [reply, b"nonsense\r\n"]
            case _:
                raise ValueError(mode)
    elif command == "blockdev-add" and mode == "hangs up, but lives on":
        return [b"hang up"]
    return [reply]


def main() -> None:
    (fd,) = (int(found[1]) for found in (re.search(r"id=ours,fd=(\d+)", text) for text in sys.argv) if found)
    connection = socket.socket(fileno=fd)
    connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
    for line in connection.makefile():
        message = json.loads(line)
        for item in answer(os.environ["FAKE"], message["execute"], message["id"]):
            if item == b"die":
                sys.exit("out of imaginary memory")
            elif item == b"kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif item == b"hang up":
                connection.shutdown(socket.SHUT_RDWR)
            else:
                connection.sendall(item if isinstance(item, bytes) else json.dumps(item).encode() + b"\r\n")
    signal.pause()


if __name__ == "__main__":
    main()
