"""Section of the page with the curves of training.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from hpcres.pages import render
from hpcres.reports import drawing


def training_section(path: Path) -> str:
    """Return the section with curves of the columns that training.csv has.

    Parameters
    ----------
    path : Path
        The file. If it does not exist or has fewer than two rows, the section names the command that makes it.

    Returns
    -------
    str
        HTML of the section.
    """
    if not path.is_file():
        return _missing(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([_float(row.get(name)) for row in rows]) for name in (rows[0] if rows else {})}
    if len(rows) < 2 or "step" not in columns:
        return _missing(path)
    minutes = columns["seconds"] / 60 if "seconds" in columns else None
    along, label = (minutes, "minutes") if minutes is not None else (columns["step"], "step")
    fractions = [name for name in columns if name.startswith("fraction_")]
    panels: list[tuple[str, list[str], str]] = [
        ("Wasserstein distance", ["wasserstein"], "linear"),
        ("critic and generator loss", ["critic_loss", "generator_loss"], "linear"),
        ("voxel loss", ["voxel_loss"], "log"),
        ("low-res agreement", ["low_res_agreement"], "linear"),
        ("phase fractions of generated cubes", fractions, "linear"),
        ("gradient penalty", ["gradient_penalty"], "linear"),
    ]
    known = {"step", "seconds", "learning_rate", *(name for _, names, _ in panels for name in names)}
    panels += [(name.replace("_", " "), [name], "linear") for name in columns if name not in known]
    panels = [(t, [n for n in names if n in columns], s) for t, names, s in panels]
    panels = [panel for panel in panels if panel[1]]
    lines = -(-len(panels) // 3)
    figure = drawing.figure(11, 2.3 * lines)
    for place, (title, names, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 3, place)
        for number, name in enumerate(names):
            values = columns[name]
            colour = drawing.SERIES[number % len(drawing.SERIES)]
            axes.plot(along, values, color=colour, alpha=0.3 if len(rows) > 60 else 0.9, linewidth=1)
            if len(rows) > 60:
                axes.plot(along, _smooth(values), color=colour, linewidth=1.6)
            if len(names) > 1:
                axes.plot([], [], color=colour, label=name.removeprefix("fraction_").replace("_", " "))
        if scale == "log" and all(np.nanmin(columns[n]) > 0 for n in names):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False, labelcolor=drawing.INK)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(which="both", labelsize=7)
    return render(
        "training_curves",
        steps=int(columns["step"][-1]),
        minutes=None if minutes is None else minutes[-1],
        curves=drawing.svg(figure, "training"),
    )


def _missing(path: Path) -> str:
    return render("missing", title="Training", file=path.name, command="hpcres train")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a thirtieth of the run."""
    width = max(3, len(values) // 30)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
