"""The users' files that say who a machine is."""

from __future__ import annotations

import os
import socket

import trio

from trio_sandbox.guest.agent.children import Children
from trio_sandbox.guest.messages import send_message


async def test_they_say_who_the_machine_is_now_however_long_what_was_in_them() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = [os.memfd_create(name) for name in ("resolv.conf", "machine-id", "hostname", "hosts")]
    os.write(files[0], b"nameserver 192.0.2.1\n")
    os.write(files[3], b"::1 localhost\n")
    with theirs:
        children = Children(ours)
        send_message(theirs, ("ready",), files)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(children.serve)
            for hostname, machine_id in (("sandbox-1", "a" * 32), ("sandbox-2", "b" * 32), ("box", "c" * 32)):
                await children.identify({"hostname": hostname, "machine_id": machine_id})
                await children.set_resolver("198.18.0.2")
                assert os.pread(files[0], 1 << 10, 0) == b"nameserver 198.18.0.2\n"
                await children.set_resolver(None)
                expected = [
                    "nameserver 192.0.2.1\n",
                    f"{machine_id}\n",
                    f"{hostname}\n",
                    f"::1 localhost\n127.0.0.1 {hostname}\n",
                ]
                assert [os.pread(file, 1 << 10, 0).decode() for file in files] == expected
                os.pwrite(files[2], b"what a user has written there\n", 0)
            nursery.cancel_scope.cancel()
    for file in files:
        os.close(file)
