"""Programs that know nothing of sandboxes, by name: apt, pip over TLS, and programs that bring a libc and a resolver of their own."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import attrs
import pytest
import trio

from tests._debian import make_deb
from tests.machines import pip_configuration
from tests.qemu.test_network import sh
from tests.qemu.test_network_programs import open_file_server
from trio_sandbox import Host, HostConfig, Network, NetworkRule, SandboxConfig, open_host
from trio_sandbox.network._authority import Authority

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

NAME = "files.test"
#: What a static program asks, and what it is to be told.
GREETING = "hello from the host\n"


@asynccontextmanager
async def open_company(directory: Path) -> AsyncGenerator[tuple[Host, Network]]:
    """Serve *directory* as `NAME`, over TLS as well with a company's certificate; yield a host that trusts the company, and a policy."""
    authority = Authority([NAME])
    certificate = directory.parent / "company.pem"
    certificate.write_text(authority.pem)

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, authority.context(NAME), server_side=True, https_compatible=True)
        try:
            await answer(tls, directory)
        except trio.BrokenResourceError:
            return
        finally:
            await trio.aclose_forcefully(tls)

    async with open_file_server(directory) as plain, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, [listener])
        secure: int = listener.socket.getsockname()[1]
        async with open_host(HostConfig(ca_certificates=certificate)) as host:
            yield (
                host,
                Network.allow(
                    NetworkRule(NAME, port=80, to=("127.0.0.1", plain)),
                    NetworkRule(NAME, port=443, to=("127.0.0.1", secure)),
                ),
            )
        nursery.cancel_scope.cancel(reason="the test is over")


async def answer(stream: trio.abc.Stream, directory: Path) -> None:
    """Answer one request for a file."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some(10_000)
        if not data:
            return
        head += data
    path = directory / head.split()[1].decode().lstrip("/")
    path = path / "index.html" if path.is_dir() else path
    status, body = ("200 OK", path.read_bytes()) if path.is_file() else ("404 Not Found", b"")
    kind = "text/html" if path.suffix == ".html" else "application/octet-stream"
    lines = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    await stream.send_all(lines.encode() + body)


# --- pip ---


def make_wheel(directory: Path) -> None:
    """Write an index with one package, `greeting`."""
    files = {
        "greeting.py": b"print('installed by pip')\n",
        "greeting-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
        "greeting-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = io.StringIO()
    writer = csv.writer(record, lineterminator="\n")
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={digest}", len(data)])
    writer.writerow(["greeting-1.0.dist-info/RECORD", "", ""])
    package = directory / "simple/greeting"
    package.mkdir(parents=True)
    with zipfile.ZipFile(package / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr("greeting-1.0.dist-info/RECORD", record.getvalue())
    (package / "index.html").write_text('<a href="greeting-1.0-py3-none-any.whl">greeting</a>')


async def test_pip_from_a_companys_index_over_tls(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    make_wheel(directory)
    async with open_company(directory) as (host, policy):
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            install = (
                "python3 -m pip install -q --disable-pip-version-check --target /tmp/packages "
                f"--index-url https://{NAME}/simple/ greeting && PYTHONPATH=/tmp/packages python3 -m greeting"
            )
            assert (await sh(sandbox, install)).endswith("installed by pip\n[0]")


@attrs.frozen
class Index:
    """Where this machine's pip has its packages from."""

    url: str
    certificate: Path | None
    hosts: tuple[tuple[str, int], ...]
    """Names and ports of the index and of the files that it lists."""

    def policy(self) -> Network:
        # In a company it may well be in its own network.
        return Network.allow(*(NetworkRule(host, port=port, private=True) for host, port in self.hosts))


def find_index(package: str) -> Index:
    """Return this machine's index, as pip is configured here; skip the test where there is none to be reached."""
    settings = pip_configuration()
    default = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    url = settings.get("index-url") or subprocess.check_output([sys.executable, "-c", default], text=True).strip()
    if urlsplit(url).username is not None:
        pytest.skip("this machine's index takes credentials, which no guest is to have")
    certificate = Path(settings["cert"]) if "cert" in settings else None
    page = f"{url.rstrip('/')}/{package}/"
    try:
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(page, timeout=20, context=context) as response:
            links = re.findall(r'href="([^"]+)"', response.read().decode())
    except OSError as exc:
        pytest.skip(f"this machine's package index can't be reached: {exc}")
    parts = {urlsplit(urljoin(page, link)) for link in (page, *links)}
    hosts = {(part.hostname or "", part.port or {"http": 80, "https": 443}[part.scheme]) for part in parts}
    if any(host.replace(".", "").isdigit() or ":" in host for host, _ in hosts):
        pytest.skip("this machine's index is an address, and no name")
    return Index(url, certificate, tuple(sorted(hosts)))


