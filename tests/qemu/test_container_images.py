"""Container images in real machines: with Python and nothing else of Debian's, and with one static program and nothing else at all."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests._index import make_wheel, serve_index
from tests._leaks import HANG_LIMIT
from tests._oci import Member, archive, directory, member, write_layout
from trio_sandbox import (
    Host,
    HostConfig,
    Image,
    ImageBuildError,
    PackagesError,
    RunRefusedError,
    WarmupError,
    open_host,
)
from trio_sandbox.image import ImageStore, default_cache_directory, export_image, import_images

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_USERS = "root:x:0:0::/root:/bin/sh\napp:x:1500:1501::/home/app:/bin/sh\n"
_HELLO = r"""
#include <stdio.h>
#include <unistd.h>
int main(void) {
    char here[100], given[100] = "";
    fgets(given, sizeof given, stdin);
    printf("%d %s %s\n", (int) getuid(), getcwd(here, sizeof here), given);
}
"""
_LOOK = """
import os, sys
status = os.stat("/srv/data")
print(sys.version_info[:2], os.getuid(), os.getgid(), os.getcwd(), os.environ["COLOUR"], os.environ["HOME"])
print(oct(status.st_mode), status.st_uid, status.st_nlink, os.readlink("link"), open("/mnt/data/file").read())
print(os.stat("/mnt/data/file").st_uid, os.path.exists("gone"), os.stat("sparse").st_blocks)
"""


def busybox(*names: str) -> list[Member]:
    program = Path("/bin/busybox").read_bytes()
    links = (member(f"bin/{name}", "bin/busybox", kind="link") for name in names)
    return [member("bin/busybox", program, mode=0o755), *links]


@asynccontextmanager
async def removing(reference: str) -> AsyncGenerator[None]:
    """Remove an image, and what stands on it, after the block."""
    try:
        yield
    finally:
        with trio.move_on_after(HANG_LIMIT, shield=True):
            await ImageStore(default_cache_directory()).remove(reference)


async def test_an_image_with_a_python(tmp_path: Path) -> None:
    """The image is what our agent runs in, and so has what Python needs."""
    (base,) = [
        each for each in ImageStore(default_cache_directory()).list() if each.name == "system-base" and each.current
    ]
    lower = (base.path / "userland.tar").read_bytes()
    sparse = {"GNU.sparse.size": "1000000", "GNU.sparse.map": "500000,5"}
    upper = archive(
        member("etc/passwd", _USERS),
        directory("home/app", uid=1500, gid=1501),
        member("srv/gone"),
        member("srv/data", "content", uid=1500, mode=0o4640),
        member("srv/other", "srv/data", kind="link"),
        member("srv/link", "/srv/data", kind="symlink"),
        member("srv/sparse", "12345", pax_headers=sparse),
    )
    config = {
        "User": "app",
        "WorkingDir": "/srv",
        "Env": ["COLOUR=light blue"],
        "Cmd": ["python3", "-c", "print(6 * 7)"],
    }
    write_layout(tmp_path / "image", lower, upper, archive(member("srv/.wh.gone")), config=config)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("mounted")
    reference = f"oci:{tmp_path}/image"
    async with removing(reference), open_host(HostConfig(templates=False)) as host:
        async with host.open_sandbox(Image.oci(reference), mounts={"/mnt/data": tmp_path / "data"}) as sandbox:
            assert (await sandbox.run(_LOOK)).stdout == (
                "(3, 13) 1500 1501 /srv light blue /home/app\n0o104640 1500 2 /srv/data mounted\n1500 False 8\n"
            )
            own = await sandbox.run_process(capture_stdout=True)
            assert own.stdout == b"42\n"
            await sandbox.path("/home/app/file").write_text("written")
            assert (await sandbox.run("print(open('/home/app/file').read())")).stdout == "written\n"
            with pytest.raises(RunRefusedError, match="bash"):
                await sandbox.run("echo", language="shell")


_PACKAGES = """
import os, subprocess, sys, alpha
from importlib import metadata
print(alpha.VERSION, alpha.__file__, os.path.exists(alpha.__cached__), os.stat(alpha.__file__).st_uid)
print(sorted((each.name, each.version) for each in metadata.distributions()), os.access(sys.prefix, os.W_OK))
print(subprocess.check_output(["alpha"], env={"PATH": os.environ["PATH"]}, text=True), open("/opt/venv/bin/alpha").readline(), sep="", end="")
"""
_FOUND = """\
2.0 /opt/venv/lib/python3.13/site-packages/alpha.py True 0
[('alpha', '2.0'), ('beta', '1.0')] False
alpha 2.0
#!/opt/venv/bin/python3
"""


_IMPOSTOR = """#!/opt/venv/bin/python3 -I
import json, os, sys
if sys.argv[-1].endswith(":"):
    places = {"site": "/home/app/site", "scripts": "/home/app/bin", "prefix": "/home/app"}
    facts = {"implementation": "cpython", "version": "3.13", "wide": True, "threaded": False, "libc": ["glibc", "2.41"]}
    facts |= {**places, "interpreter": "/home/app/bin/python3", "looked_for": True, "installed": []}
    print(sys.argv[-1] + json.dumps(facts))
