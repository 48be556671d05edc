"""Pages of a study and of a bare volume, put together from their sections.

If a stage has not made its results yet, the page says so and names the command that makes them.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.lengths import VoxelEdges
from hpcres.metrics.table import short_unit, size_text
from hpcres.old_names import with_new_result_names
from hpcres.reports import page
from hpcres.reports.numbers import metrics_sections, transport_section, verdict
from hpcres.reports.slices import UNKNOWN_COLOUR, View, exists, palette, slices_section, training_crop
from hpcres.study import Study
from hpcres.volumes.formats import file_of, open_volume
from hpcres.volumes.phases import open_low_res
from hpcres.volumes.sizes import compare_sizes
from hpcres.volumes.volume import Volume


def report_study(study: Study, volume: Volume) -> Path:
    """Write report.html of a study from labels.zarr and the other results.

    The other results are those of metrics.json, transport.json and training.csv that exist.

    Parameters
    ----------
    study : Study
        Study of the page.
    volume : Volume
        The painted volume.

    Returns
    -------
    Path
        The page.
    """
    metrics, transport = _read_json(study.metrics_path), _read_json(study.transport_path)
    notes = compare_sizes(study, high_res=[volume])
    colours = palette(len(study.phases))
    own = tuple(range(len(study.phases)))
    given, low_legend = _low_res_view(study, colours)
    made = "generated" if study.low_res is None else "super-resolved"
    views = [*given, View(made, volume, Fraction(1), colours, own)]
    if study.reference.volume is not None and exists(study.reference.volume):
        views.append(View("ground truth", open_volume(study.reference.volume), Fraction(1), colours, own))
    size = study.high_res.voxel_size
    legend = dict(zip(study.phases, colours, strict=True)) | low_legend
    stale = metrics is not None and _made_by(metrics["volume"].get("provenance")) != _made_by(volume.provenance)
    body = [
        page.header(study.name, f"{_shape_text(volume)} voxels of {size}, scale factor {study.scale_factor}"),
        page.warning("metrics.json belongs to another labels.zarr; run hpcres metrics again") if stale else "",
        *map(page.warning, notes),
        verdict(metrics, study),
        slices_section(
            views, legend, (size.length,) * 3, short_unit(size.unit), training_crop(study, colours, volume.shape)
        ),
        *metrics_sections(metrics, "hpcres metrics"),
        transport_section(transport, metrics, "hpcres tortuosity"),
        _training(study.folder / "training.csv"),
        _provenance(_study_facts(study, volume, metrics, transport)),
    ]
    return page.write(study.report_path, study.name, body)


def _low_res_view(study: Study, colours: np.ndarray) -> tuple[list[View], dict[str, np.ndarray]]:
    """Return the view of the study's low-res volume, and the legend of its colours that are not those of phases.

    Both are empty if the study has no low-res volume.
    """
    if study.low_res is None:
        return [], {}
    low_res = open_low_res(study.low_res)
    groups = [[study.phases.index(name) for name in group] for group in study.low_res.groups]
    # Merged phases turn towards grey, so that they are not taken for one of them.
    low_colours = np.array(
        [*(colours[g].mean(0) * 0.4 + 90 if len(g) > 1 else colours[g[0]] for g in groups), UNKNOWN_COLOUR]
    )
    title = "low-res input" + ", likeliest phase" * bool(low_res.parts)
    view = View(title, low_res, study.scale_factor, low_colours, study.low_res.labels, study.low_res.unknown)
    legend = {}
    for group, colour in zip(study.low_res.groups, low_colours[:-1], strict=True):
        if len(group) > 1:
            legend[f"{' + '.join(group)} (low-res)"] = colour
    if study.low_res.unknown or low_res.parts:
        legend["unknown (low-res)"] = low_colours[-1]
    return [view], legend


def report_volume(
    volume: Volume, metrics: Mapping[str, Any], target: str | Path, transport: Mapping[str, Any] | None = None
) -> Path:
    """Write the page of a bare volume, which is compared with nothing.

    Parameters
    ----------
    volume : Volume
        Labels.
    metrics : mapping
        Content of the volume's metrics.json.
    target : path
        The page to write.
    transport : mapping, optional
        Content of the volume's transport.json.

    Returns
    -------
    Path
        The page.
    """
    entry = metrics["volume"]
    labels = tuple(int(phase["label"]) for phase in entry["phases"])
    colours = palette(len(labels))
    legend = {phase["name"]: colour for phase, colour in zip(entry["phases"], colours, strict=True)}
    name = Path(volume.path).name
    view = View(name, volume, Fraction(1), colours, labels)
    facts = {"volume": os.path.abspath(volume.path), "size": size_text(entry), "hpcres": metrics.get("hpcres", "")}
    solve = f"hpcres tortuosity {volume.path} --output {Path(target).parent / 'transport.json'}"
    body = [
        page.header(name, size_text(entry)),
        slices_section([view], legend, entry["voxel_size"], short_unit(entry["voxel_unit"]), None),
        *metrics_sections(metrics, "hpcres metrics"),
        transport_section(transport, metrics, solve),
        _provenance({**facts, **_flat(volume.provenance), **_commands(metrics, transport)}),
    ]
    return page.write(Path(target), name, body)


def find_result(volume: Volume, stage: str, path: Path, given: bool, edges: VoxelEdges | None) -> dict[str, Any] | None:
    """Return what `hpcres metrics` or `hpcres tortuosity` wrote of a bare volume to a file.

    A file that the user did not name is taken only if it is of this very volume as it is now.

    Parameters
    ----------
    volume : Volume
        The bare volume.
    stage : str
        `metrics` or `transport`.
    path : Path
        File of the result.
    given : bool
        Whether the user named the file.
    edges : VoxelEdges or None
        Edges of a voxel, if the user named them.

    Returns
    -------
    dict or None
        Content of the file. None if the file was not named, and it does not exist or is not of the volume as it is now.

    Raises
    ------
    InputError
        The user named the file, and it does not exist, was not written by the command, or is not of this volume.
    """
    if not (given or path.is_file()):
        return None
    command = {"metrics": "hpcres metrics", "transport": "hpcres tortuosity"}[stage]
    try:
        found = _read_json(path)
        if found is None:
            raise InputError(f"{path}: no such file; run {command} --output {path}, or drop `{stage}`")
        if not isinstance(found, Mapping) or not str(found.get("schema")).startswith(f"hpcres {stage} "):
            raise InputError(f"{path}: was not written by {command}; name the file that was, or drop --{stage}")
        entry, again = found["volume"], f"run {command} again, or drop --{stage}"
        if entry["shape"] != list(volume.shape):
            raise InputError(f"{path}: is of {entry['shape']} voxels, {volume.path} has {list(volume.shape)}; {again}")
        if _made_by(entry.get("provenance", volume.provenance)) != _made_by(volume.provenance):
            raise InputError(f"{path}: belongs to another store than {volume.path}; {again}")
        if edges is not None:
            size, unit = edges.lengths(volume.path)
            if (entry["voxel_size"], entry["voxel_unit"]) != (list(size), unit):
                raise InputError(f"{path}: {size_text(entry)} were measured, not of {edges}; {again}")
    except InputError:
        if given:
            raise
        return None
    file = file_of(volume.path)
    of_it = os.path.abspath(volume.path) == entry["path"] and path.stat().st_mtime >= os.stat(file).st_mtime
    return found if given or of_it else None


def _training(path: Path) -> str:
    """Return the section with curves of the columns that training.csv has."""
    if not path.is_file():
        return page.missing("Training", path.name, "hpcres train")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([_float(row.get(name)) for row in rows]) for name in (rows[0] if rows else {})}
    if len(rows) < 2 or "step" not in columns:
        return page.missing("Training", path.name, "hpcres train")
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
    figure = page.figure(11, 2.3 * lines)
    for place, (title, names, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 3, place)
        for number, name in enumerate(names):
            values = columns[name]
            colour = (page.OURS, page.TRUTH, page.IMAGES, "#b0487c", "#8064a2", "#4aa0a0")[number % 6]
            axes.plot(along, values, color=colour, alpha=0.3 if len(rows) > 60 else 0.9, linewidth=1)
            if len(rows) > 60:
                axes.plot(along, _smooth(values), color=colour, linewidth=1.6)
            if len(names) > 1:
                axes.plot([], [], color=colour, label=name.removeprefix("fraction_").replace("_", " "))
        if scale == "log" and all(np.nanmin(columns[n]) > 0 for n in names):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False, labelcolor=page.INK)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(which="both", labelsize=7)
    steps, time = int(columns["step"][-1]), "" if minutes is None else f" in {minutes[-1]:.1f} minutes"
    return f"<section><h2>Training</h2><p>{steps:,} generator steps{time}.</p>{page.svg(figure, 'training')}</section>"


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


def _provenance(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items() if value)
    return f"<section><h2>Provenance</h2><div class='wide'><table class='facts'>{lines}</table></div></section>"


def _study_facts(
    study: Study, volume: Volume, metrics: Mapping[str, Any] | None, transport: Mapping[str, Any] | None
) -> dict[str, str]:
    facts = {
        "study": study.name,
        "volume": os.path.abspath(volume.path),
        "low-res volume": "" if study.low_res is None else ", ".join(study.low_res.paths),
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


def _shape_text(volume: Volume) -> str:
    return " × ".join(map(str, volume.shape))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return with_new_result_names(json.loads(path.read_text(encoding="utf-8")), path)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); remove it and run its stage again") from None
