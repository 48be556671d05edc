"""Section of the page with the spatial statistics of metrics.json.

These are curves by distance, length, frequency and size, connected shares, and paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hpcres.counting.named import Named
from hpcres.geometry import AXES
from hpcres.metrics.table import pair_name, short_unit
from hpcres.reports import page

_Shown = Sequence[tuple[Mapping[str, Any], Mapping[str, Any], str]]
_FORMS = ("inlet", "outlet", "whole")


def statistics_section(metrics: Mapping[str, Any]) -> str:
    """Return the section with the spatial statistics.

    These are correlations, chords, spectra, connected shares, paths, and how the spread falls with size. The curves of
    the ground truth are dashed.

    Parameters
    ----------
    metrics : mapping
        Content of metrics.json.

    Returns
    -------
    str
        HTML of the section; empty if no statistics were measured.
    """
    ours = metrics["volume"].get("statistics") or {}
    theirs = (metrics.get("reference") or {}).get("statistics") or {}
    if not ours:
        return ""
    volume, both = metrics["volume"], [(ours, metrics["volume"], "-")]
    if theirs:
        both.append((theirs, metrics["reference"], "--"))
    parts = [
        _correlations(both) if "correlations" in ours else "",
        _chords(both) if "chords" in ours else "",
        _spectra(both) if "spectrum" in ours else "",
        _connectivity(ours, theirs),
        _geodesic(ours, theirs),
        _representative(ours["representative"], volume) if "representative" in ours else "",
    ]
    dashed = " Dashed: the ground truth." if theirs else ""
    note = (
        "Correlations, chords, connected shares and paths are exact counts over the whole volume: they have no error "
        "of their own, only that of the volume as a sample of the material, which is given where the numbers say it."
        f"{dashed}"
    )
    return f"<section><h2>Spatial statistics</h2><p class='note'>{note}</p>{''.join(parts)}</section>"


def _correlations(both: _Shown) -> str:
    """Plot S2 of every phase with itself, then between phases, in a panel each with the three axes."""
    names = [phase["name"] for phase in both[0][1]["phases"]]
    keys = [f"{name}|{name}" for name in names] + [f"{a}|{b}" for a, b in combinations(names, 2)]
    keys = keys[:9]
    figure, columns = _panels(len(keys))
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // columns), columns, place)
        for found, volume, style in both:
            found = found["correlations"]
            for axis, colour, edge in zip(AXES, page.SERIES, _edges(volume), strict=False):
                known = [k for k, n in enumerate(found["pairs"][axis]) if n]
                shares = [found["counts"][axis][key][k] / found["pairs"][axis][k] for k in known]
                label = axis if style == "-" and place == 1 else None
                axes.plot([k * edge for k in known], shares, style, color=colour, linewidth=1.2, label=label)
        first, second = key.split("|")
        fraction = both[0][1]["volume_fraction"]
        # What two places have that know nothing of each other.
        axes.axhline(fraction[first] * fraction[second], color=page.INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        _title(axes, f"S2, {pair_name(key) if len(set(key.split('|'))) > 1 else key.split('|')[0]}")
        axes.set_xlabel(f"distance, {short_unit(both[0][1]['length_unit'])}", fontsize=7)
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("probability", fontsize=7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return (
        f"<h3>Two-point correlations</h3>{page.svg(figure, 'two-point correlations')}<p class='note'>Probability that "
        "a voxel is of the first phase and the one at a distance along an axis of the second; dotted: the product of "
        "their fractions, which unrelated places have.</p>"
    )


def _chords(both: _Shown) -> str:
    """Plot the share of a phase's whole-chord voxels by chord length, and tabulate the mean lengths."""
    phases = list(both[0][0]["chords"]["z"])
    figure, columns = _panels(len(phases))
    for place, phase in enumerate(phases, 1):
        axes = figure.add_subplot(-(-len(phases) // columns), columns, place)
        for found, volume, style in both:
            for axis, colour, edge in zip(AXES, page.SERIES, _edges(volume), strict=False):
                whole = found["chords"][axis][phase]["whole"]
                length, count = (np.array(whole[key], float) for key in ("length", "count"))
                share = length * count / max(float(length @ count), 1)
                label = axis if style == "-" and place == 1 else None
                axes.plot(length * edge, share, style, color=colour, linewidth=1.2, label=label)
        _title(axes, phase)
        axes.set_ylim(bottom=0)
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("share of voxels", fontsize=7)
        axes.set_xlabel(f"chord length, {short_unit(both[0][1]['length_unit'])}", fontsize=7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    unit = short_unit(both[0][1]["length_unit"])
    means, lines = [f"mean along {axis}, {unit}" for axis in AXES], []
    for found, _, style in both:
        for phase in phases:
            own = [found["chords"][axis][phase] for axis in AXES]
            cut = max(one["voxel_share_cut"] for one in own)
            name = phase if style == "-" else f"{phase}, truth"
            cells = "".join(page.cell(page.with_error(one["mean_length"], one.get("standard_error"))) for one in own)
            lines.append(f"<tr><th>{escape(name)}</th>{cells}{page.cell(f'{cut:.1%}')}</tr>")
    return (
        f"<h3>Chord lengths</h3>{page.svg(figure, 'chord lengths')}"
        f"{page.table(['', *means, 'cut by a face, at most'], lines, 'one')}"
        "<p class='note'>Share of voxels that lie in a chord of a length, and mean length of chords ± standard error "
        "as a sample of the material, from their spread; chords side by side, which cut the same grain, count as one. "
        "Without those cut by the volume's faces, whose share is exact.</p>"
    )


def _spectra(both: _Shown) -> str:
    figure = page.figure(6, 2.6)
    axes = figure.add_subplot()
    for found, _, style in both:
        for axis, colour in zip(AXES, page.SERIES, strict=False):
            one = found["spectrum"][axis]
            x, y = np.array(one["frequency"]), np.array(one["magnitude"])
            axes.plot(x, y, style, color=colour, linewidth=1.2, label=f"normal to {axis}" if style == "-" else None)
            if one["standard_error"]:
                error = np.array(one["standard_error"])
                axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel(f"spatial frequency, 1/{short_unit(both[0][1]['length_unit'])}", fontsize=8)
    axes.set_ylabel("mean of ln(1 + |F|)", fontsize=8)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    one = both[0][0]["spectrum"]["z"]
    return (
        f"<h3>Radial spectrum of slices</h3>{page.svg(figure, 'radial spectra')}<p class='note'>Middle "
        f"{' × '.join(map(str, one['pixels']))} pixels of {one['slices']} slices; bands: one standard error.</p>"
    )


def _connectivity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if "connectivity" not in ours:
        return ""
    lines = []
    for found, after in ((ours, ""), (theirs, ", truth")):
        for phase, one in (found.get("connectivity") or {}).items():
            shares = "".join(page.cell(f"{one['percolating_share'][axis]:.2%}") for axis in AXES)
            largest = page.cell(f"{one['largest_share']:.2%}")
            lines.append(
                f"<tr><th>{escape(phase + after)}</th><th></th>{page.cell(str(one['clusters']))}{largest}{shares}</tr>"
            )
    heads = ["", "", "clusters", "largest", *(f"percolating along {axis}" for axis in AXES)]
    return (
        f"<h3>Connected share</h3>{page.table(heads, lines)}<p class='note'>Of each phase's voxels, joined by faces; "
        "percolating: in clusters that reach both faces. Exact for this volume: every voxel is counted, so there is no "
        "error. It is no estimate for the material, whose connected share depends on the size of the piece.</p>"
    )


def _geodesic(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if "geodesic" not in ours:
        return ""
    lines = []
    for found, after in ((ours["geodesic"], ""), (theirs.get("geodesic") or {}, ", truth")):
        for phase in found.get("z", {}):
            for place, axis in enumerate(AXES):
                forms = found[axis][phase]
                cells = "".join(page.cell(page.number(forms[form]["tau"]) or "no path") for form in _FORMS)
                whole = forms["whole"]
                total = whole["voxels"] + whole["unreachable"]
                cells += page.cell(f"{whole['unreachable'] / total:.2%}" if total else "")
                name = escape(phase + after) if place == 0 else ""
                lines.append(f"<tr class='{'first' if name else ''}'><th>{name}</th><th>{axis}</th>{cells}</tr>")
    heads = ["", "", "from the first plane", "from the last", "whole volume", "voxels without a path"]
    return (
        f"<h3>Mean geodesic tortuosity</h3>{page.table(heads, lines)}<p class='note'>Shortest paths inside the phase "
        f"by steps to {ours['geodesic']['neighbours']} neighbours / thickness. Exact for this volume: every path is "
        "the shortest there is, its steps rounded to 1/4096 of a voxel edge.</p>"
    )


def _representative(found: Mapping[str, Any], volume: Mapping[str, Any]) -> str:
    """Plot the spread against the size, relative to the mean, with the fitted line up to the whole volume."""
    sizes = np.array([one["voxels"] for one in found["sizes"]], float)
    if len(sizes) < 2:
        return ""
    whole = float(np.prod(volume["shape"])) ** (1 / 3)
    shown = [("volume fraction", "volume_fraction"), ("specific surface", "specific_surface_faces")]
    shown += [("interphase area", "interphase_area"), ("TPB density", "tpb_density")]
    shown = shown[: 3 if len(volume["phases"]) < 3 else None]  # two phases have no triple-phase boundary
    figure = page.figure(11, 2.6)
    for place, (title, metric) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        of = found[metric] if "std" not in found[metric] else {"": found[metric]}
        for number, ((key, one), colour) in enumerate(zip(of.items(), page.SERIES, strict=False)):
            mean = one["mean"][-1]
            if one["standard_error"] is None or not mean:
                continue
            axes.plot(sizes, np.array(one["std"]) / mean, "o", markersize=3, color=colour, label=pair_name(key))
            error = one["standard_error"] / mean
            line = [error * (s / whole) ** (-1.5 * one["exponent"]) for s in (sizes[0], whole)]
            axes.plot([sizes[0], whole], line, color=colour, linewidth=1)
            low, high = (v / mean for v in one["range"])
            # Side by side where they would hide each other.
            at, range_ = [whole * 1.07**number], [[error - low], [high - error]]
            axes.errorbar(at, [error], range_, color=colour, linewidth=1, capsize=2)
        if axes.lines:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks([sizes[0], sizes[-1], whole], [f"{s:.0f}" for s in (sizes[0], sizes[-1], whole)])
            if len(of) > 1:
                axes.legend(fontsize=6, frameon=False, labelcolor=page.INK)
        _title(axes, title)
        axes.set_xlabel("edge of a cube, voxels", fontsize=7)
        if place == 1:
            axes.set_ylabel("standard deviation / mean", fontsize=7)
    cubes = ", ".join(f"{one['cubes']} of {one['voxels']}³" for one in found["sizes"])
    return (
        f"<h3>Representative volume</h3>{page.svg(figure, 'representative volume')}<p class='note'>Standard deviation "
        f"/ mean over cubes that do not overlap ({cubes}); lines: std² ∝ V<sup>−α</sup>, fitted; their ends are the "
        "standard error of the whole volume, with the range that the fit leaves. Structure longer than the volume is "
        "not in it.</p>"
    )


def _edges(volume: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the voxel edges z, y, x in the length unit of the numbers."""
    named = Named({}, tuple(volume["voxel_size"]), volume["voxel_unit"])
    return named.lengths


def _panels(count: int) -> tuple[Figure, int]:
    columns = min(3, count)
    return page.figure(min(11, 3.6 * columns + 0.4), 2.3 * -(-count // columns)), columns


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=8)
    axes.tick_params(labelsize=7)
