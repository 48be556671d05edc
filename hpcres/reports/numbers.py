"""Sections of the page with the numbers of metrics.json beside their references.

These are the tables and the distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpcres.geometry import AXES
from hpcres.metrics.quantities import HEADINGS
from hpcres.metrics.table import Row, metric_rows
from hpcres.pages import render
from hpcres.reports import drawing
from hpcres.reports.statistics import statistics_section

_LARGEST_VISIBLE_DIFFERENCE, _LARGEST_OUTSIDE = 0.02, 0.05
"""Of a group of phases that the coarse image tells apart; above these the report has a note."""
_LOOKS = {
    "tv1": "patterns of 3 × 3 pixels, side by side: shape of the boundaries",
    "tv4": "the same 4 pixels apart: shape of the grains",
    "area_error": "worst pair, relative",
    "tpb_error": "relative",
    "fraction_error": "largest difference",
    "correlation_error": "up to 16 voxels, root mean square",
}
_LARGEST_BY_CHANCE = 1.0, 2.0
"""A difference up to the worst of the images' own quarters may be chance; twice that is hardly."""


def metrics_sections(metrics: Mapping[str, Any] | None, command: str) -> list[str]:
    """Return the sections with all that metrics.json says.

    Parameters
    ----------
    metrics : mapping or None
        Content of metrics.json.
    command : str
        Command that makes metrics.json, which is named if there is none.

    Returns
    -------
    list of str
        HTML of each section.
    """
    if metrics is None:
        return [render("missing", title="Metrics", file="metrics.json", command=command)]
    return [
        _metric_table(metrics),
        _low_res_table(metrics.get("low_res")),
        _appearance(metrics),
        _distributions(metrics),
        statistics_section(metrics),
    ]


def _metric_table(metrics: Mapping[str, Any]) -> str:
    rows = metric_rows(metrics)
    has = {
        "reference": any(r.reference is not None for r in rows),
        "images": any(r.images is not None for r in rows),
        "cubes": any(r.cubes for r in rows),
        "error": any(r.standard_error is not None for r in rows),
    }
    return render(
        "metric_table",
        rows=rows,
        has=has,
        all_errors=all(r.standard_error is not None for r in rows),
        cubes=metrics["volume"].get("subvolumes") or {},
        phases=len(metrics["volume"]["phases"]),
    )


def _low_res_table(low_res: Mapping[str, Any] | None) -> str:
    if not low_res:
        return ""
    names = low_res["phases"]
    confusion = []
    for place, name in enumerate(names):
        row = low_res["confusion"][name]
        total = sum(row.values()) or 1
        confusion.append(
            {
                "name": name,
                "own": place,
                "shares": [row[n] / total for n in names],
                "coarse": low_res["volume_fraction"][name],
                "seen": low_res["of_volume"][name],
            }
        )
    boxes = _boxes(low_res) if "box_agreement" in low_res else None  # files of earlier versions lack these numbers
    return render("low_res", low_res=low_res, confusion=confusion, boxes=boxes, bars=_grid_artefact(low_res))