else:
    open("/home/app/who", "w").write(str(os.getuid()))
"""


async def test_packages_of_a_python_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment on PATH, which has a package already, belongs to root, and whose image has no shell, no cp and no tar."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "alpha", "2.0", requires=("beta",))
    make_wheel(wheels, "alpha", "3.0", tag="cp313-cp313-musllinux_1_2_x86_64")
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "beta", version)
    make_wheel(wheels, "gamma", "1.0", files={"gamma-1.0.data/data/share/gamma": "data"})
    (base,) = [
        each for each in ImageStore(default_cache_directory()).list() if each.name == "system-base" and each.current
    ]
    home, site = "opt/venv", "opt/venv/lib/python3.13/site-packages"
    upper = archive(
        member("etc/passwd", _USERS),
        directory("home/app", uid=1500, gid=1501),
        member(f"{home}/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n"),
        member(f"{home}/bin/python3", "/usr/bin/python3", kind="symlink"),
        member(f"{site}/beta.py", "VERSION = '1.0'\n"),
        member(f"{site}/beta-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: beta\nVersion: 1.0\n"),
        member(f"{site}/beta-1.0.dist-info/RECORD", "beta.py,,\n"),
    )
    config = {
        "User": "app",
        "Env": [
            "PATH=/home/app/bin:/opt/venv/bin",
            "PYTHONHOME=/nowhere",
            "PYTHONPATH=/nowhere",
            "PYTHONDONTWRITEBYTECODE=1",
            "PYTHONPYCACHEPREFIX=/nowhere",
        ],
    }
    write_layout(tmp_path / "image", (base.path / "userland.tar").read_bytes(), upper, config=config)
    reference = f"oci:{tmp_path}/image"
    plain = Image.oci(reference)
    with serve_index(wheels, monkeypatch):
        async with removing(reference), open_host(HostConfig(templates=False)) as host:
            async with host.open_sandbox(plain.packages("alpha")) as sandbox:
                assert (await sandbox.run(_PACKAGES)).stdout == _FOUND
                await sandbox.install("gamma")
                seen = await sandbox.run("import gamma, os; print(gamma.VERSION, os.stat(gamma.__file__).st_uid)")
                assert seen.stdout == "1.0 1500\n"
                assert await sandbox.path("/opt/venv/share/gamma").read_text() == "data"
                with pytest.raises(PackagesError, match=r"(?s)uv says:.*beta"):
                    await sandbox.install("beta>=2")
                # Whatever the code calls a Python is nothing that root runs.
                await sandbox.path("/home/app/bin").mkdir()
                await sandbox.path("/home/app/bin/python3").write_text(_IMPOSTOR)
                await sandbox.path("/home/app/bin/python3").chmod(0o755)
                await sandbox.install("gamma")
                assert await sandbox.path("/home/app/who").read_text() == "1500"


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (Debian: apt-get install musl-tools)")
async def test_an_image_with_musl_and_nothing_else(tmp_path: Path) -> None:
    """A program that musl's loader starts, and a static one: no shell, no directories, no users."""
    source = tmp_path / "hello.c"
    source.write_text(_HELLO)
    loader = Path("/lib/ld-musl-x86_64.so.1").resolve().read_bytes()
    members = [member("lib/ld-musl-x86_64.so.1", loader, mode=0o755)]
    for name, options in (("dynamic", ()), ("static", ("-static",))):
        command = ["musl-gcc", "-O1", *options, "-o", tmp_path / name, source]
        await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        members.append(member(name, (tmp_path / name).read_bytes(), mode=0o755))
    write_layout(tmp_path / "image", archive(*members), config={"Entrypoint": ["/dynamic"], "User": "4711"})
    reference = f"oci:{tmp_path}/image"
    async with removing(reference), open_host(HostConfig(templates=False)) as host:
        async with host.open_sandbox(Image.oci(reference)) as sandbox:
            for program in (None, ["/static"]):
                done = await sandbox.run_process(program, stdin=b"input", capture_stdout=True)
                assert done.stdout == b"4711 / input\n"
            with pytest.raises(RunRefusedError, match="python3"):
                await sandbox.run("1", language="python")
            with pytest.raises(PackagesError, match=f"'{reference}': it has no python3 on its PATH"):
                await sandbox.install("idna")
            await sandbox.path("/tmp/made").write_text("written")
            assert await sandbox.path("/tmp/made").read_text() == "written"


