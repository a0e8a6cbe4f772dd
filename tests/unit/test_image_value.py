"""`trio_sandbox.Image`: a value, and what can't be one."""

from __future__ import annotations

import datetime as dt
import pickle
from pathlib import Path

import pytest

from trio_sandbox import HostConfig, Image, Network, NetworkRule, SandboxConfig
from trio_sandbox._image import to_image
from trio_sandbox.host import check_image


def whole() -> Image:
    return (
        Image("python")
        .packages("pandas>=2", "numpy", exclude_newer="2026-11-01")
        .files({"/opt/tool": "/srv/tool"})
        .env({"TZ": "Europe/Paris"})
        .script("make install", network=Network.allow("pypi.org"))
        .npm("zod")
        .apt("graphviz", "g++=4:14.2.0-1", network=Network.allow("deb.debian.org"))
    )


def test_equal_images_are_one_key() -> None:
    assert {whole(): 1}[whole()] == 1
    assert whole() != Image("python")
    assert whole().steps[:1] == Image("python").packages("pandas>=2", "numpy", exclude_newer="2026-11-01").steps


def test_an_image_travels_by_pickle() -> None:
    assert pickle.loads(pickle.dumps(whole())) == whole()


def test_it_is_printed_as_it_was_made() -> None:
    image = Image("python").packages("pandas>=2").files({"/opt/tool": "/srv/tool"}).env({"A": "b"}).script("make\nx")
    assert repr(image) == (
        "Image('python').packages('pandas>=2').files({'/opt/tool': '/srv/tool'}).env({'A': 'b'}).script('make\\nx')"
    )
    assert eval(repr(image)) == image
    assert repr(Image("node").npm("zod", "@types/node@^20")) == "Image('node').npm('zod', '@types/node@^20')"
    apt = Image("python").apt("graphviz", network=Network.none())
    assert eval(repr(apt)) == apt
    assert str(apt) == "python, apt graphviz"
    assert str(image) == "python, packages pandas>=2, files /opt/tool, environment A, script make ..."


def test_an_image_does_not_change() -> None:
    image = Image("python")
    image.packages("pandas")
    assert image == Image("python")
    with pytest.raises(AttributeError):
        image.name = "node"  # type: ignore[misc]


def test_what_names_an_image_has_one_form() -> None:
    assert to_image(Image("python")) == "python"
    assert to_image("python") == "python"
    assert to_image(whole()) == whole()


@pytest.mark.parametrize("wrong", [None, 1, b"python", Path("python"), ("python",)])
def test_nothing_else_names_an_image(wrong: object) -> None:
    with pytest.raises(TypeError, match="the name of an image, not "):
        check_image(wrong)


def test_a_warm_pool_takes_both_forms() -> None:
    config = SandboxConfig(memory_mib=512)
    warm = HostConfig(warm={Image("node"): 1, whole(): 2, (whole(), config): 3}).warm
    assert warm == {("node", SandboxConfig()): 1, (whole(), SandboxConfig()): 2, (whole(), config): 3}
    with pytest.raises(ValueError, match="twice"):
        HostConfig(warm={Image("node"): 1, "node": 1})


def test_relative_files_are_those_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = Image("python").files({"/opt/": "tool"})
    assert image == Image("python").files({"/opt": tmp_path / "tool"})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("2026-11-01", "2026-11-01T00:00:00Z"),
        ("2026-11-01T12:00:00+02:00", "2026-11-01T10:00:00Z"),
        (dt.date(2026, 11, 1), "2026-11-01T00:00:00Z"),
        (dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC), "2026-11-01T12:00:00Z"),
    ],
)
def test_a_moment_is_the_same_everywhere(given: str | dt.date, told: str) -> None:
    image = Image("python").packages("idna", exclude_newer=given)
    assert f"exclude_newer={told!r}" in repr(image)


