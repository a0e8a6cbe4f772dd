"""The pictures of the documentation can be read, in light and in dark."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
import pytest

from tests.documented import ROOT
from trio_sandbox.cli import build_parser

PICTURES = sorted((ROOT / "docs").glob("*.svg"))

SVG = "{http://www.w3.org/2000/svg}"

#: The least contrast of text that WCAG 2 calls readable (level AA), and of lines and borders that carry meaning.
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0

Rules = dict[str, dict[str, str]]


def rules(css: str) -> Rules:
    """Read what a style sheet of ours says: classes and elements, one a rule."""
    found: Rules = {}
    for selector, body in re.findall(r"([.\w]+)\s*\{([^}]*)\}", css):
        declarations = (part.partition(":") for part in body.split(";") if part.strip())
        found.setdefault(selector, {}).update({name.strip(): value.strip() for name, _, value in declarations})
    return found


def themes(css: str) -> dict[str, Rules]:
    """Give the rules in light and in dark."""
    light, _, dark = css.partition("@media (prefers-color-scheme: dark) {")
    both = rules(light)
    changed = {selector: dict(values) for selector, values in both.items()}
    for selector, values in rules(dark).items():
        changed.setdefault(selector, {}).update(values)
    return {"light": both, "dark": changed}


def luminance(colour: str) -> float:
    """Give the relative luminance of a colour (WCAG 2)."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Give the contrast of two colours, from 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@attrs.frozen
class Drawn:
    """One element, and how it is painted."""

    element: ET.Element
    style: dict[str, str]

    def number(self, name: str) -> float:
        return float(self.element.get(name, "0"))

    def holds(self, x: float, y: float) -> bool:
        """Tell whether a point is in this rectangle, which is filled."""
        left, top = self.number("x"), self.number("y")
        inside = left <= x <= left + self.number("width") and top <= y <= top + self.number("height")
        return inside and self.style.get("fill", "#000000") != "none"


def drawn(root: ET.Element, theme: Rules) -> list[Drawn]:
    """Give what is painted, in order."""
    elements = [element for element in root.iter() if element.tag.removeprefix(SVG) in ("rect", "text", "path", "line")]
    painted: list[Drawn] = []
    for element in elements:
        style: dict[str, str] = dict(theme.get(element.tag.removeprefix(SVG), {}))
        for name in element.get("class", "").split():
            style.update(theme.get(f".{name}", {}))
        painted.append(Drawn(element, style))
    return painted


def style_sheet(root: ET.Element) -> str:
    (style,) = root.iter(f"{SVG}style")
    return style.text or ""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_text_and_borders_can_be_read_on_what_is_below_them(picture: Path, theme: str) -> None:
    root = ET.fromstring(picture.read_text("utf-8"))
    painted = drawn(root, themes(style_sheet(root))[theme])
    _, _, width, height = (float(part) for part in str(root.get("viewBox")).split())
    page = next(each for each in painted if each.element.get("class") == "page")
    assert page.number("width") + 1 >= width, "a page of another colour would shine through"
    assert page.number("height") + 1 >= height, "a page of another colour would shine through"
    faint: list[str] = []
    for number, each in enumerate(painted):
        if each.element.tag == f"{SVG}text":
            below = [other for other in painted[:number] if other.holds(each.number("x"), each.number("y"))]
            reached = contrast(each.style["fill"], below[-1].style["fill"])
            if reached < TEXT_CONTRAST:
                faint.append(f"{each.element.text!r}: {reached:.1f}")
        elif (stroke := each.style.get("stroke")) and each is not page:
            reached = contrast(stroke, page.style["fill"])
            if reached < LINE_CONTRAST:
                faint.append(f"{each.element.get('class')}: {reached:.1f}")
    assert faint == []
    assert sum(each.element.tag == f"{SVG}text" for each in painted) > 8


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_text_stays_in_its_box_and_does_not_touch_its_neighbour(picture: Path) -> None:
    """In DejaVu Sans, too, which is what many machines have in place of Helvetica, and wider."""
    root = ET.fromstring(picture.read_text("utf-8"))
    painted = drawn(root, themes(style_sheet(root))["light"])
    monospaced = "monospace" in str(root.get("font-family"))
    too_wide: list[str] = []
    for number, each in enumerate(painted):
        text = each.element.text or ""
        if each.element.tag != f"{SVG}text":
            continue
        size = float(each.style.get("font-size", str(root.get("font-size"))).removesuffix("px"))
        bold = each.style.get("font-weight") == "bold"
        fixed = monospaced or "monospace" in each.style.get("font-family", "")
        length = len(text) * size * (0.602 if fixed else 0.64 if bold else 0.565)
        x, y = each.number("x"), each.number("y")
        box = [other for other in painted[:number] if other.holds(x, y)][-1]
        left, right = box.number("x"), box.number("x") + box.number("width")
        neighbours = [
            other.number("x")
            for other in painted
            if other.element.tag == f"{SVG}text" and other.number("y") == y and other.number("x") > x
        ]
        room = min([right, *neighbours]) - x
        if each.style.get("text-anchor") == "middle":
            room = 2 * min(x - left, right - x)
        if length > room:
            too_wide.append(f"{text}: {length:.0f} of {room:.0f}")
    assert too_wide == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_says_what_it_shows(picture: Path) -> None:
    root = ET.fromstring(picture.read_text("utf-8"))
    assert root.get("role") == "img"
    for tag in ("title", "desc"):
        (words,) = root.iter(f"{SVG}{tag}")
        assert words.get("id") in str(root.get("aria-labelledby")).split()
        assert words.text


def test_commands_in_the_picture_of_a_terminal_can_be_typed() -> None:
    root = ET.fromstring((ROOT / "docs" / "terminal.svg").read_text("utf-8"))
    typed = [
        text.text.removeprefix("$ ")
        for text in root.iter(f"{SVG}text")
        if (text.text or "").startswith("$ ") and text.text
    ]
    assert len(typed) == 4
    for command in typed:
        build_parser().parse_args(shlex.split(command)[1:])  # SystemExit if it can't
