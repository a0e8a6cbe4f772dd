"""What is done, and what is not, to bring a directory back: values in, values out."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.sandbox._plan import Entry, Tree, plan, stays_within

DIRECTORY = Entry("directory")
OTHER = Entry("other")


def file(content: str = "1", *, executable: bool = False) -> Entry:
    return Entry("file", content, executable=executable)


def link(target: str) -> Entry:
    return Entry("link", target)


def planned(base: Tree, guest: Tree, host: Tree, *, overwrite: bool = False) -> dict[str, str]:
    """Give what is done, by path; with a "!" and the reason where it can't be."""
    changes = plan(base, guest, host, excluded=frozenset({".git"}), overwrite=overwrite)
    return {each.path: f"{each.kind} ! {each.conflict}" if each.conflict else each.kind for each in changes}


CASES: dict[str, tuple[Tree, Tree, Tree, dict[str, str]]] = {
    "nothing": ({"a": file()}, {"a": file()}, {"a": file()}, {}),
    "added": ({}, {"a": file()}, {}, {"a": "added"}),
    "changed": ({"a": file()}, {"a": file("2")}, {"a": file()}, {"a": "changed"}),
    "removed": ({"a": file()}, {}, {"a": file()}, {"a": "removed"}),
    "made executable": ({"a": file()}, {"a": file(executable=True)}, {"a": file()}, {"a": "changed"}),
    "changed on the host only": ({"a": file()}, {"a": file()}, {"a": file("2")}, {}),
    "added on the host only": ({}, {}, {"a": file()}, {}),
    "removed on the host only": ({"a": file()}, {"a": file()}, {}, {}),
    "changed on both sides alike": ({"a": file()}, {"a": file("2")}, {"a": file("2")}, {}),
    "removed on both sides": ({"a": file()}, {}, {}, {}),
    "changed on both sides": (
        {"a": file()},
        {"a": file("2")},
        {"a": file("3")},
        {"a": "changed ! was changed here, too"},
    ),
    "added on both sides": ({}, {"a": file("2")}, {"a": file("3")}, {"a": "changed ! is here, too, and another one"}),
    "changed, and removed here": ({"a": file()}, {"a": file("2")}, {}, {"a": "added ! was removed here"}),
    "removed, and changed here": ({"a": file()}, {}, {"a": file("2")}, {"a": "removed ! was changed here, too"}),
    "a directory with all in it": (
        {"d": DIRECTORY, "d/a": file()},
        {},
        {"d": DIRECTORY, "d/a": file()},
        {"d": "removed", "d/a": "removed"},
    ),
    "a directory with something of ours in it": (
        {"d": DIRECTORY, "d/a": file()},
        {},
        {"d": DIRECTORY, "d/a": file(), "d/mine": file()},
        {"d": "removed ! has something in it that is only here", "d/a": "removed"},
    ),
    "directories with something of ours far below": (
        {"d": DIRECTORY, "d/e": DIRECTORY},
        {},
        {"d": DIRECTORY, "d/e": DIRECTORY, "d/e/.git": file()},
        dict.fromkeys(("d", "d/e"), "removed ! has something in it that is only here"),
    ),
    "a file where a directory was": (
        {"d": DIRECTORY, "d/a": file()},
        {"d": file()},
        {"d": DIRECTORY, "d/a": file()},
        {"d": "changed", "d/a": "removed"},
    ),
    "a file where a directory was that has ours in it": (
        {"d": DIRECTORY},
        {"d": file()},
        {"d": DIRECTORY, "d/mine": file()},
        {"d": "changed ! has something in it that is only here"},
    ),
    "a directory where a file was": (
        {"d": file()},
        {"d": DIRECTORY, "d/a": file()},
        {"d": file()},
        {"d": "changed", "d/a": "added"},
    ),
    "in a directory that is a link here": (
        {"d": DIRECTORY},
        {"d": DIRECTORY, "d/a": file()},
        {"d": link("/etc")},
        {"d/a": "added ! would be in a directory that is none here"},
    ),
    "in a directory that was removed here": (
        {"d": DIRECTORY},
        {"d": DIRECTORY, "d/e": DIRECTORY, "d/e/a": file()},
        {},
        dict.fromkeys(("d/e", "d/e/a"), "added ! would be in a directory that is none here"),
    ),
    "a link in place of a directory": (
        {"d": DIRECTORY, "d/a": file()},
        {"d": link("/home/alice/.ssh")},
        {"d": DIRECTORY, "d/a": file()},
        {"d": "changed ! is a link that leads out of the directory", "d/a": "removed"},
    ),
    "a link that leads out, as it was": ({"a": link("/etc")}, {"a": link("/etc")}, {"a": link("/etc")}, {}),
    "a link within": ({}, {"d": DIRECTORY, "d/a": link("../b")}, {}, {"d": "added", "d/a": "added"}),
    "a device": ({}, {"a": OTHER}, {}, {"a": "added ! is neither a file nor a directory nor a link"}),
    "a repository": ({}, {".git": DIRECTORY, ".git/config": file(), "sub/.git": file()}, {}, {}),
}


