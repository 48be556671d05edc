"""Figures and pictures of the page as data URIs: figures are SVG, slices are PNG. The page loads no other files."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

OURS, TRUTH, IMAGES, INK = "#2a7de1", "#e0862a", "#7a9a4a", "#808790"
SERIES = (OURS, TRUTH, IMAGES, "#b0487c", "#8064a2", "#4aa0a0")


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes
    ----------
    alt : str
        Description for readers who do not see the image.
    source : str
        SVG as a data URI.
    width : int
        Largest width on the page, in pixels.
    """

    alt: str
    source: str
    width: int


def picture(index: np.ndarray, colours: np.ndarray) -> str:
    """Return a palette PNG as a data URI.

    Parameters
    ----------
    index : ndarray
        Positions (row, column) in the palette, each of one byte.
    colours : ndarray
        Colours of the palette, one row of red, green and blue (0 to 255) for each.
    """
    image = Image.fromarray(np.ascontiguousarray(index, np.uint8), mode="P")
    image.putpalette(colours.round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(width: float, height: float) -> Figure:
    """Return an empty, transparent figure; width and height are in inches.

    `svg` gives its axes and texts a grey that reads on light and dark pages.
    """
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0)
    return drawn


def svg(figure: Figure, alt: str) -> Plot:
    """Return the figure as SVG.

    Axes and texts get a grey that reads on light and dark pages. The same numbers give the same page.

    Parameters
    ----------
    figure : Figure
        Figure that is drawn; the colours of its axes and texts are changed.
    alt : str
        Description for readers who do not see the image.
    """
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        axes.tick_params(which="both", colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for offset in (axes.xaxis.offsetText, axes.yaxis.offsetText):
            offset.set_color(INK)
    for legend in figure.legends:
        for entry in legend.get_texts():
            entry.set_color(INK)
    buffer = io.StringIO()
    # Without date and with fixed ids, the same numbers give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "hpcres"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    return Plot(alt, f"data:image/svg+xml;base64,{data}", round(figure.get_figwidth() * 97))
