"""Sections of the page with the numbers of metrics.json and transport.json beside their references.

These are the verdict, the tables and the distributions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from hpcres.geometry import AXES
from hpcres.metrics.table import Row, metric_rows
from hpcres.reports import page
from hpcres.reports.statistics import statistics_section
from hpcres.study import Study

# Shares that call for a second look, and for doubt: fractions in points, the others relative.
_LIMITS = {"volume fraction": (0.01, 0.02), "interphase area": (0.07, 0.15), "TPB": (0.1, 0.2), "surface": (0.07, 0.15)}
_AGREEMENT_LIMITS = (0.98, 0.95)
_LARGEST_VISIBLE_DIFFERENCE, _LARGEST_OUTSIDE = 0.02, 0.05
"""Of a group of phases that the coarse image tells apart; above these the report has a note."""
_LOOKS = {
    "tv1": ("tv1", "patterns of 3 × 3 pixels, side by side: shape of the boundaries"),
    "tv4": ("tv4", "the same 4 pixels apart: shape of the grains"),
    "area_error": ("interphase areas", "worst pair, relative"),
    "tpb_error": ("TPB", "relative"),
    "fraction_error": ("fractions", "largest difference"),
    "correlation_error": ("correlations", "up to 16 voxels, root mean square"),
}
_LARGEST_BY_CHANCE = 1.0, 2.0
"""A difference up to the worst of the images' own quarters may be chance; twice that is hardly."""


def verdict(metrics: Mapping[str, Any] | None, study: Study) -> str:
    """Return the section with the few numbers that decide.

    The numbers are compared with the truth if there is one, else with the training images.

    Parameters
    ----------
    metrics : mapping or None
        Content of metrics.json.
    study : Study
        Study of the page.

    Returns
    -------
    str
        HTML; empty without metrics, or if there is nothing to compare with.
    """
    if metrics is None:
        return ""
    rows = metric_rows(metrics)
    truth = metrics.get("reference") is not None
    isotropic = study.high_res.isotropic
    cards = []
    if low_res := metrics.get("low_res"):
        share = low_res["agreement"]
        grade = "good" if share >= _AGREEMENT_LIMITS[0] else "fair" if share >= _AGREEMENT_LIMITS[1] else "poor"
        what = "voxels seen alike through the coarse instrument"
        cards.append(page.card("Low-res agreement", f"{share:.2%}", what, grade))
    if truth or isotropic:
        against = "ground truth" if truth else "training images"
        for title, metric, limit, in_points in (
            ("Phase fractions", "volume fraction", "volume fraction", True),
            ("Surface areas", "specific surface, faces", "surface", False),
            ("Interphase areas", "interphase area", "interphase area", False),
            ("Triple-phase boundary", "TPB, normalised", "TPB", False),
        ):
            worst = _worst([r for r in rows if r.metric == metric and r.of != "…"], truth, in_points)
            if worst is None:
                continue
            error, row = worst
            good, fair = _LIMITS[limit]
            grade = "good" if abs(error) <= good else "fair" if abs(error) <= fair else "poor"
            # The truth is the same place and its difference exact; the images are another, and chance has its share.
            chance = (
                ""
                if truth or row.error is None
                else (f" ± {100 * row.error:.2f}" if in_points else f" ± {100 * row.error / (row.images or 1):.1f}")
            )
            text = f"{100 * error:+.2f}{chance} points" if in_points else f"{100 * error:+.1f}{chance} %"
            of = f"{row.of}, " if row.of else ""
            cards.append(page.card(title, text, f"{'worst: ' if row.of else ''}{of}against the {against}", grade))
    if not cards:
        return ""
    limits = (
        "Green: fractions within 1 point, areas 7 %, TPB 10 %, agreement 98 %; amber: 2 points, 15 %, 20 %, 95 %. "
        "Interphase areas count where they are at least 1 % of the largest."
    )
    note = (
        limits
        if truth
        else (
            f"{limits} There is no ground truth in this study: the training images are 2D and of another place, so "
            "they differ from the volume by chance too."
        )
    )
    return f'<section class="cards">{"".join(cards)}</section><p class="note">{note}</p>'


