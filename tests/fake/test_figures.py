"""Figures of the real Matplotlib, as a run shows them."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from PIL import Image

from trio_sandbox.guest.interpreters.python_displays import _figure

from ._agent import open_agent

# Their types leave much unknown.
mpl: Any = import_module("matplotlib")
agg: Any = import_module("matplotlib.backends.backend_agg")
figures: Any = import_module("matplotlib.figure")
np: Any = import_module("numpy")

Draw = Callable[[Any], object]


def a_line(figure: Any) -> None:
    figure.add_subplot().plot([3, 1, 2])


def with_names(figure: Any) -> None:
    axes = figure.add_subplot(xlabel="seconds", ylabel="metres", title="A fall")
    figure.colorbar(axes.scatter([1, 2, 3], [4, 5, 6], c=[7, 8, 9]))


def laid_out(figure: Any) -> None:
    figure.set_layout_engine("constrained")
    for axes in np.ravel(figure.subplots(2, 2)):
        axes.imshow([[1, 2], [3, 4]])


def see_through(figure: Any) -> None:
    figure.set_facecolor((1, 0, 0, 0.25))
    a_line(figure)


def beyond_the_right_edge(figure: Any) -> None:
    figure.add_subplot().plot([1, 2], label="outside")
    figure.legend(loc="center left", bbox_to_anchor=(1.2, 0.5))


def below_the_lower_edge(figure: Any) -> None:
    figure.add_subplot().set_xlabel("far below", labelpad=80)


def shown(draw: Draw, dpi: int = 100) -> tuple[Any, Image.Image]:
    figure = figures.Figure(dpi=dpi)
    agg.FigureCanvasAgg(figure)
    draw(figure)
    return figure, picture(_figure(figure)["image/png"])


def saved(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return picture(file.getvalue())


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGBA")
    image.load()  # which checks its sums
    return image


@pytest.mark.parametrize("dpi", [50, 100, 133])
@pytest.mark.parametrize("draw", [a_line, with_names, laid_out, see_through])
def test_a_figure_is_the_part_of_its_canvas_that_is_not_empty(draw: Draw, dpi: int) -> None:
    figure, image = shown(draw, dpi=dpi)
    pixels = np.asarray(image)
    canvas = np.array(figure.canvas.buffer_rgba())
    height, width = pixels.shape[:2]
    places = [
        (top, left)
        for top in range(canvas.shape[0] - height + 1)
        for left in range(canvas.shape[1] - width + 1)
        if np.array_equal(canvas[top : top + height, left : left + width], pixels)
    ]
    assert len(places) == 1
    ((top, left),) = places
    empty = canvas[0, 0].copy()
    canvas[top : top + height, left : left + width] = empty
    assert (canvas == empty).all(), "something was cut off"
    # It is as large as what Matplotlib's own way makes, but for what that adds beyond the edges of the canvas.
    expected = saved(figure)
    assert width in range(min(expected.width, canvas.shape[1]) - 2, expected.width + 3)
    assert height in range(min(expected.height, canvas.shape[0]) - 2, expected.height + 3)


@pytest.mark.parametrize("draw", [beyond_the_right_edge, below_the_lower_edge])
def test_what_lies_beyond_the_edges_is_shown_as_well(draw: Draw) -> None:
    figure, image = shown(draw)
    assert image.width > 640 or image.height > 480
    assert image == saved(figure)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dpi", 72),
        ("facecolor", "green"),
        ("edgecolor", "green"),
        ("transparent", True),
        ("pad_inches", 0),
        ("pad_inches", 3),  # more than there is on the canvas
        ("pad_inches", -0.3),
    ],
)
def test_settings_for_saved_figures_hold(name: str, value: object) -> None:
    with mpl.rc_context({f"savefig.{name}": value}):
        figure, image = shown(a_line)
        assert image == saved(figure)


async def test_a_run_shows_it() -> None:
    async with open_agent() as host:
        result = await host.run("import matplotlib.pyplot as plt\nlines = plt.plot([3, 1, 2])")
        ((mime, data, _),) = result.shown
        assert mime == "image/png"
        assert picture(data) == shown(a_line)[1]