async def test_pip_from_this_machines_index_and_certificates_of_other_programs(tmp_path: Path) -> None:
    index = await trio.to_thread.run_sync(find_index, "requests")
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "greeting").write_text(GREETING)

    async with open_company(directory) as (host, policy):
        both = attrs.evolve(policy, rules=(*policy.rules, *index.policy().rules))
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            assert (await sh(sandbox, f"curl -sS {index.url}/")).startswith("curl: (6)")
            variable = ""
            if index.certificate is not None:
                await sandbox.upload(index.certificate, "/tmp/index.pem")
                variable = "REQUESTS_CA_BUNDLE=/tmp/index.pem"  # it comes before what `--cert` says
            async with sandbox.network(both):
                options = "-q --disable-pip-version-check --no-compile --target /tmp/packages"
                command = f"{variable} python3 -m pip install {options} --index-url {index.url} requests"
                assert (await sh(sandbox, command)).endswith("[0]")
                # It brings certificates of its own, and yet trusts the company's.
                code = f"import requests; print(requests.__file__, requests.get('https://{NAME}/greeting').text)"
                output = await sh(sandbox, f'PYTHONPATH=/tmp/packages python3 -c "{code}"')
                assert output == f"/tmp/packages/requests/__init__.py {GREETING}\n[0]"


# --- apt ---


APT = """\
set -e
echo "deb [trusted=yes] http://files.test/ ./" > /etc/apt/sources.list
apt-get -q update 2>&1
apt-get -q install --yes --no-install-recommends greeting 2>&1 </dev/null
greeting
"""


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb (Debian: apt-get install dpkg)")
async def test_apt(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    make_deb(directory)
    async with open_company(directory) as (host, policy):
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            output = await sh(sandbox, APT, user="root")
            assert output.endswith("installed by apt\n[0]"), output


# --- Static programs ---

C = """\
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **names) {
    for (int n = 1; n < count; n++) {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
        if (getaddrinfo(names[n], "80", &hints, &found) != 0) {
            printf("no %s\\n", names[n]);
            continue;
        }
        int sock = socket(found->ai_family, SOCK_STREAM, 0);
        if (connect(sock, found->ai_addr, found->ai_addrlen) != 0) {
            perror("connect");
            return 1;
        }
        dprintf(sock, "GET /greeting HTTP/1.0\\r\\nHost: %s\\r\\n\\r\\n", names[n]);
        char answer[4096] = "";
        for (size_t size = 0; size < sizeof answer - 1;) {
            ssize_t more = read(sock, answer + size, sizeof answer - 1 - size);
            if (more <= 0) break;
            size += more;
        }
        char *body = strstr(answer, "\\r\\n\\r\\n");
        printf("%s", body ? body + 4 : "no answer\\n");
    }
    return 0;
}
"""
GO = """\
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

func main() {
	for _, name := range os.Args[1:] {
		response, err := http.Get("http://" + name + "/greeting")
		var refused *net.DNSError
		if errors.As(err, &refused) && refused.IsNotFound {
			fmt.Println("no", name)
			continue
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		io.Copy(os.Stdout, response.Body)
	}
	if _, err := http.Get("https://" + os.Args[1] + "/greeting"); err != nil {
		fmt.Println(err)
	}
}
"""


def static(compiler: str, package: str, *command: str) -> object:
    missing = shutil.which(compiler) is None
    reason = f"needs {compiler} (Debian: apt-get install {package})"
    return pytest.param(command, id=compiler, marks=pytest.mark.skipif(missing, reason=reason))


@pytest.mark.parametrize(
    "command",
    [
        static("gcc", "build-essential", "gcc", "-static", "-w", "-o"),
        static("musl-gcc", "musl-tools", "musl-gcc", "-static", "-o"),
        static("go", "golang-go", "go", "build", "-o"),
    ],
)
async def test_a_static_program(command: tuple[str, ...], tmp_path: Path) -> None:
    directory, source = tmp_path / "files", tmp_path / ("program.go" if "go" in command else "program.c")
    directory.mkdir()
    (directory / "greeting").write_text(GREETING)
    source.write_text(GO if "go" in command else C)
    environment = {"HOME": str(tmp_path), **os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath"}
    await trio.run_process([*command, str(tmp_path / "program"), str(source)], env=environment)
    async with open_company(directory) as (host, policy):
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            await sandbox.upload(tmp_path / "program", "/tmp/program")
            output = await sh(sandbox, f"/tmp/program {NAME} other.test {NAME}")
            assert output == f"{GREETING}no other.test\n{GREETING}[0]"
