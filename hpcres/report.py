"""One self-contained HTML page from the files that the stages wrote: is the result good, and how was it made?

Nothing is loaded from elsewhere, no JavaScript; images and plots are inlined. What a stage has not made yet is
said in words, with the command that makes it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from itertools import combinations
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, triple
from hpcres.metrics.named import Named
from hpcres.metrics.table import Row, metric_rows, pair_name, short_unit, size_text
from hpcres.study import Study, VoxelSize
from hpcres.volumes.formats import open_volume, read_images
from hpcres.volumes.phases import PHASE_COLOURS, PhaseMap, likeliest, open_low_res
from hpcres.volumes.volume import Volume

_SLICE_VOXELS = 256
"""Largest edge of a slice shown, in high-res voxels; larger volumes show their middle."""
_OURS, _TRUTH, _IMAGES, _INK = "#2a7de1", "#e0862a", "#7a9a4a", "#808790"
# Shares that call for a second look, and for doubt: fractions in points, the others relative.
_LIMITS = {"volume fraction": (0.01, 0.02), "interphase area": (0.07, 0.15), "TPB": (0.1, 0.2), "surface": (0.07, 0.15)}
_AGREEMENT_LIMITS = (0.98, 0.95)
_UNKNOWN_COLOUR = np.full(3, 255.0)


@dataclass(frozen=True)
class Sight:
    """A volume as the slices show it: how to name it, its voxel edge in high-res voxels, colours of its labels."""

    title: str
    volume: Volume
    step: Fraction
    colours: np.ndarray
    values: tuple[int, ...]
    unknown: tuple[int, ...] = ()


def report_study(study: Study, volume: Volume) -> Path:
    """report.html of a study, from labels.zarr and whatever metrics.json, transport.json, training.csv there is."""
    metrics, transport = _read_json(study.metrics_path), _read_json(study.transport_path)
    colours = _palette(len(study.phases))
    low_res = open_low_res(study.low_res)
    groups = [[study.phases.index(name) for name in group] for group in study.low_res.groups]
    # Merged phases turn towards grey, so that they are not taken for one of them.
    low_colours = np.array(
        [*(colours[g].mean(0) * 0.4 + 90 if len(g) > 1 else colours[g[0]] for g in groups), _UNKNOWN_COLOUR]
    )
    own, known = tuple(range(len(study.phases))), study.low_res.labels
    given = "low-res input" + ", likeliest phase" * bool(low_res.parts)
    sights = [
        Sight(given, low_res, study.scale_factor, low_colours, known, study.low_res.unknown),
        Sight("super-resolved", volume, Fraction(1), colours, own),
    ]
    if study.reference.volume is not None and _exists(study.reference.volume):
        sights.append(Sight("ground truth", open_volume(study.reference.volume), Fraction(1), colours, own))
    size = study.high_res.voxel_size
    legend = dict(zip(study.phases, colours, strict=True))
    for group, colour in zip(study.low_res.groups, low_colours[:-1], strict=True):
        if len(group) > 1:
            legend[f"{' + '.join(group)} (low-res)"] = colour
    if study.low_res.unknown or low_res.parts:
        legend["unknown (low-res)"] = low_colours[-1]
    stale = metrics is not None and _made_by(metrics["volume"].get("provenance")) != _made_by(volume.provenance)
    body = [
        _header(study.name, f"{_shape_text(volume)} voxels of {size}, scale factor {study.scale_factor}"),
        _warning("metrics.json belongs to another labels.zarr; run hpcres metrics again") if stale else "",
        _verdict(metrics, study),
        _slices(sights, legend, size.length, short_unit(size.unit), _training_crop(study, colours, volume.shape)),
        *_numbers(metrics, "hpcres metrics"),
        _transport(transport, metrics, "hpcres tortuosity"),
        _training(study.folder / "training.csv"),
        _provenance(_study_facts(study, volume, metrics, transport)),
    ]
    return _write(study.report_path, study.name, body)


def report_volume(
    volume: Volume, metrics: Mapping[str, Any], target: str | Path, transport: Mapping[str, Any] | None = None
) -> Path:
    """The page of a bare volume from its metrics.json, and its transport.json if there is one; there is nothing to
    compare it with."""
    entry = metrics["volume"]
    labels = tuple(int(phase["label"]) for phase in entry["phases"])
    colours = _palette(len(labels))
    legend = {phase["name"]: colour for phase, colour in zip(entry["phases"], colours, strict=True)}
    name = Path(volume.path).name
    sight = Sight(name, volume, Fraction(1), colours, labels)
    facts = {"volume": os.path.abspath(volume.path), "size": size_text(entry), "hpcres": metrics.get("hpcres", "")}
    solve = f"hpcres tortuosity {volume.path} --output {Path(target).parent / 'transport.json'}"
    body = [
        _header(name, size_text(entry)),
        _slices([sight], legend, entry["voxel_size"][-1], short_unit(entry["voxel_unit"]), None),
        *_numbers(metrics, "hpcres metrics"),
        _transport(transport, metrics, solve),
        _provenance({**facts, **_flat(volume.provenance), **_commands(metrics, transport)}),
    ]
    return _write(Path(target), name, body)


def find_result(volume: Volume, stage: str, path: Path, given: bool, edge: VoxelSize | None) -> dict[str, Any] | None:
    """What `hpcres metrics` or `hpcres tortuosity` (the stage: metrics, transport) wrote of a bare volume to `path`.

    A file that was not `given` but lies there is taken only if it is of this very volume as it is now, else None;
    of one that was, InputError. edge: of a voxel, if the user named it.
    """
    if not (given or path.is_file()):
        return None
    command = {"metrics": "hpcres metrics", "transport": "hpcres tortuosity"}[stage]
    try:
        found = _read_json(path)
        if found is None:
            raise InputError(f"{path}: no such file; run {command} --output {path}, or drop --{stage}")
        if not isinstance(found, Mapping) or not str(found.get("schema")).startswith(f"hpcres {stage} "):
            raise InputError(f"{path}: was not written by {command}; name the file that was, or drop --{stage}")
        entry, again = found["volume"], f"run {command} again, or drop --{stage}"
        if entry["shape"] != list(volume.shape):
            raise InputError(f"{path}: is of {entry['shape']} voxels, {volume.path} has {list(volume.shape)}; {again}")
        if _made_by(entry.get("provenance", volume.provenance)) != _made_by(volume.provenance):
            raise InputError(f"{path}: belongs to another store than {volume.path}; {again}")
        if edge is not None and (entry["voxel_size"], entry["voxel_unit"]) != ([edge.length] * 3, edge.unit):
            raise InputError(f"{path}: {size_text(entry)} were measured, --voxel-size says {edge.length:g} {edge.unit}")
    except InputError:
        if given:
            raise
        return None
    file = volume.path.split(":/")[0]
    of_it = os.path.abspath(volume.path) == entry["path"] and path.stat().st_mtime >= os.stat(file).st_mtime
    return found if given or of_it else None


# ---- the verdict ------------------------------------------------------------------------------------------


def _verdict(metrics: Mapping[str, Any] | None, study: Study) -> str:
    """The few numbers that decide, against the truth where there is one, else against the training images."""
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
        cards.append(_card("Low-res agreement", f"{share:.2%}", what, grade))
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
            chance = "" if truth or row.error is None else (
                f" ± {100 * row.error:.2f}" if in_points else f" ± {100 * row.error / (row.images or 1):.1f}"
            )  # fmt: skip
            text = f"{100 * error:+.2f}{chance} points" if in_points else f"{100 * error:+.1f}{chance} %"
            of = f"{row.of}, " if row.of else ""
            cards.append(_card(title, text, f"{'worst: ' if row.of else ''}{of}against the {against}", grade))
    if not cards:
        return ""
    limits = (
        "Green: fractions within 1 point, areas 7 %, TPB 10 %, agreement 98 %; amber: 2 points, 15 %, 20 %, 95 %. "
        "Interphase areas count where they are at least 1 % of the largest."
    )
    note = limits if truth else (
        f"{limits} There is no ground truth in this study: the training images are 2D and of another place, so they "
        "differ from the volume by chance too."
    )  # fmt: skip
    return f'<section class="cards">{"".join(cards)}</section><p class="note">{note}</p>'


def _worst(rows: Sequence[Row], truth: bool, in_points: bool) -> tuple[float, Row] | None:
    """The largest error and its row; pairs that hardly touch would only show noise."""
    found = []
    targets = [(row.reference if truth else row.images, row) for row in rows]
    largest = max((t for t, _ in targets if t), default=0.0)
    for target, row in targets:
        if target is not None and (in_points or target > 0.01 * largest):
            found.append((row.value - target if in_points else row.value / target - 1, row))
    return max(found, key=lambda pair: abs(pair[0]), default=None)


def _card(title: str, value: str, what: str, grade: str) -> str:
    return (
        f'<div class="card {grade}"><div class="title">{escape(title)}</div><div class="value">{escape(value)}</div>'
        f'<div class="what">{escape(what)}</div></div>'
    )


# ---- slices -----------------------------------------------------------------------------------------------


def _slices(
    sights: Sequence[Sight], legend: Mapping[str, np.ndarray], voxel: float, unit: str,
    crop: tuple[str, str, int] | None,
) -> str:  # fmt: skip
    """A grid of images: a row per plane, a column per volume, all of the same physical region; then the crop,
    as picture, caption and columns."""
    main = next(s for s in sights if s.step == 1)
    middle = [n // 2 for n in main.volume.shape]
    planes, pictures, shown_edge = [], [], 0
    for axis in range(3):
        sides = [a for a in range(3) if a != axis]
        start, stop = list(middle), [m + 1 for m in middle]
        for a in sides:
            # From whole coarse voxels on, so that every column shows the same region.
            period = sights[0].step.numerator
            start[a] = max(0, main.volume.shape[a] - _SLICE_VOXELS) // 2 // period * period
            stop[a] = min(start[a] + _SLICE_VOXELS // period * period, main.volume.shape[a])
        region = Box(triple(start), triple(stop))
        shown_edge = region.shape[sides[1]]
        plane = "".join(AXES[a] for a in sides)
        planes.append(f"{AXES[axis]} = {middle[axis]}<br><small>{plane}</small>")
        for sight in sights:
            picture, alt = _picture(_slice(sight, region, axis), sight.colours), f"{sight.title}, {plane} plane"
            bar = _scale_bar(shown_edge, voxel, unit)
            pictures.append(f"<div class='slice'><img alt='{escape(alt)}' src='{picture}'>{bar}</div>")
    if len(sights) == 1:  # one volume: its planes side by side
        cells = ["<div></div>", *(f"<div class='plane'>{plane}</div>" for plane in planes), "<div></div>", *pictures]
    else:
        cells = ["<div></div>", *(f"<div class='head'>{escape(sight.title)}</div>" for sight in sights)]
        for row, plane in enumerate(planes):
            cells += [f"<div class='plane'>{plane}</div>", *pictures[row * len(sights) : (row + 1) * len(sights)]]
    swatches = "".join(
        f"<span><i style='background:rgb({','.join(str(int(c)) for c in colour)})'></i>{escape(name)}</span>"
        for name, colour in legend.items()
    )
    columns = len(sights) if len(sights) > 1 else len(planes)
    kind = "grid" if len(sights) > 1 else "grid single"
    grid = f"<div class='{kind}' style='--columns:{columns}'>{''.join(cells)}</div>"
    whole = all(n <= _SLICE_VOXELS for n in main.volume.shape)
    where = "Whole planes through the middle" if whole else f"The middle {shown_edge} voxels of the middle planes"
    where += ", the same region in every column" if len(sights) > 1 else ""
    training = ""
    if crop is not None:
        picture, caption, edge = crop
        training = (
            f"<div class='training'><div class='slice'><img alt='training image' src='{picture}'>"
            f"{_scale_bar(edge, voxel, unit)}</div><p>{caption}</p></div>"
        )
    return (
        f"<section><h2>Slices</h2><p class='legend'>{swatches}</p>{grid}"
        f"<p class='note'>{where}; rows run along the first of the two axes named.</p>"
        f"{training}</section>"
    )


def _slice(sight: Sight, region: Box, axis: int) -> np.ndarray:
    """The labels of a high-res region one voxel thin along `axis`, as positions (row, column) of the sight's voxels."""
    start = [floor(a / sight.step) for a in region.start]
    stop = [ceil(b / sight.step) for b in region.stop]
    stop[axis] = start[axis] + 1
    box = Box(triple(start), triple(stop)).clipped(Box.whole(sight.volume.shape))
    low_res = PhaseMap(sight.values, sight.volume.path, sight.unknown).index(sight.volume.read(box))
    return likeliest(low_res).squeeze(axis)


