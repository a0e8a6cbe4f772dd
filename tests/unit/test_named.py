"""The store of named templates: what a user saved stays whole, and nothing but the user removes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import pytest

from tests._saved import saved_template
from trio_sandbox import (
    SavedSandbox,
    TemplateError,
    TemplateExistsError,
    TemplateUnusableError,
    UnknownTemplateError,
    remove_saved_sandbox,
    saved_sandboxes,
)
from trio_sandbox.machines._named import NamedTemplate, NamedTemplateStore, StagedTemplate, check_template_name
from trio_sandbox.qemu import make_marked


@pytest.fixture
def store(tmp_path: Path) -> NamedTemplateStore:
    return NamedTemplateStore(tmp_path)


def template(name: str, directory: Path) -> NamedTemplate:
    return saved_template(name, directory, qemu="QEMU 7", layer_count=2)


def fill(staged: StagedTemplate, content: bytes = b"content") -> None:
    staged.template = template(staged.directory.name.partition("~")[0], staged.directory)
    for path in staged.template.files:
        path.write_bytes(content)


def save(store: NamedTemplateStore, name: str = "mine", *, replace: bool = False, content: bytes = b"content") -> None:
    with store.make(name, memory_mib=1, replace=replace) as staged:
        fill(staged, content)


def stored(tmp_path: Path) -> list[str]:
    """Give what is in the store, but for the random part of its names."""
    return sorted(name.partition("~")[0] for name in os.listdir(tmp_path / "saved"))


def test_saving_and_finding(store: NamedTemplateStore, tmp_path: Path) -> None:
    assert store.names() == []
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
    with store.make("mine", memory_mib=1) as staged:
        fill(staged)
        assert store.names() == [], "not before it is whole"
    found = NamedTemplateStore(tmp_path).find("mine")
    assert (found.image, found.image_digest, found.memory_mib, found.vcpus) == ("python", "d", 1, 2)
    assert (found.machine, found.qemu, found.marker) == ("m", "QEMU 7", b"x" * 16)
    assert [path.name for path in found.files] == ["devices", "layer0.qcow2", "layer1.qcow2", "memory"]
    assert all(path.read_bytes() == b"content" for path in found.files)
    assert found.size_bytes > 0
    assert found.directory.parent.stat().st_mode & 0o777 == 0o700
    assert stored(tmp_path) == ["mine", "mine.json"]


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "x" * 64, "3f9a61c2", "a.json"])
def test_names(store: NamedTemplateStore, name: str) -> None:
    save(store, name)
    assert store.names() == [name]
    assert store.find(name).name == name
    store.remove(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "-a", ".a", "a/b", "a~b", "ä", "a b", "a\n", "..", "a\0"])
def test_names_that_are_none(store: NamedTemplateStore, name: str, tmp_path: Path) -> None:
    uses: list[Callable[[str], object]] = [check_template_name, store.find, store.remove, partial(save, store)]
    for use in uses:
        with pytest.raises(ValueError, match="1 to 64 of the characters"):
            use(name)
    with pytest.raises(TypeError):
        check_template_name(b"mine")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken(store: NamedTemplateStore, tmp_path: Path) -> None:
    save(store, content=b"first")
    before = os.listdir(tmp_path / "saved")
    with pytest.raises(TemplateExistsError, match="replace=True"):
        save(store)
    assert os.listdir(tmp_path / "saved") == before
    save(store, replace=True, content=b"second")
    assert (store.find("mine").directory / "memory").read_bytes() == b"second"
    assert stored(tmp_path) == ["mine", "mine.json"]
    save(store, "other", replace=True)
    assert store.names() == ["mine", "other"]


def test_of_two_that_save_at_once_one_is_told(store: NamedTemplateStore, tmp_path: Path) -> None:
    with pytest.raises(TemplateExistsError), store.make("mine", memory_mib=1) as staged:
        fill(staged)
        save(NamedTemplateStore(tmp_path), content=b"faster")
    assert (store.find("mine").directory / "memory").read_bytes() == b"faster"
    assert stored(tmp_path) == ["mine", "mine.json"]


def test_an_error_while_saving_leaves_nothing(store: NamedTemplateStore, tmp_path: Path) -> None:
    save(store, content=b"old")
    with pytest.raises(KeyboardInterrupt), store.make("mine", memory_mib=1, replace=True) as staged:
        fill(staged)
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), store.make("mine", memory_mib=1, replace=True) as staged:
        staged.template = template("mine", staged.directory)
    assert (store.find("mine").directory / "memory").read_bytes() == b"old"
    assert stored(tmp_path) == ["mine", "mine.json"]


def test_a_template_of_the_files_of_a_snapshot(store: NamedTemplateStore, tmp_path: Path) -> None:
    """Linked where that can be, so that they take no room of their own."""
    (source := tmp_path / "snapshot").mkdir()
    described = attrs.evolve(template("mine", source), mounted=True)
    for path in described.files:
        path.write_bytes(path.name.encode())
    with store.make("mine", memory_mib=1) as staged:
        staged.fill(described)
    found = store.find("mine")
    assert found.mounts is not None
    assert [path.read_bytes() for path in found.files] == [path.name.encode() for path in described.files]
    assert all(path.samefile(source / path.name) for path in found.files)
    with store.make("other", memory_mib=1) as staged:
        staged.fill(attrs.evolve(described, name="other", with_memory=True))
    assert store.find("other").memory is None


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said tells where to choose another, before anything is saved."""
    (tmp_path / "file").touch()
    # Not a matter of modes, which root would ignore.
    for cache in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(TemplateError, match=r"nothing can be saved .* HostConfig\.cache_dir, --cache-dir"):
            save(NamedTemplateStore(cache))
    save(store := NamedTemplateStore(tmp_path / "cache"), content=b"kept")
    (tmp_path / "cache" / "saved").chmod(0o777)
    with pytest.raises(TemplateError, match=r"not trusted, since other users may write to it.*saved"):
        save(store, "other")
    (tmp_path / "cache" / "saved").chmod(0o700)

    def access(_: object, __: int) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", access)  # as for a file system that is mounted read-only
        with pytest.raises(TemplateError, match=r"\(Permission denied: .*/cache/saved\)") as caught:
            save(store, "other")
    assert caught.value.retry_safe
    assert stored(tmp_path / "cache") == ["mine", "mine.json"]
    assert (store.find("mine").directory / "memory").read_bytes() == b"kept"