def test_no_moments() -> None:
    image = Image("python")
    with pytest.raises(ValueError, match=r"must be a time such as '2026-11-01' .*not 'soon'"):
        image.packages("idna", exclude_newer="soon")
    with pytest.raises(ValueError, match="must have a time zone"):
        image.packages("idna", exclude_newer=dt.datetime(2026, 11, 1, 12))  # noqa: DTZ001 - the point of it
    with pytest.raises(TypeError, match="must be a date, a datetime or str, not 7"):
        image.packages("idna", exclude_newer=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requirement", "why"),
    [
        ("", "must be one line such as"),
        ("a\nb", "must be one line such as"),
        ("--index-url=x", "is an option, not a requirement"),
        (" -e .", "is an option, not a requirement"),
        ("./tool", "is the name of a file"),
        ("requirements.txt", "is the name of a file: pass it as Path"),
        ("alpha @ dist/alpha-1.0-py3-none-any.whl", "has a relative path.*absolute, as in 'alpha @ file:///"),
        ("alpha[all]@./alpha.whl ; python_version > '3'", "has a relative path"),
        ("pylock.toml", "is the name of a file: pass it as Path"),
        ("alpha beta", "must be a package's name.*as in 'pandas' or 'pandas>=2', not 'alpha beta'"),
        ("alpha 2.0", "must be a package's name"),
        (">=2", "must be a package's name"),
        ("alpha[all", "must be a package's name"),
    ],
)
def test_no_requirements(requirement: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Image("python").packages(requirement)


@pytest.mark.parametrize(
    "requirement",
    [
        *(
            "alpha",
            "alpha>=2",
            "alpha >= 2, <3",
            "alpha (==2.*)",
            "alpha~=1.4",
            "alpha===2",
            "Al_ph.a-1!=3",
            " alpha<2 ",
        ),
        *("alpha[all]", "alpha[one, two]>=2", "alpha [all] ; sys_platform == 'linux'", "alpha;python_version>'3'"),
        *("alpha @ https://example.org/alpha.whl", "alpha[all]@file:///srv/alpha.whl"),
    ],
)
def test_requirements_of_every_form(requirement: str) -> None:
    assert Image("python").packages(requirement).steps


def test_packages_need_a_requirement() -> None:
    with pytest.raises(ValueError, match="needs a requirement"):
        Image("python").packages()


def test_requirements_come_from_files(tmp_path: Path) -> None:
    text = "# ours\npandas>=2  # frames\n\nnumpy \\\n  <3\nx @ https://example.org/x-1-py3-none-any.whl#sha256=1\n"
    (tmp_path / "requirements.txt").write_text(text)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["rich", "idna; extra"]\n')
    image = Image("python").packages("tqdm", tmp_path / "requirements.txt", tmp_path / "pyproject.toml")
    (tmp_path / "requirements.txt").unlink()  # it was read
    assert image == Image("python").packages(
        "tqdm",
        "pandas>=2",
        "numpy    <3",
        "x @ https://example.org/x-1-py3-none-any.whl#sha256=1",
        "rich",
        "idna; extra",
    )


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("r.txt", "-r other.txt\n", "'-r other.txt' is an option"),
        ("r.txt", "\xff", "requirement|name of a file|codec"),
        ("r.txt", "# nothing\n", "needs a requirement"),
        ("pyproject.toml", "[tool]\n", r"it has no table \[project\]"),
        ("pyproject.toml", "[project]\ndependencies = 1\n", "project.dependencies is no list of texts"),
        ("pyproject.toml", "[project", "pyproject.toml: "),
        ("r.txt", "a" * (2**20 + 1), "that is not a requirements file"),
    ],
)
def test_files_that_have_no_requirements(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=why):
        Image("python").packages(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Image("python").packages(tmp_path / "none.txt")


def test_a_lock_says_all(tmp_path: Path) -> None:
    (tmp_path / "pylock.dev.toml").write_text("lock-version = '1.0'\n")
    image = Image("python").packages(tmp_path / "pylock.dev.toml")
    assert repr(image) == "Image('python').packages(<a lock of 21 characters>)"
    with pytest.raises(ValueError, match="is a lock, which fixes everything"):
        Image("python").packages("rich", tmp_path / "pylock.dev.toml")


@pytest.mark.parametrize(
    "place",
    ["opt", "/", "//opt", "/dev/x", "/proc/x", "/sys/x", "/run/x", "/opt\0", "/opt/../run", "/" + "\u00e9" * 2048],
)
def test_no_places(place: str) -> None:
    with pytest.raises(ValueError, match="a place in `places` must"):
        Image("python").files({place: "x"})


def test_files_need_places() -> None:
    with pytest.raises(ValueError, match="two files for '/opt'"):
        Image("python").files({"/opt": "a", "/opt/": "b"})
    with pytest.raises(ValueError, match="must have a place at least"):
        Image("python").files({})
    with pytest.raises(TypeError, match="must be a mapping"):
        Image("python").files(["/opt"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "A B", "1A", "A=B", "A\n", "Ä"])
def test_no_names_of_variables(name: str) -> None:
    with pytest.raises(ValueError, match="a variable's name must be of letters, digits and '_'"):
        Image("python").env({name: "x"})


@pytest.mark.parametrize("value", ["a\nb", "a\r", "a\0"])
def test_no_values_of_variables(value: str) -> None:
    with pytest.raises(ValueError, match="the value of A must be one line without zero bytes"):
        Image("python").env({"A": value})


def test_variables_that_the_guest_would_not_read_as_they_are() -> None:
    for value in ("a ", "a\t", " ", "a\x1c"):
        with pytest.raises(ValueError, match="the value of A must not end in white space"):
            Image("python").env({"A": value})
    with pytest.raises(ValueError, match="at most 131072 bytes, not 131073"):
        Image("python").env({"A": "x", "B": "\u00e9" * ((131072 - 7) // 2 + 1)})
    Image("python").env({"A": "a\u2028b\x0bc", "B": ""})


def test_scripts_have_text_and_no_secrets() -> None:
    with pytest.raises(ValueError, match="must be a shell script"):
        Image("python").script(" \n")
    with pytest.raises(TypeError, match="`command` must be str, not list"):
        Image("python").script(["make"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`network` must be a Network"):
        Image("python").script("make", network="open")  # type: ignore[arg-type]
    secret = Network.allow(NetworkRule("pypi.org", secrets={"TOKEN": "s3cret-s3cret"}))
    with pytest.raises(ValueError, match="must have no secrets"):
        Image("python").script("make", network=secret)


@pytest.mark.parametrize("name", ["", None, 3])
def test_images_have_names(name: object) -> None:
    with pytest.raises((TypeError, ValueError), match="an image's `name` must"):
        Image(name)


@pytest.mark.parametrize(
    "name", ["graphviz", "g++", "libc6:amd64", "bash=5.2.37-2+b5", "git/trixie", "/opt/my tool_1.deb"]
)
def test_what_apt_installs(name: str) -> None:
    (step,) = Image("python").apt(name).steps
    assert str(step) == f"apt {name}"


@pytest.mark.parametrize(
    "name", ["", "-y", "Graphviz", "bash-", "a b", "a;b", "a\n", "a=", "./x.deb", "/opt/x", "a=1 b", "/opt/x\n.deb"]
)
def test_what_is_no_package_of_debian(name: str) -> None:
    with pytest.raises(ValueError, match="a package must be a name such as 'graphviz'"):
        Image("python").apt(name)


def test_apt_needs_names_and_a_network_without_secrets() -> None:
    with pytest.raises(ValueError, match="`apt` needs a package"):
        Image("python").apt()
    with pytest.raises(TypeError, match="a package's name must be str, not 5"):
        Image("python").apt(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`network` must be a Network or None, not 'x'"):
        Image("python").apt("git", network="x")  # type: ignore[arg-type]
    secret = Network.allow(NetworkRule("deb.example.org", secrets={"TOKEN": "value"}))
    with pytest.raises(ValueError, match="`network` must have no secrets"):
        Image("python").apt("git", network=secret)