def _worst(rows: Sequence[Row], truth: bool, in_points: bool) -> tuple[float, Row] | None:
    """Return the largest error and its row, without pairs that hardly touch, which would only show noise."""
    found = []
    targets = [(row.reference if truth else row.images, row) for row in rows]
    largest = max((t for t, _ in targets if t), default=0.0)
    for target, row in targets:
        if target is not None and (in_points or target > 0.01 * largest):
            found.append((row.value - target if in_points else row.value / target - 1, row))
    return max(found, key=lambda pair: abs(pair[0]), default=None)


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
        return [page.missing("Metrics", "metrics.json", command)]
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
    }
    cubes = metrics["volume"].get("subvolumes") or {}
    has["error"] = any(r.error is not None for r in rows)
    heads = ["", "", "this volume", *(["± standard error"] if has["error"] else [])]
    heads += ["ground truth", "difference", "relative"] if has["reference"] else []
    heads += ["training images (2D)"] if has["images"] else []
    heads += [f"{cubes['count']} cubes of {cubes['voxels']}³"] if has["cubes"] else []
    heads += ["same cubes, truth"] if has["cubes"] and has["reference"] else []
    lines, last = [], ""
    for row in rows:
        unit = f" <small>{row.unit}</small>" if row.unit else ""
        cells = [f"<th>{escape(row.metric) + unit if row.metric != last else ''}</th>", f"<th>{escape(row.of)}</th>"]
        cells.append(page.cell(page.number(row.value), "strong"))
        if has["error"]:
            cells.append(page.cell("" if row.error is None else f"± {row.error:.2g}"))
        if has["reference"]:
            cells += [page.cell(page.number(row.reference)), page.cell(page.signed(row.difference))]
            cells.append(page.cell("" if row.relative is None else f"{row.relative:+.1%}"))
        if has["images"]:
            cells.append(page.cell(page.number(row.images)))
        if has["cubes"]:
            cells.append(page.cell(_plus_minus(row.cubes) if row.cubes else ""))
            if has["reference"]:
                cells.append(page.cell(_plus_minus(row.reference_cubes) if row.reference_cubes else ""))
        lines.append(f"<tr class='{'first' if row.metric != last else ''}'>{''.join(cells)}</tr>")
        if row.published:  # a line of its own: beside the rest it would be cut off
            said = "; ".join(_published(p) for p in row.published)
            lines.append(f"<tr><th></th><td class='source' colspan='{len(heads) - 1}'>published: {said}</td></tr>")
        last = row.metric
    notes = [
        "Specific surface: all voxel faces of a phase / volume, and × 2/3 for an isotropic surface (Crofton). "
        "Interphase area: faces between two phases / all interior faces."
    ]
    if len(metrics["volume"]["phases"]) > 2:
        notes.append(
            "TPB: edges that touch three or more phases, by length / volume, and normalised by all interior edges."
        )
    if has["error"]:
        notes.append(
            "The counts are exact; the standard error is that of the volume as a sample of the material, fitted to how "
            "the spread over sub-volumes falls with their size (below)."
        )
        if any(row.error is None for row in rows):
            notes.append("Without one: its spread over sub-volumes was not measured, or has no fit.")
    else:
        notes.append(
            "The counts are exact. They have no standard error as a sample of the material: its statistic "
            "'representative' was not measured, or fewer than eight cubes of two sizes fit in the volume."
        )
    if has["reference"]:
        notes.append("The ground truth is the same place, so that differences from it are exact too.")
    if has["images"]:
        notes.append("Training images: shares of their in-plane faces and edges; surface × 3/2, isotropy assumed.")
    if has["cubes"]:
        where = ", at the same places in both" if has["reference"] else ""
        notes.append(f"Cubes: mean ± standard deviation over random sub-volumes{where}.")
    if skipped := cubes.get("skipped"):
        notes.append(f"No sub-volumes: {skipped}.")
    return f"<section><h2>Metrics</h2>{page.table(heads, lines)}<p class='note'>{escape(' '.join(notes))}</p></section>"


