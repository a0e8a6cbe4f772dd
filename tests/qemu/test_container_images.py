"""Container images in real machines: with Python and nothing else of Debian's, and with one static program and nothing else at all."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests._leaks import HANG_LIMIT
from tests._oci import Member, archive, directory, member, write_layout
from trio_sandbox import HostConfig, Image, RunRefusedError, WarmupError, open_host
from trio_sandbox.image import ImageStore, default_cache_directory

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_USERS = "root:x:0:0::/root:/bin/sh\napp:x:1500:1501::/home/app:/bin/sh\n"
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
