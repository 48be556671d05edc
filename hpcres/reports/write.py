"""Pages of a study and of a bare volume, put together from their sections.

If a stage has not made its results yet, the page says so and names the command that makes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.lengths import VoxelEdges
from hpcres.metrics.table import short_unit, size_text
from hpcres.old_names import with_new_result_names
from hpcres.pages import render, write_page
from hpcres.reports.numbers import metrics_sections
from hpcres.reports.slices import UNKNOWN_COLOUR, View, exists, palette, slices_section, training_crop
from hpcres.reports.training import training_section
from hpcres.reports.transport import transport_section
from hpcres.reports.verdict import verdict_section
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
    warnings = ["metrics.json belongs to another labels.zarr; run hpcres metrics again"] if stale else []
    sections = [
        verdict_section(metrics, study),
        slices_section(
            views, legend, (size.length,) * 3, short_unit(size.unit), training_crop(study, colours, volume.shape)
        ),
        *metrics_sections(metrics, "hpcres metrics"),
        transport_section(transport, metrics, "hpcres tortuosity"),
        training_section(study.folder / "training.csv"),
        render("provenance", facts=_study_facts(study, volume, metrics, transport)),
    ]
    return write_page(
        study.report_path,
        "page",
        title=study.name,
        subtitle=f"{_shape_text(volume)} voxels of {size}, scale factor {study.scale_factor}",
        warnings=[*warnings, *notes],
        sections=sections,
        version=__version__,
    )


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
    facts |= {**_flat(volume.provenance), **_commands(metrics, transport)}
    sections = [
        slices_section([view], legend, entry["voxel_size"], short_unit(entry["voxel_unit"]), None),
        *metrics_sections(metrics, "hpcres metrics"),
        transport_section(transport, metrics, solve),
        render("provenance", facts=facts),
    ]
    return write_page(
        Path(target), "page", title=name, subtitle=size_text(entry), warnings=[], sections=sections, version=__version__
    )


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
