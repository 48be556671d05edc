"""The page training.html: curves of training.csv and quality.csv, and one generated slice over time."""

from __future__ import annotations

import base64
import csv
import io
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hpcres.volumes.files import atomic_write

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem;
max-width: 1100px; color: #222 }
img { max-width: 100% } figure { display: inline-block; margin: 0 12px 12px 0 } figcaption { font-size: 12px }
figure img { width: 196px; image-rendering: pixelated } table { border-collapse: collapse; font-size: 13px }
td, th { padding: 2px 7px; text-align: right; font-variant-numeric: tabular-nums } .best { font-weight: 600 }"""
_MOST_SLICES = 15


def write_page(folder: Path, title: str) -> Path:
    """Write training.html, whole or not at all.

    Parameters
    ----------
    folder : Path
        Folder of the run. Files that are not there are left out of the page.
    title : str
        Title of the page.

    Returns
    -------
    Path
        Path of the page.
    """
    training, judged = (_columns(folder / name) for name in ("training.csv", "quality.csv"))
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(training.get("step", ())):
        minutes = training["seconds"][-1] / 60
        parts.append(f"<p>{int(training['step'][-1]):,} generator steps in {minutes:.1f} minutes.</p>")
        parts.append(_curves(training, "losses"))
    if len(judged.get("step", ())):
        best = int(np.argmin(judged["score"]))
        parts.append(
            f"<h2>Quality</h2><p>Best score {judged['score'][best]:.2f} at step {int(judged['step'][best]):,}; lower "
            "is better. Against what training was given, not a truth.</p>"
        )
        parts.append(_curves(judged, "quality"))
        names = list(judged)
        lines = [
            f"<tr class='{'best' if row == best else ''}'>"
            + "".join(f"<td>{_short(judged[name][row])}</td>" for name in names)
            + "</tr>"
            for row in sorted({best, *range(max(0, len(judged["step"]) - 10), len(judged["step"]))})
        ]
        heads = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
        parts.append(f"<table><tr>{heads}</tr>{''.join(lines)}</table>")
    pictures = sorted(folder.glob("training-slices/step-*.png"))
    if pictures:
        shown = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, _MOST_SLICES)})
        parts.append("<h2>One slice over time</h2>")
        parts += [
            f"<figure><img alt='' src='data:image/png;base64,{base64.b64encode(pictures[i].read_bytes()).decode()}'>"
            f"<figcaption>step {int(pictures[i].stem[5:]):,}</figcaption></figure>"
            for i in shown
        ]
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    target = folder / "training.html"
    with atomic_write(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return {name: np.array([float(row[i]) for row in rows]) for i, name in enumerate(header)}


def _curves(columns: dict[str, np.ndarray], alt: str) -> str:
    names = [name for name in columns if name not in ("step", "seconds") and not name.startswith("fraction_")]
    shares = [name for name in columns if name.startswith("fraction_") and name != "fraction_error"]
    panels = [[name] for name in names] + ([["fraction_error"]] if "fraction_error" in columns else [])
    panels += [shares] if shares else []
    lines = -(-len(panels) // 4)
    style = ".-" if len(columns["seconds"]) == 1 else "-"  # one point makes no line
    height = 2.1 * lines
    figure = Figure(figsize=(11, height))
    # Fixed margins, in inches: a layout engine draws everything three times, a second and more of each save.
    figure.subplots_adjust(
        left=0.6 / 11, right=1 - 0.1 / 11, bottom=0.45 / height, top=1 - 0.25 / height, wspace=0.32, hspace=0.35
    )
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 4, place)
        for name in panel:
            label = name.removeprefix("fraction_")
            axes.plot(columns["seconds"] / 60, columns[name], style, linewidth=1, label=label)
        axes.set_title("fractions" if len(panel) > 1 else panel[0].replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=5)
        if len(panel) > 1:
            axes.legend(fontsize=6, frameon=False)
        if place > len(panels) - 4:
            axes.set_xlabel("minutes", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"<img alt='{alt}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
