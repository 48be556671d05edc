"""Section of the page with the spatial statistics of metrics.json.

These are curves by distance, length, frequency and size, connected shares, and paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hpcres.counting.named import Named
from hpcres.geometry import AXES
from hpcres.metrics.table import pair_name, short_unit
from hpcres.pages import render
from hpcres.reports import drawing

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
    return render(
        "statistics",
        truth=bool(theirs),
        axes=AXES,
        unit=short_unit(volume["length_unit"]),
        correlations=_correlations(both) if "correlations" in ours else None,
        chords=_chords(both) if "chords" in ours else None,
        spectra=_spectra(both) if "spectrum" in ours else None,
        connectivity=_connectivity(ours, theirs) if "connectivity" in ours else None,
        geodesic=_geodesic(ours, theirs) if "geodesic" in ours else None,
        representative=_representative(ours["representative"], volume) if "representative" in ours else None,
    )


def _correlations(both: _Shown) -> drawing.Plot:
    """Plot S2 of every phase with itself, then between phases, in a panel each with the three axes."""
    names = [phase["name"] for phase in both[0][1]["phases"]]
    keys = [f"{name}|{name}" for name in names] + [f"{a}|{b}" for a, b in combinations(names, 2)]
    keys = keys[:9]
    figure, columns = _panels(len(keys))
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // columns), columns, place)
        for found, volume, style in both:
            found = found["correlations"]
            for axis, colour, edge in zip(AXES, drawing.SERIES, _edges(volume), strict=False):
                known = [k for k, n in enumerate(found["pairs"][axis]) if n]
                shares = [found["counts"][axis][key][k] / found["pairs"][axis][k] for k in known]
                label = axis if style == "-" and place == 1 else None
                axes.plot([k * edge for k in known], shares, style, color=colour, linewidth=1.2, label=label)
        first, second = key.split("|")
        fraction = both[0][1]["volume_fraction"]
        # What two places have that know nothing of each other.
        axes.axhline(fraction[first] * fraction[second], color=drawing.INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        _title(axes, f"S2, {pair_name(key) if len(set(key.split('|'))) > 1 else key.split('|')[0]}")
        axes.set_xlabel(f"distance, {short_unit(both[0][1]['length_unit'])}", fontsize=7)
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("probability", fontsize=7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return drawing.svg(figure, "two-point correlations")


def _chords(both: _Shown) -> dict[str, Any]:
    """Plot the share of a phase's whole-chord voxels by chord length, and return it with the mean lengths."""
    phases = list(both[0][0]["chords"]["z"])
    figure, columns = _panels(len(phases))
    for place, phase in enumerate(phases, 1):
        axes = figure.add_subplot(-(-len(phases) // columns), columns, place)
        for found, volume, style in both:
            for axis, colour, edge in zip(AXES, drawing.SERIES, _edges(volume), strict=False):
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
    rows = []
    for found, _, style in both:
        for phase in phases:
            own = [found["chords"][axis][phase] for axis in AXES]
            rows.append(
                {
                    "phase": phase,
                    "truth": style != "-",
                    "means": [(one["mean_length"], one.get("standard_error")) for one in own],
                    "cut": max(one["voxel_share_cut"] for one in own),
                }
            )
    return {"drawn": drawing.svg(figure, "chord lengths"), "rows": rows}


def _spectra(both: _Shown) -> dict[str, Any]:
    figure = drawing.figure(6, 2.6)
    axes = figure.add_subplot()
    for found, _, style in both:
        for axis, colour in zip(AXES, drawing.SERIES, strict=False):
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
    return {"drawn": drawing.svg(figure, "radial spectra"), "pixels": one["pixels"], "slices": one["slices"]}


def _connectivity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase,
            "truth": truth,
            "clusters": one["clusters"],
            "largest": one["largest_share"],
            "percolating": [one["percolating_share"][axis] for axis in AXES],
        }
        for found, truth in ((ours, False), (theirs, True))
        for phase, one in (found.get("connectivity") or {}).items()
    ]


def _geodesic(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for found, truth in ((ours["geodesic"], False), (theirs.get("geodesic") or {}, True)):
        for phase in found.get("z", {}):
            for place, axis in enumerate(AXES):
                forms = found[axis][phase]
                whole = forms["whole"]
                total = whole["voxels"] + whole["unreachable"]
                rows.append(
                    {
                        "phase": phase,
                        "truth": truth,
                        "first": place == 0,
                        "axis": axis,
                        "taus": [forms[form]["tau"] for form in _FORMS],
                        "without_path": whole["unreachable"] / total if total else None,
                    }
                )
    return {"rows": rows, "neighbours": ours["geodesic"]["neighbours"]}


def _representative(found: Mapping[str, Any], volume: Mapping[str, Any]) -> dict[str, Any] | None:
    """Plot the spread against the size, relative to the mean, with the fitted line up to the whole volume."""
    sizes = np.array([one["voxels"] for one in found["sizes"]], float)
    if len(sizes) < 2:
        return None
    whole = float(np.prod(volume["shape"])) ** (1 / 3)
    shown = [("volume fraction", "volume_fraction"), ("specific surface", "specific_surface_faces")]
    shown += [("interphase area", "interphase_area"), ("TPB density", "tpb_density")]
    shown = shown[: 3 if len(volume["phases"]) < 3 else None]  # two phases have no triple-phase boundary
    figure = drawing.figure(11, 2.6)
    for place, (title, metric) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        of = found[metric] if "std" not in found[metric] else {"": found[metric]}
        for number, ((key, one), colour) in enumerate(zip(of.items(), drawing.SERIES, strict=False)):
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
                axes.legend(fontsize=6, frameon=False, labelcolor=drawing.INK)
        _title(axes, title)
        axes.set_xlabel("edge of a cube, voxels", fontsize=7)
        if place == 1:
            axes.set_ylabel("standard deviation / mean", fontsize=7)
    return {"drawn": drawing.svg(figure, "representative volume"), "sizes": found["sizes"]}


def _edges(volume: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the voxel edges z, y, x in the length unit of the numbers."""
    named = Named({}, tuple(volume["voxel_size"]), volume["voxel_unit"])
    return named.lengths


def _panels(count: int) -> tuple[Figure, int]:
    columns = min(3, count)
    return drawing.figure(min(11, 3.6 * columns + 0.4), 2.3 * -(-count // columns)), columns


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=8)
    axes.tick_params(labelsize=7)
