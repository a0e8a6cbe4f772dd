"""The store of templates: what is found, what is noticed to be damaged, what is removed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from trio_sandbox import UnknownTemplateError
from trio_sandbox.machines import _templates
from trio_sandbox.machines._templates import Template, TemplateStore, new_template, place_templates, template_key
from trio_sandbox.qemu import make_marked


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path, budget_mib=1)


def make(store: TemplateStore, *parts: object, size: int = 4096) -> Template:
    template = new_template(template_key(*parts), image="python", memory_mib=1, vcpus=2, warmup="import this")
    with store.lock(template.key) as held:
        assert held
        with store.make(template) as staged:
            staged.devices.write_bytes(os.urandom(size))
            staged.overlay.touch()
            assert store.find(template.key) is None, "not before it is whole"
    found = store.find(template.key)
    assert found is not None
    return found


def test_making_and_finding(store: TemplateStore, tmp_path: Path) -> None:
    assert store.find("0" * 24) is None
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
    template = make(store, "a")
    assert template.memory.stat().st_size == 2**20
    assert (template.image, template.memory_mib, template.vcpus) == ("python", 1, 2)
    assert len(template.marker) == 16
    assert template.directory.parent.stat().st_mode & 0o777 == 0o700
    assert [found.key for found in TemplateStore(tmp_path, budget_mib=1).list()] == [template.key]


def test_keys_depend_on_every_part() -> None:
    assert template_key("a", 1) == template_key("a", 1)
    assert len({template_key("a", 1), template_key("a", 2), template_key("a"), template_key("a", "1")}) == 4


def test_one_maker_at_a_time(store: TemplateStore, tmp_path: Path) -> None:
    with store.lock("k") as first, TemplateStore(tmp_path, budget_mib=1).lock("k") as second, store.lock("l") as other:
        assert (first, second, other) == (True, False, True)
    with store.lock("k") as again:
        assert again


def test_an_error_while_making_leaves_nothing(store: TemplateStore, tmp_path: Path) -> None:
    template = new_template("k" * 24, image="python", memory_mib=1, vcpus=1, warmup="")
    with store.lock(template.key), pytest.raises(KeyboardInterrupt), store.make(template) as staged:
        staged.devices.touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "templates") == ["locks"]


def rewrite(change: Callable[[dict[str, object]], object]) -> Callable[[Template], None]:
    def damage(template: Template) -> None:
        path = template.directory / "template.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


DAMAGES: dict[str, Callable[[Template], object]] = {
    "memory cut": lambda template: os.truncate(template.memory, 2**19),
    "memory written to": lambda template: template.memory.write_bytes(bytes(2**20)),
    "devices cut": lambda template: os.truncate(template.devices, 100),
    "devices gone": lambda template: template.devices.unlink(),
    "overlay written to": lambda template: template.overlay.write_bytes(b"x"),
    "manifest gone": lambda template: (template.directory / "template.json").unlink(),
    "manifest cut": lambda template: os.truncate(template.directory / "template.json", 50),
    "no object": lambda template: (template.directory / "template.json").write_bytes(b"[]"),
    "no text": lambda template: (template.directory / "template.json").write_bytes(b"\xff{}"),
    "format": rewrite(lambda value: value.update(format=2)),
    "key": rewrite(lambda value: value.update(key="other")),
    "marker": rewrite(lambda value: value.update(marker="xyz")),
    "files": rewrite(lambda value: value.update(files={})),
    "no memory": rewrite(lambda value: value.pop("memory_mib")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_and_removed(
    store: TemplateStore, damage: Callable[[Template], object], caplog: pytest.LogCaptureFixture
) -> None:
    template = make(store, "a")
    damage(template)
    assert store.list() == []
    assert store.find(template.key) is None
    assert not template.directory.exists()
    assert f"the template {template.key} is removed" in caplog.text
    assert os.listdir(template.directory.parent) == ["locks"]


def test_templates_of_other_versions_share_the_budget(store: TemplateStore) -> None:
    other, older, newer = (make(store, number, size=400 * 2**10) for number in range(3))
    rewrite(lambda value: value.update(format=2))(other)
    for age, template in ((1, older), (2, other), (3, newer)):
        os.utime(template.directory / "template.json", (age, age))
    assert store.evict() > 0
    assert [found.key for found in store.list()] == [newer.key], "the other one was used later than the one that went"
    assert other.directory.exists()


def test_removing_by_the_beginning_of_a_key(store: TemplateStore) -> None:
    template, other = make(store, "a"), make(store, "b")
    assert store.remove(template.key[:8]) > 0
    assert [found.key for found in store.list()] == [other.key]
    with pytest.raises(UnknownTemplateError, match=rf"no template '{template.key}'; there are: {other.key}"):
        store.remove(template.key)
    with pytest.raises(UnknownTemplateError):
        store.remove(other.key[:5])


def test_the_budget_is_kept_by_removing_what_was_used_longest_ago(store: TemplateStore) -> None:
    templates = [make(store, number, size=400 * 2**10) for number in range(3)]
    for age, template in enumerate(templates):
        os.utime(template.directory / "template.json", (age, age))
    store.find(templates[0].key)  # used now
    assert store.evict() > 0
    assert [found.key for found in store.list()] == [templates[0].key, templates[2].key]
    make(store, 3, size=2 * 2**20)
    key = template_key(3)
    store.evict(keep=key)
    assert [found.key for found in store.list()] == [key], "larger than all the budget, but wanted now"
    store.evict()
    assert store.list() == []


def test_pruning_takes_leftovers_and_what_is_damaged_and_leaves_what_is_being_made(
    store: TemplateStore, tmp_path: Path
) -> None:
    kept, damaged = make(store, "a"), make(store, "b")
    damaged.devices.unlink()
    directory = tmp_path / "templates"
    for name in (f".staging-{'a' * 24}-00000001", f".staging-{'b' * 24}-00000002", f".removed-{'3' * 16}"):
        make_marked(directory / name)
        (directory / name / "memory").write_bytes(bytes(8192))
    with TemplateStore(tmp_path, budget_mib=1).lock("b" * 24):
        staged = f".staging-{'b' * 24}-00000003"
        make_marked(directory / staged)
        assert store.prune() > 0
        assert sorted(name for name in os.listdir(directory) if name != "locks") == sorted([staged, kept.key])
    store.prune()
    assert sorted(name for name in os.listdir(directory) if name != "locks") == [kept.key]


def test_a_template_that_others_may_write_to_is_not_used(store: TemplateStore, tmp_path: Path) -> None:
    template = make(store, "a")
    (tmp_path / "templates").chmod(0o777)
    assert store.list() == []
    (tmp_path / "templates").chmod(0o700)
    assert [found.key for found in store.list()] == [template.key]
    template.directory.chmod(0o770)
    assert store.list() == []
    assert store.find(template.key) is None


def test_whatever_the_umask_says_nobody_else_may_write(store: TemplateStore, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        template = make(store, "a")
    finally:
        os.umask(before)
    assert (tmp_path / "templates").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "templates/locks").stat().st_mode & 0o777 == 0o700
    assert template.directory.stat().st_mode & 0o777 == 0o700
    assert (template.directory / "template.json").stat().st_mode & 0o777 == 0o600


def test_what_only_looks_like_ours_is_left_alone(store: TemplateStore, tmp_path: Path) -> None:
    kept, directory = make(store, "a"), tmp_path / "templates"
    key = "f" * 24
    elsewhere = tmp_path / "thesis"
    elsewhere.mkdir()
    (elsewhere / ".trio-sandbox").touch()
    names = {
        "notes",
        key,
        f".staging-{key}-backup",
        f".staging-{key}-0123abcd",
        ".removed-backups",
        f".removed-{'0' * 16}",
        f"{key}.old",
    }
    for name in names:
        (directory / name).mkdir()
        (directory / name / "thesis.txt").write_text("a year of work")
    for number, link in enumerate((f".staging-{key}-00000000", f".removed-{'1' * 16}", "e" * 24)):
        (directory / link).symlink_to(elsewhere)
        (elsewhere / f"{number}.txt").write_text("a year of work")
    store.prune()
    store.evict()
    assert store.find(key) is None, "and it is not taken for a damaged template either"
    with (
        store.lock(key),
        pytest.raises(OSError, match="not empty"),
        store.make(new_template(key, image="python", memory_mib=1, vcpus=1, warmup="")) as staged,
    ):
        staged.devices.touch()
        staged.overlay.touch()
    with pytest.raises(UnknownTemplateError):
        store.remove(key)
    assert all((directory / name / "thesis.txt").exists() for name in names)
    assert len(os.listdir(elsewhere)) == 4
    assert [found.key for found in store.list()] == [kept.key]


def test_templates_of_earlier_versions_which_have_no_mark_can_be_removed(store: TemplateStore) -> None:
    template = make(store, "a")
    (template.directory / ".trio-sandbox").unlink()
    assert store.remove(template.key) > 0
    assert os.listdir(template.directory.parent) == ["locks"]


def test_pruning_takes_templates_of_images_that_are_gone(store: TemplateStore, tmp_path: Path) -> None:
    template = new_template(template_key("a"), image="python", memory_mib=1, vcpus=1, warmup="")
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with store.lock(template.key), store.make(template) as staged:
        staged.devices.touch()
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, staged.overlay], check=True
        )
    store.prune()
    assert [found.key for found in store.list()] == [template.key]
    image.unlink()
    assert store.prune() > 0
    assert store.list() == []


def test_a_shared_template_is_used_and_never_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = make(TemplateStore(tmp_path / "theirs", budget_mib=1), "a")
    before = [(path, path.stat()) for path in sorted(template.directory.iterdir())]
    store = TemplateStore(tmp_path / "ours", budget_mib=1, shared=tmp_path / "theirs")
    found = store.find(template.key)
    assert found is not None
    assert found.directory == template.directory
    assert store.list() == []
    store.discard(template.key, "it is no good")
    assert "is not used any more: it is no good" in caplog.text
    assert store.find(template.key) is None
    # Its like can be made in our own, and comes first then.
    assert make(store, "a").directory == tmp_path / "ours" / "templates" / template.key
    assert [(path, path.stat()) for path in sorted(template.directory.iterdir())] == before


def test_a_shared_template_that_is_damaged_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = make(TemplateStore(tmp_path / "theirs", budget_mib=1), "a")
    template.devices.write_bytes(b"")
    store = TemplateStore(tmp_path / "ours", budget_mib=1, shared=tmp_path / "theirs")
    assert store.find(template.key) is None
    assert template.devices.exists()
    assert caplog.text == ""


def test_what_may_not_be_read_is_no_damage(
    store: TemplateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    template = make(store, "a")

    def refuse(path: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(_templates, "read_json", refuse)
        assert store.find(template.key) is None
    assert caplog.text == ""
    assert store.find(template.key) is not None


def test_templates_are_kept_where_they_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, own, last = (tmp_path / name for name in ("cache", "own", "last"))
    read_only: list[Path] = []
    real = os.access

    def access(path: Path, mode: int) -> bool:
        return not any(path.is_relative_to(directory) for directory in read_only) and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    for directory in (cache, own, last):
        directory.mkdir()
    assert place_templates(cache, [own, last]) == cache
    assert place_templates(cache / "to be made", [own]) == cache / "to be made"
    read_only.append(cache)
    assert place_templates(cache, [own, last]) == own
    read_only.append(own)
    assert place_templates(cache, [own, last]) == last
    read_only.append(last)
    assert place_templates(cache, [own, last]) == cache
    assert list(tmp_path.rglob("*/*")) == [], "looking makes nothing"
