"""Layers of images, made by real machines, and what the code of sandboxes sees of them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from tests._index import Index, make_wheel, serve_index
from tests._leaks import HANG_LIMIT
from trio_sandbox import Image, ImageBuildError, open_host
from trio_sandbox.image import ImageStore, default_cache_directory
from trio_sandbox.machines import NamedTemplateStore

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_LOOK = """
import os, subprocess, sys
from importlib import metadata
import alpha
print(alpha.VERSION, metadata.version("alpha"), metadata.requires("alpha"), os.path.exists(alpha.__cached__))
print(sorted(each.name for each in metadata.distributions() if each.name in ("alpha", "beta")))
print(os.environ["COLOUR"], os.environ["PATH"])
print(subprocess.check_output(["alpha"], text=True), end="")
print(subprocess.check_output("beta; pip list --format=freeze | grep -E '^(alpha|beta)='; pip check; /opt/tool/run", shell=True, text=True), end="")
status = os.stat("/opt/tool/run")
print(oct(status.st_mode), status.st_uid, os.readlink("/opt/tool/link"), os.path.isdir("/usr/local/bin"))
print(os.listdir("/run/"), "sandbox-" in open("/etc/hosts").read().replace(os.uname().nodename, ""))
"""
_SEEN = """\
1.0 1.0 ['beta<3'] True
['alpha', 'beta']
light blue /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
alpha 1.0
beta 2.0
alpha==1.0
beta==2.0
No broken requirements found.
it runs
0o100755 0 run True
[] False
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Index]:
    directory = tmp_path / "index"
    directory.mkdir()
    make_wheel(directory, "alpha", "1.0", requires=("beta<3",))
    make_wheel(directory, "beta", "2.0")
    make_wheel(directory, "beta", "3.0")
    make_wheel(directory, "gamma", "1.0")
    with serve_index(directory, monkeypatch) as index:
        yield index


async def remove_what_was_made() -> None:
    cache = default_cache_directory()
    store = ImageStore(cache)
    with trio.move_on_after(HANG_LIMIT, shield=True):
        for each in store.list():
            if each.step == "packages alpha":
                await store.remove(each.name)
        NamedTemplateStore(cache).remove("layered")


async def test_what_is_added_is_there(tmp_path: Path, index: Index) -> None:
    tool = tmp_path / "tool"
    tool.mkdir()
    (tool / "run").write_text("#!/bin/sh\necho it runs\n")
    (tool / "run").chmod(0o755)
    (tool / "link").symlink_to("run")
    image = Image("python").packages("alpha").files({"/opt/tool": tool}).env({"COLOUR": "light blue"})
    async with open_host() as host:
        try:
            async with host.open_sandbox(image) as sandbox:
                assert sandbox.image == image
                assert (await sandbox.run(_LOOK)).stdout == _SEEN
                console = await sandbox.run_process(["dmesg"], user="root", capture_stdout=True)
                assert b"vdb): mounted filesystem" in console.stdout
                assert b"unchecked" not in console.stdout
                await sandbox.save("layered", replace=True)
            async with host.open_sandbox(template="layered") as sandbox:
                assert (await sandbox.run(_LOOK)).stdout == _SEEN
                # What was installed stays as it is, and what is new is there in the interpreter that runs.
                await sandbox.install("gamma", "beta")
                assert (
                    await sandbox.run("import gamma, beta; print(gamma.VERSION, beta.VERSION)")
                ).stdout == "1.0 2.0\n"
                done = await sandbox.run_process(["sh", "-c", "gamma; ls /tmp; pip check"], capture_stdout=True)
                assert done.stdout == b"gamma 1.0\nNo broken requirements found.\n"
            with pytest.raises(ImageBuildError, match=r"ended with status 3:\n\| its own words"):
                await host.prepare(image.script("echo its own words >&2; exit 3"))
        finally:
            await remove_what_was_made()  # noqa: ASYNC102 - it shields itself