def _training_crop(study: Study, colours: np.ndarray, shape: Triple) -> tuple[str, str, int] | None:
    image = study.high_res.images[0]
    if not _exists(image.path):
        return None
    first = PhaseMap(tuple(study.high_res.phases), image.path).index(read_images(image.path)[:1])[0]
    edges = [min(_SLICE_VOXELS, max(shape), n) for n in first.shape]
    at = [(n - e) // 2 for n, e in zip(first.shape, edges, strict=True)]
    part = first[at[0] : at[0] + edges[0], at[1] : at[1] + edges[1]]
    caption = (
        f"<b>High-res training image</b> at the same magnification: the middle {edges[0]} × {edges[1]} pixels of "
        f"{escape(Path(image.path).name)} ({first.shape[0]} × {first.shape[1]}). The super-resolved slices above "
        "should look as if cut from the same material."
    )
    return _picture(part, colours), caption, edges[1]


def _palette(count: int) -> np.ndarray:
    return np.array([PHASE_COLOURS[i % len(PHASE_COLOURS)] for i in range(count)], float)


def _picture(index: np.ndarray, colours: np.ndarray) -> str:
    """A palette PNG of positions (row, column), as a data URI."""
    image = Image.fromarray(np.ascontiguousarray(index, np.uint8), mode="P")
    image.putpalette(colours.round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scale_bar(shown_voxels: int, voxel: float, unit: str) -> str:
    """A bar of a round length, at most a third of the image."""
    longest = shown_voxels * voxel / 3
    power = 10.0 ** floor(log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9))
    text, share = f"{length:g} {unit}", 100 * length / (shown_voxels * voxel)
    if unit == "nm" and length >= 1000:
        text = f"{length / 1000:g} µm"
    return f"<div class='bar' style='width:{share:.2f}%'></div><div class='bartext'>{text}</div>"


# ---- numbers ----------------------------------------------------------------------------------------------


def _numbers(metrics: Mapping[str, Any] | None, command: str) -> list[str]:
    if metrics is None:
        return [_missing("Metrics", "metrics.json", command)]
    return [
        _metric_table(metrics), _low_res_table(metrics.get("low_res")), _appearance(metrics), _distributions(metrics),
        _statistics(metrics),
    ]  # fmt: skip


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
        cells.append(_cell(_number(row.value), "strong"))
        if has["error"]:
            cells.append(_cell("" if row.error is None else f"± {row.error:.2g}"))
        if has["reference"]:
            cells += [_cell(_number(row.reference)), _cell(_signed(row.difference))]
            cells.append(_cell("" if row.relative is None else f"{row.relative:+.1%}"))
        if has["images"]:
            cells.append(_cell(_number(row.images)))
        if has["cubes"]:
            cells.append(_cell(_plus_minus(row.cubes) if row.cubes else ""))
            if has["reference"]:
                cells.append(_cell(_plus_minus(row.reference_cubes) if row.reference_cubes else ""))
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
    return f"<section><h2>Metrics</h2>{_table(heads, lines)}<p class='note'>{escape(' '.join(notes))}</p></section>"


def _low_res_table(low_res: Mapping[str, Any] | None) -> str:
    if not low_res:
        return ""
    names = low_res["phases"]
    heads = ["low-res label", *(f"seen as {n}" for n in names), "low-res fraction", "fraction seen"]
    lines = []
    for name in names:
        row = low_res["confusion"][name]
        total = sum(row.values()) or 1
        share = "".join(_cell(f"{row[n] / total:.2%}", "strong" if n == name else "") for n in names)
        fraction = low_res["volume_fraction"][name]
        lines.append(
            f"<tr><th>{escape(name)}</th>{share}{_cell(_number(fraction))}{_cell(_number(low_res['of_volume'][name]))}</tr>"
        )
    off = ", ".join(f"{escape(name)} {value:.4f}" for name, value in low_res.get("fraction_difference", {}).items())
    off = f"<p>Mean difference of fractions in low-res voxels: {off}.</p>" if off else ""
    share = low_res.get("unknown", 0.0)
    compared = f"All but {share:.2%}, which are unknown, were compared" if share else "Every voxel was compared"
    return (
        "<section><h2>Agreement with the low-res volume</h2>"
        f"<p><b>{low_res['agreement']:.3%}</b> of {low_res['voxels_compared']:,} low-res voxels are what the imaging "
        f"operator makes of the super-resolved volume. {compared}, so these shares have no error.</p>{off}"
        f"{_table(heads, lines, 'one')}{_imprint(low_res)}</section>"
    )


def _imprint(low_res: Mapping[str, Any]) -> str:
    """Where phases part, by position in the low-res lattice, relative to the axis's mean."""
    shares = {axis: np.array(low_res["changed_faces"][axis]) for axis in AXES}
    means = {axis: float(one.mean()) for axis, one in shares.items()}
    text = (
        f"<p><b>Lattice imprint {low_res['lattice_imprint']:.1%}</b>: the largest departure of these bars from 1. "
        "Matter knows nothing of the low-res lattice, so its bars are level but for chance; a bar above 1 is a place "
        "where phases part because a low-res voxel ends there.</p>"
    )
    positions = len(shares["z"])
    if positions < 2 or not all(means.values()):
        return text
    figure = _figure(5.5, 2.2)
    axes = figure.add_subplot()
    for place, (axis, colour) in enumerate(zip(AXES, _SERIES, strict=False)):
        at = np.arange(positions) + (place - 1) * 0.27
        axes.bar(at, shares[axis] / means[axis], 0.25, color=colour, alpha=0.85, label=f"along {axis}")
    axes.axhline(1, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(positions))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("position of a face in the low-res lattice, high-res voxels", fontsize=8)
    axes.set_ylabel("faces that part phases / mean", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return text + _svg(figure, "lattice imprint")


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


def _appearance(metrics: Mapping[str, Any]) -> str:
    """How much slices differ from the training images, beside what a quarter of these differs from the whole."""
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
            cells.append(_cell(_number(one["errors"][key]), f"strong {grade}"))
            if truth:
                cells.append(_cell(_number(truth[plane]["errors"].get(key))))
            cells.append(_cell(_number(float(np.mean(by_chance))) if by_chance else ""))
            cells.append(_cell(_number(max(by_chance)) if by_chance else ""))
            lines.append(f"<tr class='{'first' if place == 0 else ''}'>{''.join(cells)}</tr>")
    shown = metrics["volume"]["appearance"]
    cubes = f"{shown['cubes']} cube{'s' if shown['cubes'] > 1 else ''} of up to {shown['edge']}³"
    return (
        "<section><h2>Appearance</h2><p>How far the slices of this volume are from the training images. tv1 and tv4 "
        "are the share of small patterns (0 to 1) that one would have to exchange to turn one into the other: the "
        "lower, the less can be told apart by eye.</p>"
        f"{_table(heads, lines)}<p class='note'>Slices of {cubes}. The error "
        "of these numbers is chance, of which each quarter of the training images against the whole is a measure. "
        "Green: not more than the worst quarter; amber: up to twice that.</p></section>"
    )


def _distributions(metrics: Mapping[str, Any]) -> str:
    rows = [row for row in metric_rows(metrics) if row.cubes]
    fractions = _plot_fractions(metrics)
    if not rows:
        return f"<section><h2>Phase fractions</h2>{fractions}</section>"
    columns = 4
    lines = -(-len(rows) // columns)
    figure = _figure(11, 2.1 * lines)
    for place, row in enumerate(rows, 1):
        axes = figure.add_subplot(lines, columns, place)
        ours = np.array(row.cubes["values"])  # type: ignore[index]
        theirs = np.array(row.reference_cubes["values"]) if row.reference_cubes else None
        both = ours if theirs is None else np.concatenate([ours, theirs])
        bins = np.linspace(both.min(), both.max() + 1e-12, 15).tolist()
        axes.hist(ours, bins, color=_OURS, alpha=0.55, label="this volume")
        if theirs is not None:
            axes.hist(theirs, bins, histtype="step", color=_TRUTH, linewidth=1.6, label="ground truth")
        if row.images is not None:
            axes.axvline(row.images, color=_IMAGES, linewidth=1.4, linestyle="--", label="training images")
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
        f"{_svg(figure, 'distributions over sub-volumes')}</section>"
    )


def _plot_fractions(metrics: Mapping[str, Any]) -> str:
    rows = [row for row in metric_rows(metrics) if row.metric == "volume fraction"]
    groups = [("this volume", _OURS, [r.value for r in rows])]
    for title, colour, found in (
        ("ground truth", _TRUTH, [r.reference for r in rows if r.reference is not None]),
        ("training images", _IMAGES, [r.images for r in rows if r.images is not None]),
    ):
        if len(found) == len(rows):
            groups.append((title, colour, found))
    figure = _figure(min(11, 2.5 + 1.7 * len(rows)), 2.4)
    axes, width = figure.add_subplot(), min(0.5, 0.8 / len(groups))
    for place, (title, colour, values) in enumerate(groups):
        at = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * width
        errors = [r.error for r in rows if r.error is not None] if place == 0 else []
        line = {"ecolor": _INK, "elinewidth": 1, "capsize": 2}
        known = errors if len(errors) == len(rows) else None
        bars = axes.bar(at, values, width * 0.92, color=colour, label=title, alpha=0.85, yerr=known, error_kw=line)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, color=_INK, padding=1)
    axes.set_xticks(range(len(rows)), [r.of for r in rows])
    axes.set_ylabel("volume fraction", fontsize=8)
    axes.margins(y=0.15)
    axes.tick_params(labelsize=8)
    if len(groups) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    lines = "<p class='note'>Lines on the bars: the standard error of the volume as a sample of the material.</p>"
    return _svg(figure, "phase fractions") + (lines if all(r.error is not None for r in rows) else "")


# ---- spatial statistics -----------------------------------------------------------------------------------


def _statistics(metrics: Mapping[str, Any]) -> str:
    """Correlations, chords, spectra, connected shares, paths, and how the spread falls with size; truth dashed."""
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


_Shown = Sequence[tuple[Mapping[str, Any], Mapping[str, Any], str]]
_SERIES = (_OURS, _TRUTH, _IMAGES, "#b0487c", "#8064a2", "#4aa0a0")


def _edges(volume: Mapping[str, Any]) -> tuple[float, ...]:
    """Voxel edges z, y, x in the length unit of the numbers."""
    named = Named({}, tuple(volume["voxel_size"]), volume["voxel_unit"])
    return named.lengths


def _correlations(both: _Shown) -> str:
    """S2 of every phase with itself, then between phases, a panel each with the three axes."""
    names = [phase["name"] for phase in both[0][1]["phases"]]
    keys = [f"{name}|{name}" for name in names] + [f"{a}|{b}" for a, b in combinations(names, 2)]
    keys = keys[:9]
    figure, columns = _panels(len(keys))
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // columns), columns, place)
        for found, volume, style in both:
            found = found["correlations"]
            for axis, colour, edge in zip(AXES, _SERIES, _edges(volume), strict=False):
                known = [k for k, n in enumerate(found["pairs"][axis]) if n]
                shares = [found["counts"][axis][key][k] / found["pairs"][axis][k] for k in known]
                label = axis if style == "-" and place == 1 else None
                axes.plot([k * edge for k in known], shares, style, color=colour, linewidth=1.2, label=label)
        first, second = key.split("|")
        fraction = both[0][1]["volume_fraction"]
        # What two places have that know nothing of each other.
        axes.axhline(fraction[first] * fraction[second], color=_INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        _title(axes, f"S2, {pair_name(key) if len(set(key.split('|'))) > 1 else key.split('|')[0]}")
        axes.set_xlabel(f"distance, {short_unit(both[0][1]['length_unit'])}", fontsize=7)
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("probability", fontsize=7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return (
        f"<h3>Two-point correlations</h3>{_svg(figure, 'two-point correlations')}<p class='note'>Probability that a "
        "voxel is of the first phase and the one at a distance along an axis of the second; dotted: the product of "
        "their fractions, which unrelated places have.</p>"
    )


def _chords(both: _Shown) -> str:
    """Share of a phase's whole-chord voxels by chord length, and the mean lengths."""
    phases = list(both[0][0]["chords"]["z"])
    figure, columns = _panels(len(phases))
    for place, phase in enumerate(phases, 1):
        axes = figure.add_subplot(-(-len(phases) // columns), columns, place)
        for found, volume, style in both:
            for axis, colour, edge in zip(AXES, _SERIES, _edges(volume), strict=False):
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
            cells = "".join(_cell(_with_error(one["mean_length"], one.get("standard_error"))) for one in own)
            lines.append(f"<tr><th>{escape(name)}</th>{cells}{_cell(f'{cut:.1%}')}</tr>")
    return (
        f"<h3>Chord lengths</h3>{_svg(figure, 'chord lengths')}"
        f"{_table(['', *means, 'cut by a face, at most'], lines, 'one')}"
        "<p class='note'>Share of voxels that lie in a chord of a length, and mean length of chords ± standard error "
        "as a sample of the material, from their spread; chords side by side, which cut the same grain, count as one. "
        "Without those cut by the volume's faces, whose share is exact.</p>"
    )


def _spectra(both: _Shown) -> str:
    figure = _figure(6, 2.6)
    axes = figure.add_subplot()
    for found, _, style in both:
        for axis, colour in zip(AXES, _SERIES, strict=False):
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
        f"<h3>Radial spectrum of slices</h3>{_svg(figure, 'radial spectra')}<p class='note'>Middle "
        f"{' × '.join(map(str, one['pixels']))} pixels of {one['slices']} slices; bands: one standard error.</p>"
    )


def _connectivity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if "connectivity" not in ours:
        return ""
    lines = []
    for found, after in ((ours, ""), (theirs, ", truth")):
        for phase, one in (found.get("connectivity") or {}).items():
            shares = "".join(_cell(f"{one['percolating_share'][axis]:.2%}") for axis in AXES)
            largest = _cell(f"{one['largest_share']:.2%}")
            lines.append(
                f"<tr><th>{escape(phase + after)}</th><th></th>{_cell(str(one['clusters']))}{largest}{shares}</tr>"
            )
    heads = ["", "", "clusters", "largest", *(f"percolating along {axis}" for axis in AXES)]
    return (
        f"<h3>Connected share</h3>{_table(heads, lines)}<p class='note'>Of each phase's voxels, joined by faces; "
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
                cells = "".join(_cell(_number(forms[form]["tau"]) or "no path") for form in _FORMS)
                whole = forms["whole"]
                total = whole["voxels"] + whole["unreachable"]
                cells += _cell(f"{whole['unreachable'] / total:.2%}" if total else "")
                name = escape(phase + after) if place == 0 else ""
                lines.append(f"<tr class='{'first' if name else ''}'><th>{name}</th><th>{axis}</th>{cells}</tr>")
    heads = ["", "", "from the first plane", "from the last", "whole volume", "voxels without a path"]
    return (
        f"<h3>Mean geodesic tortuosity</h3>{_table(heads, lines)}<p class='note'>Shortest paths inside the phase by "
        f"steps to {ours['geodesic']['neighbours']} neighbours / thickness. Exact for this volume: every path is the "
        "shortest there is, its steps rounded to 1/4096 of a voxel edge.</p>"
    )


_FORMS = ("inlet", "outlet", "whole")


def _representative(found: Mapping[str, Any], volume: Mapping[str, Any]) -> str:
    """Spread against size, relative to the mean, with the fitted line up to the whole volume."""
    sizes = np.array([one["voxels"] for one in found["sizes"]], float)
    if len(sizes) < 2:
        return ""
    whole = float(np.prod(volume["shape"])) ** (1 / 3)
    shown = [("volume fraction", "volume_fraction"), ("specific surface", "specific_surface_faces")]
    shown += [("interphase area", "interphase_area"), ("TPB density", "tpb_density")]
    shown = shown[: 3 if len(volume["phases"]) < 3 else None]  # two phases have no triple-phase boundary
    figure = _figure(11, 2.6)
    for place, (title, metric) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        of = found[metric] if "std" not in found[metric] else {"": found[metric]}
        for number, ((key, one), colour) in enumerate(zip(of.items(), _SERIES, strict=False)):
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
                axes.legend(fontsize=6, frameon=False, labelcolor=_INK)
        _title(axes, title)
        axes.set_xlabel("edge of a cube, voxels", fontsize=7)
        if place == 1:
            axes.set_ylabel("standard deviation / mean", fontsize=7)
    cubes = ", ".join(f"{one['cubes']} of {one['voxels']}³" for one in found["sizes"])
    return (
        f"<h3>Representative volume</h3>{_svg(figure, 'representative volume')}<p class='note'>Standard deviation / "
        f"mean over cubes that do not overlap ({cubes}); lines: std² ∝ V<sup>−α</sup>, fitted; their ends are the "
        "standard error of the whole volume, with the range that the fit leaves. Structure longer than the volume is "
        "not in it.</p>"
    )


def _panels(count: int) -> tuple[Figure, int]:
    columns = min(3, count)
    return _figure(min(11, 3.6 * columns + 0.4), 2.3 * -(-count // columns)), columns


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=8)
    axes.tick_params(labelsize=7)


def _transport(transport: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, command: str) -> str:
    parts = [_missing_text("transport.json", command) if transport is None else _transport_table(transport)]
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
                    cells.append(_cell(_plus_minus(one[key]), "strong"))
                    if other:
                        cells.append(_cell(_plus_minus(other[key])))
                for each in [one, other] if other else [one]:
                    cells.append(_cell(f"{each['percolating']} of {each['count']}"))
                lines.append(f"<tr class='{'first' if place == 0 else ''}'>{''.join(cells)}</tr>")
        edge = (metrics or {})["volume"]["subvolumes"]["voxels"]
        parts.append(
            f"<h3>In cubes of {edge}³ </h3>{_table(heads, lines)}"
            "<p class='note'>Mean ± standard deviation. A cube in which "
            "the phase does not percolate has D_rel 0 and infinite tau; tau is over the percolating ones.</p>"
        )
    return f"<section><h2>Transport</h2>{''.join(parts)}</section>"


def _cube_transport(metrics: Mapping[str, Any] | None, which: str) -> Mapping[str, Any]:
    return (((metrics or {}).get(which) or {}).get("subvolumes") or {}).get("transport") or {}


def _transport_table(transport: Mapping[str, Any]) -> str:
    truth = {
        (r["phase"], r["direction"]): r for r in (transport.get("reference") or {"results": []})["results"]
    }  # fmt: skip
    published = transport.get("published") or []
    heads = ["", "", "D_rel", *(["truth", "relative"] if truth else []), "tau", *(["truth"] if truth else [])]
    heads += ["tau of the percolating part", "percolating share"]
    figures = {
        phase: [p for p in published if p["metric"] in ("tau", "D_rel") and p["of"] == phase]
        for phase in {r["phase"] for r in transport["volume"]["results"]}
    }
    heads += ["published"] if any(figures.values()) else []
    lines, last = [], None
    for one in transport["volume"]["results"]:
        other = truth.get((one["phase"], one["direction"]))
        phase = escape(one["phase"]) if one["phase"] != last else ""
        cells = [f"<th>{phase}</th><th>{one['direction']}</th>", _cell(_state(one, "D_rel"), "strong")]
        if truth:
            cells.append(_cell(_state(other, "D_rel") if other else ""))
            both = other and one["D_rel"] is not None and other["D_rel"]
            cells.append(_cell(f"{one['D_rel'] / other['D_rel'] - 1:+.1%}" if both and other else ""))
        cells.append(_cell(_state(one, "tau"), "strong"))
        if truth:
            cells.append(_cell(_state(other, "tau") if other else ""))
        share = (one["percolating_fraction"] or 0.0) / one["volume_fraction"] if one["volume_fraction"] else 0.0
        unknown = one["state"] == "estimate"
        cells += [_cell("" if unknown else _state(one, "tau_percolating")), _cell("" if unknown else f"{share:.1%}")]
        if any(figures.values()):
            here = figures[one["phase"]] if phase else []
            cells.append(_cell("<br>".join(f"{p['metric']} {_published(p)}" for p in here), "source"))
        lines.append(f"<tr class='{'first' if phase else ''}'>{''.join(cells)}</tr>")
        last = one["phase"]
    solver, volume = transport["solver"], transport["volume"]
    ranges = ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in zip(AXES, volume.get("crop") or (), strict=False))
    crop = f" Only {ranges} of the volume." if ranges else ""
    return (
        f"{_table(heads, lines)}<p class='note'>D_rel = D_eff / D_0; tau = volume fraction / D_rel. What follows − or "
        "+ is the solver's estimated error, always to that side; percolating shares are exact counts. "
        f"{escape(solver['name'])}: {escape(solver['method'])}; stops at {escape(solver['stop'])}.{escape(crop)}</p>"
    )


def _state(result: Mapping[str, Any], key: str) -> str:
    if result["state"] == "not percolating":
        return "0" if key == "D_rel" else "∞ (does not percolate)" if key == "tau" else "∞"
    if result["state"] == "estimate":
        return f"{'∞' if result[key] is None else _number(result[key])} (estimate of blocks)"
    if result[key] is None:
        return "not converged"
    # Of D_rel it is what the upper bound may be too high, of tau what it may be too low.
    error = f" {'−' if key == 'D_rel' else '+'} {result['error'] * result[key]:.1g}" if result.get("error") else ""
    return _number(result[key]) + error


# ---- training ---------------------------------------------------------------------------------------------


def _training(path: Path) -> str:
    """Curves of whatever columns training.csv has."""
    if not path.is_file():
        return _missing("Training", path.name, "hpcres train")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([_float(row.get(name)) for row in rows]) for name in (rows[0] if rows else {})}
    if len(rows) < 2 or "step" not in columns:
        return _missing("Training", path.name, "hpcres train")
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
    panels = [(t, [n for n in names if n in columns], s) for t, names, s in panels]
    panels = [panel for panel in panels if panel[1]]
    lines = -(-len(panels) // 3)
    figure = _figure(11, 2.3 * lines)
    for place, (title, names, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 3, place)
        for number, name in enumerate(names):
            values = columns[name]
            colour = (_OURS, _TRUTH, _IMAGES, "#b0487c", "#8064a2", "#4aa0a0")[number % 6]
            axes.plot(along, values, color=colour, alpha=0.3 if len(rows) > 60 else 0.9, linewidth=1)
            if len(rows) > 60:
                axes.plot(along, _smooth(values), color=colour, linewidth=1.6)
            if len(names) > 1:
                axes.plot([], [], color=colour, label=name.removeprefix("fraction_").replace("_", " "))
        if scale == "log" and all(np.nanmin(columns[n]) > 0 for n in names):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False, labelcolor=_INK)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(which="both", labelsize=7)
    steps, time = int(columns["step"][-1]), "" if minutes is None else f" in {minutes[-1]:.1f} minutes"
    return f"<section><h2>Training</h2><p>{steps:,} generator steps{time}.</p>{_svg(figure, 'training')}</section>"


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a thirtieth of the run."""
    width = max(3, len(values) // 30)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


# ---- provenance and page ----------------------------------------------------------------------------------


def _study_facts(
    study: Study, volume: Volume, metrics: Mapping[str, Any] | None, transport: Mapping[str, Any] | None
) -> dict[str, str]:
    facts = {
        "study": study.name,
        "volume": os.path.abspath(volume.path),
        "low-res volume": ", ".join(study.low_res.paths),
        "training images": ", ".join(image.path for image in study.high_res.images),
        "ground truth": study.reference.volume or "none",
        "imaging operator": study.imaging.operator,
        "seed": str(study.seed),
        **_flat(volume.provenance),
    }
    return facts | _commands(metrics, transport)


def _commands(metrics: Mapping[str, Any] | None, transport: Mapping[str, Any] | None) -> dict[str, str]:
    return {
        f"{name} by": f"{stage['command']} (hpcres {stage.get('hpcres', '')})"
        for name, stage in (("metrics", metrics), ("transport", transport))
        if stage is not None and stage.get("command")
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            facts |= _flat(value, f"{name} · ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            facts[name] = ", ".join(map(str, value))
        else:
            facts[name] = str(value)
    return facts


def _made_by(provenance: Mapping[str, Any] | None) -> str:
    return json.dumps(provenance or {}, sort_keys=True, default=str)


def _provenance(facts: Mapping[str, str]) -> str:
    lines = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items() if value
    )
    return f"<section><h2>Provenance</h2><div class='wide'><table class='facts'>{lines}</table></div></section>"


def _header(title: str, subtitle: str) -> str:
    return f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"


def _warning(text: str) -> str:
    return f"<p class='warning'>{escape(text)}</p>"


def _missing(title: str, file: str, command: str) -> str:
    return f"<section><h2>{title}</h2>{_missing_text(file, command)}</section>"


def _missing_text(file: str, command: str) -> str:
    return f"<p class='missing'>No {escape(file)} yet: run <code>{escape(command)}</code>, then this report again.</p>"


def _shape_text(volume: Volume) -> str:
    return " × ".join(map(str, volume.shape))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.5f}" if 1e-3 <= abs(value) < 10 else f"{value:.5g}"


def _with_error(value: float | None, error: float | None) -> str:
    """To two digits of the error."""
    if value is None or not error:
        return _number(value) or "–"
    decimals = max(0, 1 - floor(log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _signed(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:+.2g}" if abs(value) < 1e-3 else f"{value:+.5f}"


def _plus_minus(summary: Mapping[str, Any] | None) -> str:
    if not summary or summary["mean"] is None:
        return "–"
    return _with_error(summary["mean"], summary["std"])


def _published(one: Mapping[str, Any]) -> str:
    spread = f" ± {one['spread']:g}" if one.get("spread") is not None else ""
    return f"<b>{one['value']:g}{spread}</b> {escape(one['source'])}"


def _table(heads: Iterable[str], lines: Iterable[str], style: str = "two") -> str:
    head = "".join(f"<th class='{'left' if h == 'published' else ''}'>{escape(h)}</th>" for h in heads)
    return (
        f"<div class='wide'><table class='{style}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str, style: str = "") -> str:
    return f"<td class='{style}'>{text}</td>" if style else f"<td>{text}</td>"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); remove it and run its stage again") from None


def _exists(path: str) -> bool:
    return Path(path.split(":/")[0]).exists()


def _figure(width: float, height: float) -> Figure:
    """Transparent, with grey ink that reads on light and dark."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _svg(figure: Figure, alt: str) -> str:
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        axes.tick_params(which="both", colors=_INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
        for offset in (axes.xaxis.offsetText, axes.yaxis.offsetText):
            offset.set_color(_INK)
    for legend in figure.legends:
        for entry in legend.get_texts():
            entry.set_color(_INK)
    buffer = io.StringIO()
    # Without date and with fixed ids, the same numbers give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "hpcres"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    width = round(figure.get_figwidth() * 97)
    return f"<img class='plot' alt='{escape(alt)}' style='max-width:{width}px' src='data:image/svg+xml;base64,{data}'>"


def _write(target: Path, title: str, body: Iterable[str]) -> Path:
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} – hpcres</title><style>{_STYLE}</style></head><body><main>{''.join(body)}"
        f"<footer>hpcres {__version__}</footer></main></body></html>\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


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
th { text-align: left; font-weight: 500; padding: 3px 10px 3px 0; vertical-align: top; }
thead th { color: var(--soft); font-size: 12.5px; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
thead th:first-child, thead th.left, .two thead th:nth-child(2) { text-align: left; }
td { text-align: right; padding: 3px 10px 3px 8px; white-space: nowrap; vertical-align: top; }
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
