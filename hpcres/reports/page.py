"""HTML of the page: tables and cards, numbers as text, figures as SVG and pictures as PNG, all inlined.

The page loads nothing from elsewhere, and has no JavaScript.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from math import floor, log10
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hpcres import __version__
from hpcres.volumes.files import atomic_write

OURS, TRUTH, IMAGES, INK = "#2a7de1", "#e0862a", "#7a9a4a", "#808790"
SERIES = (OURS, TRUTH, IMAGES, "#b0487c", "#8064a2", "#4aa0a0")


def write(target: Path, title: str, body: Iterable[str]) -> Path:
    """Write the page of these sections to `target` atomically, and return `target`.

    Parameters
    ----------
    target : Path
        File to write. Its folder is made if it does not exist.
    title : str
        Title of the page.
    body : iterable of str
        HTML of the sections.
    """
    html = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} – hpcres</title><style>{_STYLE}</style></head><body><main>{''.join(body)}"
        f"<footer>hpcres {__version__}</footer></main></body></html>\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return target


def header(title: str, subtitle: str) -> str:
    """Return the HTML of the page's title and subtitle."""
    return f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"


def warning(text: str) -> str:
    """Return the HTML of a warning."""
    return f"<p class='warning'>{escape(text)}</p>"


def missing(title: str, file: str, command: str) -> str:
    """Return a section that names a missing file and the command that makes it."""
    return f"<section><h2>{title}</h2>{missing_text(file, command)}</section>"


def missing_text(file: str, command: str) -> str:
    """Return a paragraph that names a missing file and the command that makes it."""
    return f"<p class='missing'>No {escape(file)} yet: run <code>{escape(command)}</code>, then this report again.</p>"


def card(title: str, value: str, what: str, grade: str) -> str:
    """Return the HTML of a card: a title, a value, what it means, and a grade (good, fair or poor) as its colour."""
    return (
        f'<div class="card {grade}"><div class="title">{escape(title)}</div><div class="value">{escape(value)}</div>'
        f'<div class="what">{escape(what)}</div></div>'
    )


def table(heads: Iterable[str], lines: Iterable[str], style: str = "two") -> str:
    """Return the HTML of a table.

    Parameters
    ----------
    heads : iterable of str
        Texts of the columns' heads, which are escaped.
    lines : iterable of str
        HTML of the rows.
    style : str
        Class of the table: `two` if its first two columns are names, `one` if only the first is.
    """
    head = "".join(f"<th class='{'left' if h == 'published' else ''}'>{escape(h)}</th>" for h in heads)
    return (
        f"<div class='wide'><table class='{style}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def cell(text: str, style: str = "") -> str:
    """Return the HTML of a table cell; `text` is HTML, and `style` its class."""
    return f"<td class='{style}'>{text}</td>" if style else f"<td>{text}</td>"


def number(value: float | None) -> str:
    """Return a number as text; empty for None.

    The text has five decimals if the magnitude is from 0.001 to below 10, else five significant digits.
    """
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.5f}" if 1e-3 <= abs(value) < 10 else f"{value:.5g}"


def with_error(value: float | None, error: float | None) -> str:
    """Return a value and its error as text, both to two digits of the error; without an error, the value alone."""
    if value is None or not error:
        return number(value) or "–"
    decimals = max(0, 1 - floor(log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def signed(value: float | None) -> str:
    """Return a number as text with its sign; empty for None."""
    return "" if value is None else "0" if value == 0 else f"{value:+.2g}" if abs(value) < 1e-3 else f"{value:+.5f}"


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


def svg(figure: Figure, alt: str) -> str:
    """Return the figure as an HTML image with the SVG in it.

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
    width = round(figure.get_figwidth() * 97)
    return f"<img class='plot' alt='{escape(alt)}' style='max-width:{width}px' src='data:image/svg+xml;base64,{data}'>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667080; --line: #dde2e8; --paper: #fff; --tint: #f5f7f9;
  --good: #2f9e5b; --fair: #d39a1c; --poor: #cf4a4a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a2b0; --line: #333b47; --paper: #14181e;
  --tint: #1c222a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans",
  "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 48px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; }
header p { margin: 2px 0 18px; color: var(--soft); }
section { margin: 30px 0 0; }
h2 { font-size: 19px; margin: 0 0 8px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 18px 0 6px; }
.note, footer { color: var(--soft); font-size: 13px; }
.missing, .warning { padding: 10px 14px; background: var(--tint); border-left: 4px solid var(--fair); }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.92em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; margin-top: 0; }
.card { background: var(--tint); border-radius: 8px; padding: 12px 14px; border-top: 4px solid var(--soft); }
.card.good { border-color: var(--good); } .card.fair { border-color: var(--fair); }
.card.poor { border-color: var(--poor); }
.card .title { font-size: 13px; color: var(--soft); }
.card .value { font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .what { font-size: 12px; color: var(--soft); line-height: 1.35; }
.legend span { margin-right: 18px; white-space: nowrap; }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 6px;
  vertical-align: -2px; border: 1px solid var(--line); }
.grid { display: grid; grid-template-columns: 62px repeat(var(--columns), minmax(0, 330px)); gap: 8px; }
.grid .head { font-weight: 600; font-size: 14px; align-self: end; }
.grid .plane { font-size: 13px; color: var(--soft); align-self: center; }
.grid.single { grid-template-columns: 0 repeat(var(--columns), minmax(0, 350px)); margin-left: -8px; }
.slice { position: relative; line-height: 0; }
.slice img { width: 100%; image-rendering: pixelated; border-radius: 3px; }
.slice .bar { position: absolute; left: 8px; bottom: 8px; height: 4px; background: #fff;
  box-shadow: 0 0 0 1px rgba(0, 0, 0, .65); }
.slice .bartext { position: absolute; left: 8px; bottom: 15px; font-size: 11px; line-height: 1.3; color: #fff;
  background: rgba(0, 0, 0, .55); padding: 0 4px; border-radius: 2px; }
.training { display: grid; grid-template-columns: 62px minmax(0, 330px) minmax(0, 1fr); gap: 8px 16px;
  align-items: center; margin-top: 10px; }
.training .slice { grid-column: 2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; font-weight: 500; padding: 3px 6px 3px 0; vertical-align: top; }
thead th { color: var(--soft); font-size: 12.5px; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
thead th:first-child, thead th.left, .two thead th:nth-child(2) { text-align: left; }
td { text-align: right; padding: 3px 6px 3px 6px; white-space: nowrap; vertical-align: top; }
td.strong { font-weight: 650; }
td.good { color: var(--good); } td.fair { color: var(--fair); } td.poor { color: var(--poor); }
td.source { text-align: left; white-space: normal; min-width: 190px; font-size: 12.5px; }
tr.first th, tr.first td { border-top: 1px solid var(--line); }
tbody tr:hover { background: var(--tint); }
th small { color: var(--soft); white-space: nowrap; }
tbody th { white-space: nowrap; }
.facts th { width: 210px; color: var(--soft); }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.plot { width: 100%; height: auto; display: block; }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 8px; }
@media (max-width: 760px) { .grid, .training { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .grid > :first-child, .grid.single > :nth-child(5) { display: none; }
  .grid:not(.single) .plane { grid-column: 1 / -1; } .training .slice { grid-column: auto; }
  .grid.single { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .training { grid-template-columns: 1fr; } }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid-page; } body { font-size: 11px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
