"""Root in the guest does to its side of the network what it likes: nothing is gained, and the agent answers on."""

from __future__ import annotations

import pytest

from tests.qemu.test_network import connect, echo, greet, host, open_server, sh, web
from trio_sandbox import Host, Network, SandboxConfig

pytestmark = pytest.mark.qemu
__all__ = ["host"]

FLAGS = """\
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for name, flags in zip(sys.argv[1::2], sys.argv[2::2]):
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", name.encode(), int(flags)))
"""
#: With our own mark: let in without having been held.
FORGE = """\
import re, socket
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, 36, 0x74726e65)
sock.settimeout(5)
try:
    sock.connect((socket.gethostbyname("web.test"), 22))
    sock.sendall(b"x")
    print("got", sock.recv(10))
except OSError as exc:
    print(type(exc).__name__)
"""
#: SYNs and datagrams of every wrong shape, on the loopback interface and to the resolver.
CRAFT = """\
import os, random, socket, struct
random.seed(7)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
packet = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(1500):
    options = os.urandom(random.choice([0, 0, 4, 20, 40]))
    header = bytearray(struct.pack(">BBHHHBBH4s4s", 0x40 | 5 + len(options) // 4, 0, 0, number, 0, 64, 6, 0,
        socket.inet_aton(random.choice(["198.18.0.1", "127.0.0.1", "8.8.8.8", "198.18.1.0", "0.0.0.0"])),
        socket.inet_aton(random.choice(["198.18.1.0", "198.18.0.2", "198.19.255.255"])))) + options
    data = header + struct.pack(">HHIIBBHHH", random.randrange(65536), random.choice([0, 53, 80, 65535]),
        random.randrange(2**32), 0, 0x50 | random.randrange(16), 2, 1, 0, 0)
    data = data[: random.choice([len(data), len(data), random.randrange(20, len(data))])]
    data[2:4] = random.choice([len(data), len(data), random.randrange(65536)]).to_bytes(2, "big")
    for send in (lambda: raw.sendto(data, ("198.18.1.0", 0)), lambda: packet.sendto(data, ("lo", 0x0800)),
                 lambda: udp.sendto(os.urandom(random.randrange(200)), ("198.18.0.2", 53))):
        try:
            send()
        except OSError:
            pass
print("sent")
"""
#: What does not go by TCP to a name fails at once, and does not hang.
NOT_TCP = """\
import socket, time
start = time.monotonic()
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_DGRAM, ("8.8.8.8", 53)),
    (socket.AF_INET, socket.SOCK_STREAM, ("8.8.8.8", 53)),
    (socket.AF_INET, socket.SOCK_STREAM, ("1.1.1.1", 853)),
    (socket.AF_INET, socket.SOCK_DGRAM, (socket.gethostbyname("web.test"), 443)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("224.0.0.251", 5353)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("224.0.0.252", 5355)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("255.255.255.255", 137)),
    (socket.AF_INET6, socket.SOCK_DGRAM, ("2606:4700::1111", 443)),
    (socket.AF_INET6, socket.SOCK_STREAM, ("2606:4700::1111", 443)),
):
    with socket.socket(family, kind) as sock:
        sock.settimeout(10)
        try:
            sock.connect(address)
            sock.send(b"x")
            sock.recv(1)
        except TimeoutError:
            print("hangs", address)
        except OSError:
            pass
        else:
            print("goes through", address)
print("done")
"""


@pytest.mark.parametrize("vcpus", [1, 2])
async def test_root_gains_nothing_and_harms_only_itself(host: Host, vcpus: int) -> None:
    async with open_server(greet) as port, open_server(echo) as secret:
        policy = Network.allow(web(port))
        async with host.open_sandbox(config=SandboxConfig(network=policy, vcpus=vcpus)) as sandbox:
            assert (await sandbox.run(NOT_TCP)).stdout == "done\n"

            async def as_root(code: str, *arguments: str) -> str:
                result = await sandbox.run_process(
                    ["python3", "-c", code, *arguments], user="root", capture_stdout=True, stderr_to_stdout=True
                )
                return result.stdout.decode()

            assert await connect(sandbox, "web.test", 0) == "ECONNREFUSED"
            # A name of its own, a hosts file and a resolver of its own: the host decides by what it was asked for.
            await sh(
                sandbox,
                "echo '198.18.1.0 other.test' >> /etc/hosts; echo '127.0.0.1 web.test' >> /etc/hosts",
                user="root",
            )
            assert (await sh(sandbox, "curl -sS http://other.test/")) == "hello[0]"  # as web.test's
            assert await connect(sandbox, "127.0.0.1", secret) == "ECONNREFUSED"  # the guest's own loopback
            await sh(sandbox, "sed 's/.*web.test//' /etc/hosts > /tmp/hosts; cat /tmp/hosts > /etc/hosts", user="root")
            # Our mark lets it in, and then nobody knows it.
            assert await as_root(FORGE) == "ConnectionResetError\n"
            assert await as_root(CRAFT) == "sent\n"
            assert await sh(sandbox, "curl -sS http://web.test/") == "hello[0]"
            # The interface down and up, and the address down.
            await as_root(FLAGS, "lo", "0", "lo", "73")
            await as_root(FLAGS, "lo:network", "0")
            assert await connect(sandbox, "198.18.0.2", 53) == "ENETUNREACH"
            await sh(sandbox, "rm -f /etc/resolv.conf; echo 'nameserver 8.8.8.8' > /etc/resolv.conf", user="root")
            assert (await sh(sandbox, "curl -sS http://web.test/")).startswith("curl: (6)")
            assert (await sandbox.run("print(1)")).stdout == "1\n"