@pytest.mark.parametrize(("base", "guest", "host", "wanted"), CASES.values(), ids=CASES)
def test_what_is_done(base: Tree, guest: Tree, host: Tree, wanted: dict[str, str]) -> None:
    assert planned(base, guest, host) == wanted


def test_overwriting_takes_the_guests_version_of_what_both_have_changed_and_nothing_else() -> None:
    base = {"a": file(), "b": file(), "d": DIRECTORY}
    guest = {"a": file("2"), "c": link("/etc"), "e": file("2")}
    host = {"a": file("3"), "b": file("3"), "d": DIRECTORY, "d/mine": file(), "e": file("3")}
    assert planned(base, guest, host, overwrite=True) == {
        "a": "changed",
        "b": "removed",
        "c": "added ! is a link that leads out of the directory",
        "d": "removed ! has something in it that is only here",
        "e": "changed",
    }


@pytest.mark.parametrize(
    ("path", "target", "within"),
    [
        ("a", "b", True),
        ("a", "./b//c", True),
        ("a", ".", True),
        ("d/a", "..", True),
        ("d/e/a", "../../b", True),
        ("d/e/a", ".././../b", True),
        ("a", "..", False),
        ("d/a", "../..", False),
        ("d/a", "../../d/b", False),
        ("a", "/b", False),
        ("a", "//b", False),
        ("a", "", False),
        ("d/a", "e/../b", False),  # e may be a link
        ("a", "d/..", False),
    ],
)
def test_links_that_stay_within(path: str, target: str, within: bool) -> None:
    assert stays_within(path, target) is within


NAMES = st.sampled_from(["a", "b", ".git"])
ENTRIES = st.sampled_from([DIRECTORY, file(), file("2"), link("a"), link("/etc"), OTHER])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Draw what can be in a directory: what is in something is in a directory."""
    found: dict[str, Entry] = {}
    for depth in (1, 2, 3):
        for parts in draw(st.lists(st.tuples(*[NAMES] * depth), max_size=3)):
            path = "/".join(parts)
            above = ["/".join(parts[:number]) for number in range(1, depth)]
            if all(found.get(each, DIRECTORY) == DIRECTORY for each in above):
                found.update(dict.fromkeys(above, DIRECTORY))
                if path not in found:
                    found[path] = draw(ENTRIES)
    return found


@given(trees(), trees(), trees(), st.booleans())
def test_whatever_is_planned_makes_a_directory_of_it_and_loses_nothing(
    base: Tree, guest: Tree, host: Tree, overwrite: bool
) -> None:
    done = dict(host)
    for change in plan(base, guest, host, excluded=frozenset({".git"}), overwrite=overwrite):
        if change.conflict:
            continue
        assert ".git" not in change.path.split("/")
        if change.path in guest:
            done[change.path] = guest[change.path]
        else:
            del done[change.path]
        # What is only here, or was changed here and is not to be overwritten, stays.
        assert overwrite or host.get(change.path) == base.get(change.path)
    for path in done:
        above = path.rpartition("/")[0]
        assert not above or done[above] == DIRECTORY
    for path, entry in host.items():
        if path not in base and path not in guest:
            assert done[path] == entry
    for path, entry in done.items():
        if host.get(path) != entry:
            assert entry.kind != "other"
            assert entry.kind != "link" or stays_within(path, entry.content)