def _low_res_table(low_res: Mapping[str, Any] | None) -> str:
    if not low_res:
        return ""
    names = low_res["phases"]
    heads = ["low-res label", *(f"seen as {n}" for n in names), "low-res fraction", "fraction seen"]
    lines = []
    for name in names:
        row = low_res["confusion"][name]
        total = sum(row.values()) or 1
        share = "".join(page.cell(f"{row[n] / total:.2%}", "strong" if n == name else "") for n in names)
        fraction = low_res["volume_fraction"][name]
        lines.append(
            f"<tr><th>{escape(name)}</th>{share}{page.cell(page.number(fraction))}{page.cell(page.number(low_res['of_volume'][name]))}</tr>"
        )
    off = ", ".join(f"{escape(name)} {value:.4f}" for name, value in low_res.get("fraction_difference", {}).items())
    off = f"<p>Mean difference of fractions in low-res voxels: {off}.</p>" if off else ""
    share = low_res.get("unknown", 0.0)
    compared = f"All but {share:.2%}, which are unknown, were compared" if share else "Every voxel was compared"
    return (
        "<section><h2>Agreement with the low-res volume</h2>"
        f"<p><b>{low_res['agreement']:.3%}</b> of {low_res['voxels_compared']:,} low-res voxels are what the imaging "
        f"operator makes of the super-resolved volume. {compared}, so these shares have no error.</p>{off}"
        f"{page.table(heads, lines, 'one')}{_box_table(low_res)}{_grid_artefact(low_res)}</section>"
    )


def _box_table(low_res: Mapping[str, Any]) -> str:
    """Return the table of what the blocks of low-res voxels hold, with all high-res voxels counted alike.

    The table is empty for files that lack these numbers.
    """
    if "box_agreement" not in low_res:
        return ""
    lines, differ, outside = [], [], []
    for name in low_res["phases"]:
        coarse, found = low_res["volume_fraction"][name], low_res["visible_fraction"][name]
        shares = [low_res[kind][name] for kind in ("inside", "outside")]
        cells = [page.number(coarse), page.number(found), page.signed(found - coarse)]
        cells += ["–" if share is None else f"{share:.2%}" for share in shares]
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(map(page.cell, cells))}</tr>")
        if abs(found - coarse) > _LARGEST_VISIBLE_DIFFERENCE:
            differ.append(f"{name} {found - coarse:+.3f}")
        if shares[1] is not None and shares[1] > _LARGEST_OUTSIDE:
            outside.append(f"{name} {shares[1]:.2%}")
    heads = ["group", "low-res fraction", "visible fraction", "difference", "inside", "outside"]
    notes = []
    if differ:
        notes.append(
            f"Visible fractions differ from the low-res volume by more than {_LARGEST_VISIBLE_DIFFERENCE}: "
            f"{', '.join(differ)}."
        )
    if outside:
        notes.append(f"The share outside exceeds {_LARGEST_OUTSIDE}: {', '.join(outside)}.")
    if notes:
        notes.append(
            "The volume may hold a phase where the imaging operator hardly sees it. Features smaller than a low-res "
            "voxel have the same effect."
        )
    warning = f"<p class='warning'>{escape(' '.join(notes))}</p>" if notes else ""
    return (
        f"<p><b>Box agreement {low_res['box_agreement']:.3%}</b>: the share of low-res voxels whose label is the group "
        "with the most high-res voxels in the voxel's own block. It counts all high-res voxels of a block alike; the "
        "imaging operator does not, so agreement alone does not show a phase that the operator hardly sees.</p>"
        f"{page.table(heads, lines, 'one')}{warning}"
        "<p class='note'>Low-res fraction: what the low-res volume says. Visible fraction: the share of the high-res "
        "voxels that are of the group. Inside: the share of high-res voxels of the group in the blocks of low-res "
        "voxels that have its label, as all their 26 neighbours have. Outside: the same share where the low-res voxel "
        "and all its neighbours have another label. Inside is near 100 % and outside near 0 where all features are "
        "larger than a low-res voxel. All are exact counts.</p>"
    )


