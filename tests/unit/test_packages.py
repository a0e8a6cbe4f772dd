"""Packages of an image: for what, which lock, what uv is told and what it says, and where the files end up."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import cast

import pytest

from trio_sandbox import PackagesError, WheelMissingError
from trio_sandbox.image import PLACE, _uv
from trio_sandbox.image._contents import _UNPACK as UNPACK
from trio_sandbox.image._package_archive import pack
from trio_sandbox.image._package_tree import arrange
from trio_sandbox.image._pylock import Pin, parse_lock
from trio_sandbox.image._target import Target, find_target

TARGET = Target("3.13", "x86_64-manylinux_2_40")
SHA = "a" * 64


def lock(**package: object) -> str:
    """Give a lock of one package, with *package* as its fields."""
    fields = {"name": "Some.Tool", "version": "1.0", **package}
    body = "".join(f"{key} = {toml(value)}\n" for key, value in fields.items())
    return f"lock-version = '1.0'\nrequires-python = '>=3.13'\n[[packages]]\n{body}"


def toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml, cast('list[object]', value)))}]"
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value).items()
        return f"{{{', '.join(f'{key} = {toml(part)}' for key, part in fields)}}}"
    return repr(value)


HASHES = {"sha256": SHA}
WHEEL = {"url": "https://example.org/some_tool-1.0-py3-none-any.whl", "hashes": HASHES}


# --- For what ---


def packages(**versions: str) -> dict[str, object]:
    return {name.replace("_", "-"): version for name, version in versions.items()}


@pytest.mark.parametrize(
    ("libc6", "platform"), [("2.41-12", "2_40"), ("2.36-9+deb12u9", "2_36"), ("2.30-1", "2_28"), ("2.17-1", "2_17")]
)
def test_packages_are_for_the_image(libc6: str, platform: str) -> None:
    details = packages(python3_minimal="3.13.5-1", libc6=libc6)
    assert find_target("python", details) == Target("3.13", f"x86_64-manylinux_{platform}")


@pytest.mark.parametrize(
    "details", [{}, packages(libc6="2.41"), packages(python3_minimal="3.13"), packages(python3_minimal="x", libc6="y")]
)
def test_an_image_without_python_has_no_packages(details: dict[str, object]) -> None:
    with pytest.raises(PackagesError, match="the image 'x': it has no Python"):
        find_target("x", details)


def test_an_old_image_has_no_packages() -> None:
    with pytest.raises(PackagesError, match=r"there are none for its glibc 2\.5"):
        find_target("x", packages(python3_minimal="3.13.5-1", libc6="2.5-1"))


# --- Locks ---


def test_a_lock_is_read_and_written() -> None:
    found = parse_lock(lock(wheels=[WHEEL]))
    assert found.pins == (Pin("some-tool", "1.0"),)
    assert parse_lock(found.text) == found
    written = tomllib.loads(found.text)
    assert written.pop("lock-version") == "1.0"
    assert "requires-python" not in written  # uv would compare it with the host's
    assert written["packages"][0]["wheels"][0]["hashes"] == HASHES


def test_what_is_there_is_left_out() -> None:
    found = parse_lock(lock(wheels=[WHEEL]))
    assert found.without({Pin("some-tool", "1.0")}).pins == ()
    assert found.without({Pin("some-tool", "1.1")}) == found


@pytest.mark.parametrize(
    "package",
    [
        {"version": "1.0\n--index-url https://example.org"},
        {"version": "1.0 @ file:///etc/passwd"},
        {"version": "--pre"},
        {"name": "x\n--find-links /srv"},
        {"name": "-r /etc/passwd"},
        {"name": "x[y]"},
        {"name": ""},
    ],
)
def test_a_strangers_lock_tells_uv_nothing_but_names_and_versions(package: dict[str, str]) -> None:
    text = lock(wheels=[WHEEL], **package)
    for value in package.values():
        text = text.replace(repr(value), json.dumps(value))  # in which a line end is one
    with pytest.raises(PackagesError, match="which can't be one"):
        parse_lock(text)
    assert parse_lock(lock(wheels=[WHEEL], version="1!2.0.post1+local.3-x")).pins == (
        Pin("some-tool", "1!2.0.post1+local.3-x"),
    )


@pytest.mark.parametrize(
    "package",
    [
        {},
        {"wheels": []},
        {"sdist": {"url": "https://example.org/x-1.tar.gz"}},
        {"directory": {"path": "."}},
        {"vcs": {"type": "git", "url": "https://example.org/x"}},
        {"wheels": [WHEEL], "directory": {"path": "."}},
        {"archive": {"url": "https://example.org/x-1.0.zip"}},
        {"wheels": [{"url": "https://example.org/x-1.0.tar.gz", "hashes": HASHES}]},
    ],
)
def test_nothing_is_built_on_the_host(package: dict[str, object]) -> None:
    with pytest.raises(WheelMissingError, match=r"some-tool==1\.0 has no wheel .*\.script\(") as caught:
        parse_lock(lock(**package))
    assert (caught.value.package, caught.value.version) == ("some-tool", "1.0")


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64])
def test_a_wheel_without_a_digest_is_refused(digest: str) -> None:
    with pytest.raises(PackagesError, match=r"no SHA-256 digest of a wheel of some-tool 1\.0"):
        parse_lock(lock(wheels=[{**WHEEL, "hashes": {"sha256": digest}}]))


def test_paths_are_of_the_directory_that_has_the_lock() -> None:
    text = lock(wheels=[{"path": "../x-1.0-py3-none-any.whl", "hashes": HASHES}])
    assert '"/srv/x-1.0-py3-none-any.whl"' in parse_lock(text, Path("/srv/here")).text
    with pytest.raises(PackagesError, match="a relative path for some-tool"):
        parse_lock(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "lock-version = '2.0'\npackages = []",
        "lock-version = '1.0'\npackages = 1",
        "lock-version = '1.0'\npackages = [1]",
    ],
)
def test_what_is_no_lock(text: str) -> None:
    with pytest.raises(PackagesError, match="it is not a lock of packages"):
        parse_lock(text)


# --- uv ---


def test_uv_is_asked_for_wheels_only() -> None:
    for arguments in (
        _uv.compile_arguments(TARGET, constrained=True, exclude_newer="2026-11-01T00:00:00Z"),
        _uv.install_arguments(TARGET, Path("/tree")),
    ):
        assert arguments[arguments.index("--only-binary") + 1] == ":all:"
        assert arguments[arguments.index("--python-version") + 1] == "3.13"
        assert arguments[arguments.index("--python-platform") + 1] == "x86_64-manylinux_2_40"
        assert arguments[arguments.index("--python") + 1] == sys.executable
    compiling = _uv.compile_arguments(TARGET, constrained=False, exclude_newer=None)
    assert "--constraints" not in compiling
    assert "--exclude-newer" not in compiling
    assert "--no-deps" in _uv.install_arguments(TARGET, Path("/tree"))


def test_of_our_environment_uv_gets_what_says_where_from() -> None:
    kept = {
        "HOME": "/h",
        "https_proxy": "http://p",
        "SSL_CERT_FILE": "/c",
        "UV_INDEX_URL": "https://u",
        "UV_INDEX_X_PASSWORD": "p",
    }
    dropped = {
        "UV_NO_BINARY": "1",
        "UV_PYTHON": "3.9",
        "UV_TARGET": "/",
        "VIRTUAL_ENV": "/v",
        "PYTHONPATH": "/p",
        "CONDA_PREFIX": "/",
    }
    assert _uv.environment_of({**kept, **dropped}) == {**kept, "UV_PYTHON_DOWNLOADS": "never"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("UV_FIND_LINKS", "wheels,https://example.org/a,./b c", "/here/wheels,https://example.org/a,/here/b c"),
        ("UV_INDEX", "own=./index https://example.org/?a=b", "own=/here/index https://example.org/?a=b"),
        ("UV_DEFAULT_INDEX", "index", "/here/index"),
        ("UV_CACHE_DIR", "a=b", "/here/a=b"),
        ("UV_CONFIG_FILE", "/etc/uv.toml", "/etc/uv.toml"),
        ("SSL_CERT_FILE", "ca.pem", "/here/ca.pem"),
        ("UV_FIND_LINKS", "", ""),
        ("UV_INDEX_OWN_PASSWORD", "a/b", "a/b"),
    ],
)
def test_a_relative_path_is_of_our_directory(
    name: str, value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = expected.replace("/here", str(tmp_path))
    assert _uv.environment_of({name: value})[name] == expected
    assert _uv.choice_of({name: value}) in ([(name, expected)], [])  # in another directory it is another choice


def test_another_index_is_another_choice() -> None:
    assert _uv.choice_of({"UV_INDEX": "https://a", "HOME": "/h", "UV_CACHE_DIR": "/c"}) == [("UV_INDEX", "https://a")]


@pytest.mark.parametrize(
    ("said", "package", "version"),
    [
        (
            "error: No solution found\n  cause: Because pyspark==3.5.0 has no usable wheels and you require pyspark==3.5.0, we\n",
            "pyspark",
            "3.5.0",
        ),
        ("hint: Wheels are required for `a-b` because building from source is disabled", "a-b", ""),
        ("error: Failed to build `y @ file:///y`\n  cause: Building source distributions for `y` is disabled", "y", ""),
    ],
)
def test_a_package_without_a_wheel_is_named(said: str, package: str, version: str) -> None:
    error = _uv.explain(said)
    assert isinstance(error, WheelMissingError)
    assert (error.package, error.version) == (package, version)
    assert said.splitlines()[0] in str(error)
    assert ".script(" in str(error)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("error: No solution found\n  cause: Because there is no version of idna==99", "can't be installed together"),
        (
            "error: Request failed after 3 retries\n  cause: Failed to fetch: http://x/",
            "can't be reached.*safe to try again",
        ),
        ("error: os error 28: No space left on device", "the disk is full"),
        ("error: Failed to fetch: http://x/\n  cause: Disk quota exceeded (os error 122)", "the disk is full"),
        ("error: Request failed\n  cause: No space left on device (os error 28)", "the disk is full"),
    ],
)
def test_uv_has_its_say(said: str, why: str) -> None:
    error = _uv.explain(f"warning: of no use\n{said}\n")
    assert not isinstance(error, WheelMissingError)
    assert error.retry_safe
    message = str(error)
    assert message.endswith(f"uv says:\n{said}")
    with pytest.raises(PackagesError, match=f"(?s){why}"):
        raise error


def test_without_uv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio-sandbox\[packages\]'"):
        _uv.find_uv()


# --- Files ---


def digest(content: bytes) -> str:
    return "sha256=" + urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def test_packages_are_put_where_python_looks(tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    information = unpacked / "tool-1.dist-info"
    for directory in ("bin", "share/man", "etc/__pycache__", "tool", "tool-1.dist-info"):
        (unpacked / directory).mkdir(parents=True)
    (unpacked / ".lock").touch()
    (unpacked / "etc" / "__init__.py").touch()  # a package of that name
    (unpacked / "tool" / "__init__.py").touch(mode=0o600)
    (unpacked / "bin" / "tool").write_text("#!/host/venv/bin/python3.11\nimport tool\n")
    (unpacked / "bin" / "tool").chmod(0o700)
    (unpacked / "bin" / "long").write_text(
        "#!/bin/sh\n'''exec' \"/very/long/python\" \"$0\" \"$@\"\n' '''\nimport tool\n"
    )
    (unpacked / "bin" / "shell").write_text("#!/bin/sh\necho python\n")
    (unpacked / "share" / "man" / "tool.1").write_text("man\n")
    (information / "direct_url.json").write_text('{"url": "https://user:secret@example.org/"}')
    rows = [
        ["bin/tool", "sha256=x", "9"],
        ["bin/shell", digest(b"#!/bin/sh\necho python\n"), "22"],
        ["share/man/tool.1", "sha256=y", "4"],
        ["tool/__init__.py", "sha256=z", "0"],
        ["etc/__init__.py", "sha256=z", "0"],
        ["tool-1.dist-info/direct_url.json", "sha256=s", "40"],
        ["tool-1.dist-info/RECORD", "", ""],
    ]
    with (information / "RECORD").open("w", newline="") as file:
        csv.writer(file).writerows(rows)

    arrange(unpacked, tmp_path / "root", TARGET)

    local = tmp_path / "root" / "usr" / "local"
    site = local / "lib" / "python3.13" / "dist-packages"
    assert (local / "bin" / "tool").read_text() == "#!/usr/bin/python3\nimport tool\n"
    assert (local / "bin" / "long").read_text() == "#!/usr/bin/python3\nimport tool\n"
    assert (local / "bin" / "shell").read_text() == "#!/bin/sh\necho python\n"
    assert (local / "share" / "man" / "tool.1").exists()
    assert (site / "etc" / "__init__.py").exists()
    assert not (site / ".lock").exists()
    assert not (site / "tool-1.dist-info" / "direct_url.json").exists()
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (local / "bin" / "tool", site / "tool", site / "tool" / "__init__.py")
    }
    assert modes == {"tool": 0o755, "__init__.py": 0o644}
    with (site / "tool-1.dist-info" / "RECORD").open(newline="") as file:
        found = list(csv.reader(file))
    script = (local / "bin" / "tool").read_bytes()
    assert found == [
        ["../../../bin/tool", digest(script), str(len(script))],
        ["../../../bin/shell", digest(b"#!/bin/sh\necho python\n"), "22"],
        ["../../../share/man/tool.1", "sha256=y", "4"],
        *rows[3:5],
        rows[6],
    ]
    # What pip does to uninstall it: each path leads to a file.
    assert all((site / name).exists() for name, *_ in found if name.startswith(".."))


@pytest.mark.parametrize(
    ("prefix", "scripts", "site", "way"),
    [
        ("opt/conda", "opt/conda/bin", "opt/conda/lib/python3.12/site-packages", "../../.."),
        ("", "bin", "lib/python3.12/site-packages", "../../.."),
        ("usr/local", "usr/local/bin", "usr/local/lib64/python3.12/site-packages", "../../.."),
        ("srv", "srv/programs", "srv/modules", ".."),
    ],
)
def test_packages_are_put_where_any_python_looks(
    tmp_path: Path, prefix: str, scripts: str, site: str, way: str
) -> None:
    unpacked, root = tmp_path / "unpacked", tmp_path / "root"
    for directory in ("bin", "share", "tool-1.dist-info"):
        (unpacked / directory).mkdir(parents=True)
    (unpacked / "bin" / "tool").write_text("#!/host/python\nimport tool\n")
    (unpacked / "share" / "data").write_text("data")
    (unpacked / "tool-1.dist-info" / "RECORD").write_text("bin/tool,,\nshare/data,,\n")
    target = Target("3.12", "x", site, scripts, prefix, "/a b/python3", container=True)
    arrange(unpacked, root, target)
    assert (root / scripts / "tool").read_bytes() == target.first_line + b"import tool\n"
    assert (root / prefix / "share" / "data").read_text() == "data"
    record = (root / site / "tool-1.dist-info" / "RECORD").read_text().splitlines()
    assert record[0].startswith(f"{way}/{os.path.basename(scripts)}/tool,sha256=")
    assert record[1] == f"{way}/share/data,,"
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


def test_a_hostile_record_leads_nowhere(tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    (unpacked / "bin").mkdir(parents=True)
    (unpacked / "x-1.dist-info").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (unpacked / "bin" / "link").symlink_to(secret)
    (unpacked / "x-1.dist-info" / "RECORD").write_text("bin/../../../secret,sha256=x,4\n\nbin/link,,\n")
    arrange(unpacked, tmp_path / "root", TARGET)
    assert secret.read_text() == "mine"
    record = tmp_path / "root" / TARGET.site / "x-1.dist-info" / "RECORD"
    assert record.read_text().startswith("../../../bin/../../../secret,sha256=x,4\n")


def make_packages(root: Path) -> Path:
    """Make a tree as `arrange` leaves it; return where its modules are."""
    local = root / "usr" / "local"
    site = local / "lib" / "python3.13" / "dist-packages"
    for directory in ("big", "small/empty", "small/sub"):
        (site / directory).mkdir(parents=True)
    (site / "big" / "native.so").write_bytes(bytes(5 << 20))
    for number in range(64):
        (site / "small" / "sub" / f"{number}.py").write_text(f"x = {number}\n")
    (site / "small" / "link").symlink_to("sub")
    (local / "bin").mkdir()
    (local / "bin" / "tool").write_text("#!/usr/bin/python3\n")
    (local / "bin" / "tool").chmod(0o755)
    then = 1_600_000_000_900_000_000
    os.utime(site / "small" / "sub" / "0.py", ns=(then, then))
    return site


def test_packages_are_packed_into_archives_that_are_equally_much_work(tmp_path: Path) -> None:
    root = tmp_path / "root"
    site = make_packages(root)
    archives = [tmp_path / "0.tar", tmp_path / "1.tar"]
    pack(root, site, archives, (12, 34))
    files: list[list[str]] = []
    for number in (1, 0):  # in whichever order they are unpacked
        with tarfile.open(archives[number]) as tar:
            members = tar.getmembers()
            files.append([os.path.basename(each.name) for each in members if each.isfile()])
            assert {(each.uid, each.gid, each.uname, each.pax_headers == {}) for each in members} == {
                (12, 34, "", True)
            }
            # What may be there already stays as it is.
            assert not {each.name for each in members} & {
                "usr",
                "usr/local",
                "usr/local/bin",
                str(site.relative_to(root)),
            }
        # As the guest does it; Python's own way is another from version to version.
        (tmp_path / "target").mkdir(exist_ok=True)
        subprocess.run(["tar", "-C", tmp_path / "target", "-x", "-p", "-f", archives[number]], check=True)
    modules, others = files
    assert others == ["tool", "native.so"]
    assert len(modules) == 64
    target = tmp_path / "target"
    found, wanted = ({path.relative_to(top) for path in top.rglob("*")} for top in (target, root))
    assert found == wanted
    small = target / site.relative_to(root) / "small"
    assert int((small / "sub" / "0.py").stat().st_mtime) == 1_600_000_000
    assert os.readlink(small / "link") == "sub"
    assert (target / "usr" / "local" / "bin" / "tool").stat().st_mode & 0o777 == 0o755


def test_one_small_package_is_in_as_many_archives_as_were_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "root"
    site = root / TARGET.site
    site.mkdir(parents=True)
    (site / "one.py").write_text("x = 1\n")
    archives = [tmp_path / "0.tar", tmp_path / "1.tar"]
    pack(root, site, archives, (0, 0))
    names: list[list[str]] = []
    for archive in archives:
        with tarfile.open(archive) as tar:
            names.append(tar.getnames())
    assert names == [[f"{TARGET.site}/one.py"], []]


@pytest.mark.parametrize("damaged", [None, "0.tar", "1.tar"])
def test_archives_are_unpacked_side_by_side_or_the_step_fails(tmp_path: Path, damaged: str | None) -> None:
    root, target = tmp_path / "root", tmp_path / "target"
    site = make_packages(root)
    there = target / "usr" / "local" / "bin"
    there.mkdir(parents=True)
    there.chmod(0o700)
    (there / "tool").symlink_to("elsewhere")
    pack(root, site, [tmp_path / "0.tar", tmp_path / "1.tar"], (os.getuid(), os.getgid()))
    if damaged is not None:
        (tmp_path / damaged).write_bytes(b"no archive")
    script = UNPACK.replace(PLACE, str(tmp_path)).replace("-C /", f"-C {target}")
    status = subprocess.run(["/bin/sh", "-e", "-c", f"{script}\n: the rest"], check=False).returncode
    assert (status == 0) is (damaged is None)
    if damaged is None:
        assert sum(1 for _ in target.rglob("*")) == sum(1 for _ in root.rglob("*"))
        # A directory that is there stays as it is; a file takes the place of what is there, and not of where that leads.
        assert there.stat().st_mode & 0o777 == 0o700
        assert (there / "tool").read_text() == "#!/usr/bin/python3\n"
        assert not (there / "elsewhere").exists()