def _boxes(low_res: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the blocks of low-res voxels hold, with all high-res voxels counted alike, and what is off."""
    rows = []
    for name in low_res["phases"]:
        coarse, visible = low_res["volume_fraction"][name], low_res["visible_fraction"][name]
        shares = {kind: low_res[kind][name] for kind in ("inside", "outside")}
        rows.append({"name": name, "coarse": coarse, "visible": visible, "difference": visible - coarse, **shares})
    return {
        "rows": rows,
        "differ": [row for row in rows if abs(row["difference"]) > _LARGEST_VISIBLE_DIFFERENCE],
        "outside": [row for row in rows if row["outside"] is not None and row["outside"] > _LARGEST_OUTSIDE],
        "largest_difference": _LARGEST_VISIBLE_DIFFERENCE,
        "largest_outside": _LARGEST_OUTSIDE,
    }


def _grid_artefact(low_res: Mapping[str, Any]) -> drawing.Plot | None:
    """Draw where phases part, by position in the low-res lattice, relative to the axis's mean."""
    shares = {axis: np.array(low_res["changed_faces"][axis]) for axis in AXES}
    means = {axis: float(one.mean()) for axis, one in shares.items()}
    positions = len(shares["z"])
    if positions < 2 or not all(means.values()):
        return None
    figure = drawing.figure(5.5, 2.2)
    axes = figure.add_subplot()
    for place, (axis, colour) in enumerate(zip(AXES, drawing.SERIES, strict=False)):
        at = np.arange(positions) + (place - 1) * 0.27
        axes.bar(at, shares[axis] / means[axis], 0.25, color=colour, alpha=0.85, label=f"along {axis}")
    axes.axhline(1, color=drawing.INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(positions))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("position of a face in the low-res lattice, high-res voxels", fontsize=8)
    axes.set_ylabel("faces that part phases / mean", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return drawing.svg(figure, "grid artefact")


def _appearance(metrics: Mapping[str, Any]) -> str:
    """Return the section that says how much slices differ from the training images.

    The differences stand beside those of a quarter of the images from all of them.
    """
    images = (metrics.get("images") or {}).get("planes") or {}
    own, truth = (((metrics.get(of) or {}).get("appearance") or {}).get("planes") for of in ("volume", "reference"))
    if not own or not images:
        return ""
    rows = []
    for plane, one in own.items():
        for place, key in enumerate(key for key in _LOOKS if key in one["errors"]):
            by_chance, grade = images[plane]["quarters"].get(key, []), ""
            if by_chance:
                share = one["errors"][key] / max(*by_chance, 1e-12)
                good, fair = _LARGEST_BY_CHANCE
                grade = "good" if share <= good else "fair" if share <= fair else "poor"
            rows.append(
                {
                    "first": place == 0,
                    "title": HEADINGS[key],
                    "what": _LOOKS[key],
                    "plane": plane,
                    "grade": grade,
                    "ours": one["errors"][key],
                    "truth": truth[plane]["errors"].get(key) if truth else None,
                    "quarter": float(np.mean(by_chance)) if by_chance else None,
                    "worst": max(by_chance) if by_chance else None,
                }
            )
    return render("appearance", rows=rows, truth=bool(truth), shown=metrics["volume"]["appearance"])


def _distributions(metrics: Mapping[str, Any]) -> str:
    rows = metric_rows(metrics)
    fractions = [row for row in rows if row.key == "volume_fraction"]
    measured = [row for row in rows if row.cubes]
    return render(
        "distributions",
        fractions=_plot_fractions(fractions),
        has_errors=all(row.standard_error is not None for row in fractions),
        histograms=_plot_histograms(measured) if measured else None,
        cubes=metrics["volume"].get("subvolumes"),
    )


def _plot_histograms(rows: Sequence[Row]) -> drawing.Plot:
    """Plot the values of each metric over the sub-volumes, a panel each."""
    columns = 4
    lines = -(-len(rows) // columns)
    figure = drawing.figure(11, 2.1 * lines)
    for place, row in enumerate(rows, 1):
        axes = figure.add_subplot(lines, columns, place)
        ours = np.array(row.cubes["values"] if row.cubes else [])
        theirs = np.array(row.reference_cubes["values"]) if row.reference_cubes else None
        both = ours if theirs is None else np.concatenate([ours, theirs])
        bins = np.linspace(both.min(), both.max() + 1e-12, 15).tolist()
        axes.hist(ours, bins, color=drawing.OURS, alpha=0.55, label="this volume")
        if theirs is not None:
            axes.hist(theirs, bins, histtype="step", color=drawing.TRUTH, linewidth=1.6, label="ground truth")
        if row.images is not None:
            axes.axvline(row.images, color=drawing.IMAGES, linewidth=1.4, linestyle="--", label="training images")
        for one, style in zip(row.published, ("-", ":", "-."), strict=False):
            axes.axvline(one["value"], color="#b0487c", linewidth=1.3, linestyle=style, label="published")
            if one.get("spread"):
                ends = one["value"] - one["spread"], one["value"] + one["spread"]
                axes.axvspan(*ends, color="#b0487c", alpha=0.12, lw=0)
        unit = f" ({row.unit})" if row.unit else ""
        axes.set_title(f"{row.metric.replace(', faces', '')}{unit}\n{row.of}", fontsize=8)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=7)
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return drawing.svg(figure, "distributions over sub-volumes")


def _plot_fractions(rows: Sequence[Row]) -> drawing.Plot:
    """Plot the volume fractions of the phases as bars, ours beside those they are compared with."""
    groups = [("this volume", drawing.OURS, [r.value for r in rows])]
    for title, colour, found in (
        ("ground truth", drawing.TRUTH, [r.reference for r in rows if r.reference is not None]),
        ("training images", drawing.IMAGES, [r.images for r in rows if r.images is not None]),
    ):
        if len(found) == len(rows):
            groups.append((title, colour, found))
    figure = drawing.figure(min(11, 2.5 + 1.7 * len(rows)), 2.4)
    axes, width = figure.add_subplot(), min(0.5, 0.8 / len(groups))
    for place, (title, colour, values) in enumerate(groups):
        at = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * width
        errors = [r.standard_error for r in rows if r.standard_error is not None] if place == 0 else []
        line = {"ecolor": drawing.INK, "elinewidth": 1, "capsize": 2}
        known = errors if len(errors) == len(rows) else None
        bars = axes.bar(at, values, width * 0.92, color=colour, label=title, alpha=0.85, yerr=known, error_kw=line)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, color=drawing.INK, padding=1)
    axes.set_xticks(range(len(rows)), [r.of for r in rows])
    axes.set_ylabel("volume fraction", fontsize=8)
    axes.margins(y=0.15)
    axes.tick_params(labelsize=8)
    if len(groups) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return drawing.svg(figure, "phase fractions")