def _grid_artefact(low_res: Mapping[str, Any]) -> str:
    """Return the figure of where phases part, by position in the low-res lattice, relative to the axis's mean."""
    shares = {axis: np.array(low_res["changed_faces"][axis]) for axis in AXES}
    means = {axis: float(one.mean()) for axis, one in shares.items()}
    text = (
        f"<p><b>Grid artefact {low_res['grid_artefact']:.1%}</b>: the largest departure of these bars from 1. "
        "Matter knows nothing of the low-res lattice, so its bars are level but for chance; a bar above 1 is a place "
        "where phases part because a low-res voxel ends there.</p>"
    )
    positions = len(shares["z"])
    if positions < 2 or not all(means.values()):
        return text
    figure = page.figure(5.5, 2.2)
    axes = figure.add_subplot()
    for place, (axis, colour) in enumerate(zip(AXES, page.SERIES, strict=False)):
        at = np.arange(positions) + (place - 1) * 0.27
        axes.bar(at, shares[axis] / means[axis], 0.25, color=colour, alpha=0.85, label=f"along {axis}")
    axes.axhline(1, color=page.INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(positions))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("position of a face in the low-res lattice, high-res voxels", fontsize=8)
    axes.set_ylabel("faces that part phases / mean", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return text + page.svg(figure, "grid artefact")


def _appearance(metrics: Mapping[str, Any]) -> str:
    """Return the section that says how much slices differ from the training images.

    The differences stand beside those of a quarter of the images from all of them.
    """
    images = (metrics.get("images") or {}).get("planes") or {}
    own, truth = (((metrics.get(of) or {}).get("appearance") or {}).get("planes") for of in ("volume", "reference"))
    if not own or not images:
        return ""
    heads = ["", "", "this volume", *(["ground truth"] if truth else []), "a quarter of the images", "worst quarter"]
    lines = []
    for plane, one in own.items():
        quarters = images[plane]["quarters"]
        for place, key in enumerate(key for key in _LOOKS if key in one["errors"]):
            title, what = _LOOKS[key]
            cells = [f"<th>{escape(title)} <small>{escape(what)}</small></th>"]
            cells.append(f"<th>{plane if plane != 'all' and place == 0 else ''}</th>")
            by_chance, grade = quarters.get(key, []), ""
            if by_chance:
                share = one["errors"][key] / max(*by_chance, 1e-12)
                good, fair = _LARGEST_BY_CHANCE
                grade = "good" if share <= good else "fair" if share <= fair else "poor"
            cells.append(page.cell(page.number(one["errors"][key]), f"strong {grade}"))
            if truth:
                cells.append(page.cell(page.number(truth[plane]["errors"].get(key))))
            cells.append(page.cell(page.number(float(np.mean(by_chance))) if by_chance else ""))
            cells.append(page.cell(page.number(max(by_chance)) if by_chance else ""))
            lines.append(f"<tr class='{'first' if place == 0 else ''}'>{''.join(cells)}</tr>")
    shown = metrics["volume"]["appearance"]
    cubes = f"{shown['cubes']} cube{'s' if shown['cubes'] > 1 else ''} of up to {shown['edge']}³"
    return (
        "<section><h2>Appearance</h2><p>How far the slices of this volume are from the training images. tv1 and tv4 "
        "are the share of small patterns (0 to 1) that one would have to exchange to turn one into the other: the "
        "lower, the less can be told apart by eye.</p>"
        f"{page.table(heads, lines)}<p class='note'>Slices of {cubes}. The error "
        "of these numbers is chance, of which each quarter of the training images against the whole is a measure. "
        "Green: not more than the worst quarter; amber: up to twice that.</p></section>"
    )


def _distributions(metrics: Mapping[str, Any]) -> str:
    rows = [(row, row.cubes["values"]) for row in metric_rows(metrics) if row.cubes]
    fractions = _plot_fractions(metrics)
    if not rows:
        return f"<section><h2>Phase fractions</h2>{fractions}</section>"
    columns = 4
    lines = -(-len(rows) // columns)
    figure = page.figure(11, 2.1 * lines)
    for place, (row, values) in enumerate(rows, 1):
        axes = figure.add_subplot(lines, columns, place)
        ours = np.array(values)
        theirs = np.array(row.reference_cubes["values"]) if row.reference_cubes else None
        both = ours if theirs is None else np.concatenate([ours, theirs])
        bins = np.linspace(both.min(), both.max() + 1e-12, 15).tolist()
        axes.hist(ours, bins, color=page.OURS, alpha=0.55, label="this volume")
        if theirs is not None:
            axes.hist(theirs, bins, histtype="step", color=page.TRUTH, linewidth=1.6, label="ground truth")
        if row.images is not None:
            axes.axvline(row.images, color=page.IMAGES, linewidth=1.4, linestyle="--", label="training images")
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
    cubes = metrics["volume"]["subvolumes"]
    return (
        f"<section><h2>Phase fractions</h2>{fractions}</section>"
        f"<section><h2>Distributions over {cubes['count']} random cubes of {cubes['voxels']}³</h2>"
        f"{page.svg(figure, 'distributions over sub-volumes')}</section>"
    )


def _plot_fractions(metrics: Mapping[str, Any]) -> str:
    rows = [row for row in metric_rows(metrics) if row.metric == "volume fraction"]
    groups = [("this volume", page.OURS, [r.value for r in rows])]
    for title, colour, found in (
        ("ground truth", page.TRUTH, [r.reference for r in rows if r.reference is not None]),
        ("training images", page.IMAGES, [r.images for r in rows if r.images is not None]),
    ):
        if len(found) == len(rows):
            groups.append((title, colour, found))
    figure = page.figure(min(11, 2.5 + 1.7 * len(rows)), 2.4)
    axes, width = figure.add_subplot(), min(0.5, 0.8 / len(groups))
    for place, (title, colour, values) in enumerate(groups):
        at = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * width
        errors = [r.error for r in rows if r.error is not None] if place == 0 else []
        line = {"ecolor": page.INK, "elinewidth": 1, "capsize": 2}
        known = errors if len(errors) == len(rows) else None
        bars = axes.bar(at, values, width * 0.92, color=colour, label=title, alpha=0.85, yerr=known, error_kw=line)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, color=page.INK, padding=1)
    axes.set_xticks(range(len(rows)), [r.of for r in rows])
    axes.set_ylabel("volume fraction", fontsize=8)
    axes.margins(y=0.15)
    axes.tick_params(labelsize=8)
    if len(groups) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    lines = "<p class='note'>Lines on the bars: the standard error of the volume as a sample of the material.</p>"
    return page.svg(figure, "phase fractions") + (lines if all(r.error is not None for r in rows) else "")


def transport_section(transport: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, command: str) -> str:
    """Return the section with the results of transport.json and the transport through the sub-volumes of metrics.json.

    Parameters
    ----------
    transport, metrics : mapping or None
        Content of transport.json and of metrics.json.
    command : str
        Command that makes transport.json, which is named if there is none.

    Returns
    -------
    str
        HTML of the section.
    """
    parts = [page.missing_text("transport.json", command) if transport is None else _transport_table(transport)]
    ours = _cube_transport(metrics, "volume")
    if ours:
        theirs = _cube_transport(metrics, "reference")
        heads = ["", "", "D_rel", *(["D_rel, truth"] if theirs else []), "tau", *(["tau, truth"] if theirs else [])]
        heads += ["percolating", *(["percolating, truth"] if theirs else [])]
        lines = []
        for phase, by_direction in ours.items():
            for place, (direction, one) in enumerate(by_direction.items()):
                other = theirs[phase][direction] if theirs else None
                cells = [f"<th>{escape(phase) if place == 0 else ''}</th><th>{direction}</th>"]
                for key in ("D_rel", "tau"):
                    cells.append(page.cell(_plus_minus(one[key]), "strong"))
                    if other:
                        cells.append(page.cell(_plus_minus(other[key])))
                for each in [one, other] if other else [one]:
                    cells.append(page.cell(f"{each['percolating']} of {each['count']}"))
                lines.append(f"<tr class='{'first' if place == 0 else ''}'>{''.join(cells)}</tr>")
        edge = (metrics or {})["volume"]["subvolumes"]["voxels"]
        parts.append(
            f"<h3>In cubes of {edge}³ </h3>{page.table(heads, lines)}"
            "<p class='note'>Mean ± standard deviation. A cube in which "
            "the phase does not percolate has D_rel 0 and infinite tau; tau is over the percolating ones.</p>"
        )
    return f"<section><h2>Transport</h2>{''.join(parts)}</section>"


def _cube_transport(metrics: Mapping[str, Any] | None, which: str) -> Mapping[str, Any]:
    return (((metrics or {}).get(which) or {}).get("subvolumes") or {}).get("transport") or {}


def _transport_table(transport: Mapping[str, Any]) -> str:
    results = transport["volume"]["results"]
    truth = {_solved(r): r for r in (transport.get("reference") or {"results": []})["results"]}
    differ = [name for name in ("crop", "periodic", "rtol", "voxel_size", "blocks") if not _same(results, name)]
    published = transport.get("published") or []
    heads = ["", "", "D_rel", *(["truth", "relative"] if truth else []), "tau", *(["truth"] if truth else [])]
    heads += ["tau of the percolating part", "percolating share"]
    figures = {
        phase: [p for p in published if p["metric"] in ("tau", "D_rel") and p["of"] == phase]
        for phase in {r["phase"] for r in results}
    }
    heads += ["published"] if any(figures.values()) else []
    lines, last = [], None
    for one in results:
        other = truth.get(_solved(one))
        phase = escape(one["phase"]) if one["phase"] != last else ""
        how = ", ".join(f"{name.replace('_', ' ')} {_setting(one, name)}" for name in differ)
        direction = f"{one['direction']} <small>{escape(how)}</small>" if how else one["direction"]
        cells = [f"<th>{phase}</th><th>{direction}</th>", page.cell(_state(one, "D_rel"), "strong")]
        if truth:
            cells.append(page.cell(_state(other, "D_rel") if other else ""))
            both = other and one["D_rel"] is not None and other["D_rel"]
            cells.append(page.cell(f"{one['D_rel'] / other['D_rel'] - 1:+.1%}" if both and other else ""))
        cells.append(page.cell(_state(one, "tau"), "strong"))
        if truth:
            cells.append(page.cell(_state(other, "tau") if other else ""))
        share = (one["percolating_fraction"] or 0.0) / one["volume_fraction"] if one["volume_fraction"] else 0.0
        unknown = one["state"] == "estimate"
        cells.append(page.cell("" if unknown else _state(one, "tau_percolating")))
        cells.append(page.cell("" if unknown else f"{share:.1%}"))
        if any(figures.values()):
            here = figures[one["phase"]] if phase else []
            cells.append(page.cell("<br>".join(f"{p['metric']} {_published(p)}" for p in here), "source"))
        lines.append(f"<tr class='{'first' if phase else ''}'>{''.join(cells)}</tr>")
        last = one["phase"]
    solver = transport["solver"]
    guesses = {one["estimate"]["unreliability"] for one in results if one["state"] == "estimate"}
    guessed = "".join(f" Blocks: {text}." for text in guesses if text not in solver["method"])
    crop = (
        ""
        if "crop" in differ or not transport["volume"]["crop"]
        else (f" Only {_setting({'settings': transport['volume']}, 'crop')} of the volume.")
    )
    return (
        f"{page.table(heads, lines)}<p class='note'>D_rel = D_eff / D_0; tau = volume fraction / D_rel. What follows − "
        "or + is the solver's estimated error, always to that side; percolating shares are exact counts. "
        f"{escape(solver['name'])}: {escape(solver['method'])}; stops at {escape(solver['stop'])}."
        f"{escape(guessed + crop)}</p>"
    )


def _solved(result: Mapping[str, Any]) -> str:
    """Return a key of what was solved, without the size of the volume's own voxels and the part of it."""
    settings = {k: v for k, v in result.get("settings", {}).items() if k in ("periodic", "rtol", "blocks")}
    return json.dumps([result["phase"], result["direction"], result.get("conductivity"), settings], sort_keys=True)


def _same(results: Sequence[Mapping[str, Any]], setting: str) -> bool:
    values = [one.get("settings", {}).get(setting) for one in results]
    return all(value == values[0] for value in values)


def _setting(result: Mapping[str, Any], name: str) -> str:
    value = result.get("settings", {}).get(name)
    if name == "crop" and value is not None:
        return ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in zip(AXES, value, strict=True))
    if isinstance(value, list):
        return " × ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) or "none"
    return "none" if value is None else f"{value:g}"


def _state(result: Mapping[str, Any], key: str) -> str:
    if result["state"] == "not percolating":
        return "0" if key == "D_rel" else "∞ (does not percolate)" if key == "tau" else "∞"
    if result["state"] == "estimate":
        return f"{'∞' if result[key] is None else page.number(result[key])} (estimate of blocks)"
    if result[key] is None:
        return "not converged"
    # Of D_rel it is what the upper bound may be too high, of tau what it may be too low.
    error = f" {'−' if key == 'D_rel' else '+'} {result['error'] * result[key]:.1g}" if result.get("error") else ""
    return page.number(result[key]) + error


def _plus_minus(summary: Mapping[str, Any] | None) -> str:
    if not summary or summary["mean"] is None:
        return "–"
    return page.with_error(summary["mean"], summary["std"])


def _published(one: Mapping[str, Any]) -> str:
    spread = f" ± {one['spread']:g}" if one.get("spread") is not None else ""
    return f"<b>{one['value']:g}{spread}</b> {escape(one['source'])}"
