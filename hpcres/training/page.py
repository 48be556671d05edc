"""The page training.html: curves of training.csv and quality.csv, and one generated slice over time."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hpcres import pages
from hpcres.old_names import with_new_columns

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
    losses = quality = None
    if len(training.get("step", ())):
        losses = {
            "steps": int(training["step"][-1]),
            "minutes": training["seconds"][-1] / 60,
            "curves": _curves(training),
        }
    if len(judged.get("step", ())):
        best = int(np.argmin(judged["score"]))
        shown = sorted({best, *range(max(0, len(judged["step"]) - 10), len(judged["step"]))})
        quality = {
            "score": judged["score"][best],
            "step": int(judged["step"][best]),
            "curves": _curves(judged),
            "names": list(judged),
            "rows": [
                {"best": row == best, "texts": [_short(values[row]) for values in judged.values()]} for row in shown
            ],
        }
    slices = [(int(path.stem[5:]), _base64(path.read_bytes())) for path in _shown_slices(folder)]
    return pages.write_page(
        folder / "training.html", "training", title=title, losses=losses, quality=quality, slices=slices
    )


def _shown_slices(folder: Path) -> list[Path]:
    """Return the pictures of the page: the first, the last and some between them."""
    pictures = sorted(folder.glob("training-slices/step-*.png"))
    places = {round(place) for place in np.linspace(0, len(pictures) - 1, _MOST_SLICES)} if pictures else ()
    return [pictures[place] for place in sorted(places)]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return {name: np.array([float(row[i]) for row in rows]) for i, name in enumerate(with_new_columns(header))}


def _curves(columns: dict[str, np.ndarray]) -> str:
    """Return a PNG in base64 with a panel for each column, and one for all phase fractions."""
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
    return _base64(buffer.getvalue())