async def test_an_image_of_one_program_and_a_layer_on_it(tmp_path: Path) -> None:
    write_layout(
        tmp_path / "image",
        archive(*busybox("sh", "cat", "cp", "id", "pwd", "mkdir", "stat")),
        config={
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["id -u; pwd; cat /opt/tool/made; stat -c '%a %u' /opt/tool/made"],
        },
    )
    tool = tmp_path / "tool"
    tool.mkdir()
    (tool / "made").write_text("made\n")
    (tool / "made").chmod(0o775)
    image = Image.oci(f"oci:{tmp_path}/image").files({"/opt/tool": tool})
    async with removing(image.name), open_host(HostConfig(templates=False)) as host:
        with pytest.raises(WarmupError, match="no interpreter"):
            async with host.open_sandbox(image, warmup="1"):
                pass
        async with host.open_sandbox(image) as sandbox:
            assert sandbox.language == ""
            own = await sandbox.run_process(capture_stdout=True)
            assert own.stdout == b"0\n/\nmade\n775 0\n"
            with pytest.raises(RunRefusedError, match="has no interpreter"):
                await sandbox.run("1")
            await sandbox.path("file").write_text("written")
            async with sandbox.fork(1) as (child,):
                read = await child.run_process("cat /file", shell=True, capture_stdout=True)
                assert read.stdout == b"written"


async def test_files_and_variables_for_an_image_without_a_shell(tmp_path: Path) -> None:
    """One program that prints files and variables, a file in its way, and no /etc/passwd; and the image on another machine."""
    write_layout(
        tmp_path / "image",
        archive(
            *busybox("cat", "env", "stat"),
            member("opt/tool/old", "old", mode=0o600),
            member("etc/environment", "KEPT=1"),
        ),
        config={"User": "4711:4712"},
    )
    tool = tmp_path / "tool"
    (tool / "sub").mkdir(parents=True)
    (tool / "sub" / "made").write_text("made\n")
    (tool / "sub" / "made").chmod(0o755)
    (tool / "link").symlink_to("sub/made")
    (tool / "old").write_text("new\n")
    (tool / "old").chmod(0o644)
    reference = f"oci:{tmp_path}/image"
    image = (
        Image.oci(reference).files({"/opt/tool": tool, "/srv/deep/file": tool / "old"}).env({"COLOUR": "light blue"})
    )
    script = [
        "stat",
        "-c",
        "%n %a %u",
        "/opt/tool/sub/made",
        "/opt/tool/old",
        "/opt/tool",
        "/srv/deep",
        "/etc/environment",
    ]
    seen = "/opt/tool/sub/made 755 0\n/opt/tool/old 644 0\n/opt/tool 755 0\n/srv/deep 755 0\n/etc/environment 644 0\n"

    async def look(host: Host, name: str | Image) -> None:
        async with host.open_sandbox(name) as sandbox:
            for command, said in (
                (script, seen),
                (["cat", "/opt/tool/link", "/opt/tool/old", "/srv/deep/file"], "made\nnew\nnew\n"),
                (["cat", "/etc/environment"], "KEPT=1\nCOLOUR=light blue\n"),
            ):
                done = await sandbox.run_process(command, capture_stdout=True)
                assert (done.stdout or b"").decode() == said
            done = await sandbox.run_process(["env"], capture_stdout=True)
            assert b"COLOUR=light blue\n" in (done.stdout or b"")

    async with removing(reference), open_host(HostConfig(templates=False)) as host:
        await look(host, image)
        for more in (image.script("true"), image.apt("hello")):
            with pytest.raises(ImageBuildError, match=r"needs /bin/sh.*an earlier step bring one \(\.files"):
                await host.prepare(more)
        with pytest.raises(ImageBuildError, match=r"/bin/cat: Not a directory"):
            await host.prepare(Image.oci(reference).files({"/bin/cat/x": tool}))
        # As the message says.
        with_shell = Image.oci(reference).files({"/bin/sh": Path("/bin/busybox")}).script("echo yes > /answer")
        async with host.open_sandbox(with_shell) as sandbox:
            assert await sandbox.path("/answer").read_text() == "yes\n"
        name = next(
            each.name
            for each in ImageStore(default_cache_directory()).list()
            if each.step.startswith("environment COLOUR")
        )
        await export_image(ImageStore(default_cache_directory()), name, tmp_path / "image.tar")
    shutil.rmtree(tmp_path / "image")
    store = ImageStore(default_cache_directory())
    async with removing(reference):
        await import_images(store, tmp_path / "image.tar", progress=lambda _: None, environment={})
        async with open_host(HostConfig(templates=False, build_images=False)) as host:
            await look(host, image)