def test_no_room(store: NamedTemplateStore, tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    too_much = status.f_bavail * status.f_frsize // 2**20 + 2**30
    with pytest.raises(OSError, match="no room for"), store.make("mine", memory_mib=too_much):
        pass
    assert stored(tmp_path) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_named import fill
from trio_sandbox.machines._named import NamedTemplateStore

with NamedTemplateStore(Path(sys.argv[1])).make("mine", memory_mib=1, replace=True) as staged:
    fill(staged, b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_not_used_and_removed(store: NamedTemplateStore, tmp_path: Path) -> None:
    save(store, content=b"old")
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert (store.find("mine").directory / "memory").read_bytes() == b"old"
        assert stored(tmp_path) == ["mine", "mine", "mine.json"], "each removes what the one before left"
    assert store.prune() > 0
    assert stored(tmp_path) == ["mine", "mine.json"]
    assert store.prune() == 0
    assert (store.find("mine").directory / "memory").read_bytes() == b"old"


def test_what_is_being_made_is_no_leftover(store: NamedTemplateStore, tmp_path: Path) -> None:
    with store.make("mine", memory_mib=1) as staged:
        other = NamedTemplateStore(tmp_path)
        assert other.prune() == 0
        fill(staged)
    assert store.names() == ["mine"]


def test_what_only_looks_like_a_leftover_stays(store: NamedTemplateStore, tmp_path: Path) -> None:
    save(store)
    directory = tmp_path / "saved"
    names = ("mine~backup", f"mine~{'0' * 16}", "thesis~2", f"thesis~{'a' * 16}", "~", f"mine~{'0' * 16}~")
    for name in names:
        (directory / name).mkdir()
        (directory / name / "thesis.txt").write_text("a year of work")
    elsewhere = tmp_path / "elsewhere"
    make_marked(elsewhere)
    (directory / f"mine~{'1' * 16}").symlink_to(elsewhere)
    save(store, replace=True)
    assert store.prune() == 0
    assert store.remove("mine") > 0
    assert all((directory / name / "thesis.txt").exists() for name in names)
    assert (elsewhere / ".trio-sandbox").exists()


def rewrite(change: Callable[[dict[str, object]], object]) -> Callable[[NamedTemplate], None]:
    def damage(template: NamedTemplate) -> None:
        path = template.directory.parent / "mine.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def test_what_others_may_write_to_is_not_used(store: NamedTemplateStore, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save(store)
    finally:
        os.umask(before)
    for path in (tmp_path / "saved", tmp_path / "saved/mine.json", store.find("mine").directory):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o077 == 0
        path.chmod(0o777)
        with pytest.raises(TemplateUnusableError, match="not trusted"):
            store.find("mine")
        path.chmod(mode)
    store.find("mine")


DAMAGES: dict[str, Callable[[NamedTemplate], object]] = {
    "memory cut": lambda template: os.truncate(template.directory / "memory", 2),
    "devices gone": lambda template: template.devices.unlink(),
    "layer written to": lambda template: template.layers[1].write_bytes(b"x"),
    "manifest cut": lambda template: os.truncate(template.directory.parent / "mine.json", 50),
    "no object": lambda template: (template.directory.parent / "mine.json").write_bytes(b"[]"),
    "no text": lambda template: (template.directory.parent / "mine.json").write_bytes(b"\xff{}"),
    "name": rewrite(lambda value: value.update(name="other")),
    "directory": rewrite(lambda value: value.update(directory="../etc")),
    "marker": rewrite(lambda value: value.update(marker="xyz")),
    "files": rewrite(lambda value: value.update(files={})),
    "no memory": rewrite(lambda value: value.pop("memory_mib")),
    "no files": rewrite(lambda value: value.pop("files")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_and_the_user_decides(
    store: NamedTemplateStore, damage: Callable[[NamedTemplate], object], tmp_path: Path
) -> None:
    save(store)
    damage(store.find("mine"))
    with pytest.raises(
        TemplateUnusableError, match=r"'mine' is damaged: .* `trio-sandbox template rm mine` removes it"
    ):
        store.find("mine")
    store.prune()
    assert store.names() == ["mine"]
    assert stored(tmp_path) == ["mine", "mine.json"], "prune() does not touch what may still be of use"
    store.remove("mine")
    assert stored(tmp_path) == []


@pytest.mark.parametrize("version", [0, 2, "new", None])
def test_what_another_version_saved_is_refused_and_kept(
    store: NamedTemplateStore, version: object, tmp_path: Path
) -> None:
    save(store)
    rewrite(lambda value: value.update(format=version) or value.pop("marker"))(store.find("mine"))
    with pytest.raises(
        TemplateUnusableError, match=r"'mine' was saved by another version of trio-sandbox: .* reads 1 only"
    ):
        store.find("mine")
    store.prune()
    with pytest.raises(TemplateExistsError):
        save(store)
    assert store.names() == ["mine"]
    assert stored(tmp_path) == ["mine", "mine.json"]
    store.remove("mine")
    assert stored(tmp_path) == []


def test_removing(store: NamedTemplateStore) -> None:
    save(store)
    save(store, "other")
    assert store.remove("mine") > 0
    with pytest.raises(UnknownTemplateError, match="no saved sandbox 'mine'; there are: other"):
        store.find("mine")
    with pytest.raises(UnknownTemplateError):
        store.remove("mine")


def test_a_template_keeps_its_files_while_another_name_begins_alike(store: NamedTemplateStore) -> None:
    for name in ("a", "ab", "a.b"):
        save(store, name)
    store.remove("a")
    assert store.names() == ["a.b", "ab"]
    assert store.find("ab").devices.exists()
    assert store.find("a.b").devices.exists()


def test_a_program_lists_and_removes_without_a_host(
    store: NamedTemplateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved_sandboxes(tmp_path) == ()
    save(store)
    save(store, "damaged")
    (store.find("damaged").directory / "devices").write_text("changed")
    damaged, mine = saved_sandboxes(tmp_path)
    found = store.find("mine")
    assert mine == SavedSandbox(
        name="mine", image="python", memory_mib=1, vcpus=2, created=found.created, size_bytes=found.size_bytes
    )
    assert damaged.name == "damaged"
    assert "is damaged: changed since it was saved" in damaged.problem
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "trio-sandbox").symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "home"))
    assert saved_sandboxes() == (damaged, mine)
    assert remove_saved_sandbox("damaged") > 0
    assert saved_sandboxes(os.fspath(tmp_path)) == (mine,)
    with pytest.raises(UnknownTemplateError, match="there are: mine"):
        remove_saved_sandbox("damaged", tmp_path)
    with pytest.raises(ValueError, match="name"):
        remove_saved_sandbox("../mine", tmp_path)
    with pytest.raises(TypeError, match="cache_dir"):
        saved_sandboxes(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
