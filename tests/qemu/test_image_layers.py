"""Layers of images, made by real machines, and what the code of sandboxes sees of them."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from tests._debian import make_deb
from tests._index import Index, make_wheel, serve_index
from tests._leaks import HANG_LIMIT
from tests._registry import serve_registry
from trio_sandbox import Image, ImageBuildError, Network, NetworkRule, open_host, saved_sandboxes
from trio_sandbox.image import ImageStore, default_cache_directory, export_image
from trio_sandbox.image._archive import read_archive
from trio_sandbox.image._bytecode import compile_tree
from trio_sandbox.image._target import Target
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
print(subprocess.check_output("beta; pip list --format=freeze | grep -E '^(alpha|beta)='; pip check; /opt/tool/run; greeting", shell=True, text=True), end="")
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
installed by apt
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


async def magic_of_the_host(directory: Path) -> str:
    """Give the magic number of the byte code that the host makes of packages."""
    target = Target("3.13", "x86_64-manylinux_2_41")
    (directory / "tree" / target.site).mkdir(parents=True)
    (directory / "work").mkdir()
    system = await ImageStore(default_cache_directory()).ensure_system(build=False)
    return await compile_tree(system.disk, directory / "tree", target, directory / "work", {})


async def remove_what_was_made(step: str) -> None:
    cache = default_cache_directory()
    store = ImageStore(cache)
    with trio.move_on_after(HANG_LIMIT, shield=True):
        for each in store.list():
            if each.step == step:
                await store.remove(each.name)


async def test_what_is_added_is_there(tmp_path: Path, index: Index) -> None:
    tool = tmp_path / "tool"
    tool.mkdir()
    (tool / "run").write_text("#!/bin/sh\necho it runs\n")
    (tool / "run").chmod(0o755)
    (tool / "link").symlink_to("run")
    (tmp_path / "sources.list").write_text("deb [trusted=yes] http://files.test/ ./\n")
    make_deb(index.directory)
    network = Network.allow(NetworkRule("files.test", port=80, to=("127.0.0.1", index.port)))
    image = (
        Image("python")
        .packages("alpha")
        .files({"/opt/tool": tool, "/etc/apt/sources.list": tmp_path / "sources.list"})
        .env({"COLOUR": "light blue"})
        .apt("greeting", network=network)
    )
    async with open_host() as host:
        try:
            async with host.open_sandbox(image) as sandbox:
                assert sandbox.image == image
                assert (await sandbox.run(_LOOK)).stdout == _SEEN
                # What was compiled on the host is of use to this Python.
                magic = await sandbox.run("import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())")
                assert magic.stdout == f"{await magic_of_the_host(tmp_path)}\n"
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
            # What QEMU has written is such that another machine takes it.
            (saved,) = [each for each in saved_sandboxes() if each.name == "layered"]
            await export_image(ImageStore(default_cache_directory()), saved.image, tmp_path / "image.tar")
            with (tmp_path / "image.tar").open("rb") as file:
                layers = [layer.manifest.name for layer in read_archive(file).layers]
            assert (len(layers), layers[0], layers[-1]) == (5, "python", saved.image)
            with pytest.raises(ImageBuildError, match=r"ended with status 3:\n\| its own words"):
                await host.prepare(image.script("echo its own words >&2; exit 3"))
        finally:
            NamedTemplateStore(default_cache_directory()).remove("layered")
            await remove_what_was_made("packages alpha")  # noqa: ASYNC102 - it shields itself


_REQUIRE = """
const app = require('app'), {default: x} = await import('@scope/x');
console.log(app('7'), x, (await import('left-pad')).default(1, 3));
console.log(require('child_process').execSync('app; cd /tmp; node -e "console.log(require(\\'app\\')(1))"').toString().trim());
"""
_SCRIPTS = {"a.cjs": "console.log(require('app')(8))", "b.mjs": "import x from '@scope/x'; console.log(x)"}


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm (Debian: apt-get install npm)")
@pytest.mark.usefixtures("node_image")
async def test_packages_of_npm_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_registry(tmp_path, monkeypatch) as registry:
        registry.add("left-pad", "1.3.0", {"index.js": "module.exports = (s, n) => String(s).padStart(n, '0')"})
        registry.add("@scope/x", "2.0.0", {"index.mjs": "export default 'module'"}, exports="./index.mjs")
        registry.add(
            "app",
            "1.0.0",
            {
                "index.js": "module.exports = s => require('left-pad')(s, 2)",
                "cli.js": "#!/usr/bin/env node\nconsole.log('app')",
            },
            dependencies={"left-pad": "^1.0.0", "@scope/x": "2"},
            bin="cli.js",
        )
        async with open_host() as host:
            try:
                async with host.open_sandbox(Image("node").npm("app")) as sandbox:
                    result = await sandbox.run(_REQUIRE)
                    assert result.stdout == "07 module 001\napp\n01\n", result
                    for name, text in _SCRIPTS.items():
                        await sandbox.path(name).write_text(text)
                    done = await sandbox.run_process(["sh", "-c", "node a.cjs; node b.mjs"], capture_stdout=True)
                    assert done.stdout == b"08\nmodule\n"
            finally:
                await remove_what_was_made("npm app")  # noqa: ASYNC102 - it shields itself
