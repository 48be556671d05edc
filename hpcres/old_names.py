"""Names that settings and results had before, and what they are called now. Old files are read all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from hpcres.errors import InputError

log = logging.getLogger("hpcres")

RENAMED_SETTINGS = {"training": {"surroundings": "context", "settling_cubes": "recalibration_cubes"}}
"""By section of a study, the old and the new name of each setting that was renamed."""
RENAMED_RESULTS = {"lattice_imprint": "grid_artefact"}
"""Old and new name of each key of metrics.json, which is also a column of quality.csv, that was renamed."""
RENAMED_METRICS = {"normalised_tpb": "tpb_normalised", "specific_surface_area": "specific_surface_faces"}
"""Old and new name of each `metric` of published figures, in a study and in results, that was renamed."""


def rename_old_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Rename settings that have an old name, in place.

    Parameters
    ----------
    settings : dict
        Sections of a study; changed in place.

    Returns
    -------
    list of pairs of str
        Old and new dotted name of each setting that was renamed.

    Raises
    ------
    InputError
        The old and the new name of a setting are both there.
    """
    found = []
    for section, names in RENAMED_SETTINGS.items():
        given = settings.get(section)
        for old, new in names.items():
            if isinstance(given, dict) and old in given:
                if new in given:
                    raise InputError(f"{section}.{old}: is the old name of {section}.{new}, and both are set; keep one")
                given[new] = given.pop(old)
                found.append((f"{section}.{old}", f"{section}.{new}"))
    renamed = dict[str, str]()
    for figure in _published(settings):
        metric = figure.get("metric")
        if isinstance(metric, str) and metric in RENAMED_METRICS:
            figure["metric"] = renamed[metric] = RENAMED_METRICS[metric]
    place = "reference.published: metric"
    return [*found, *((f"{place} {old}", f"{place} {new}") for old, new in renamed.items())]


def _published(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the published figures of a study that may not be valid."""
    reference = settings.get("reference")
    figures = reference.get("published") if isinstance(reference, dict) else None
    return [one for one in figures if isinstance(one, dict)] if isinstance(figures, list) else []


def with_new_result_names(result: Any, path: object = None) -> Any:
    """Return results, as the content of a metrics.json, with new names in place of old ones.

    Parameters
    ----------
    result : object
        Mappings, lists and values.
    path : object, optional
        The file. If it is given, the user is told of each old name in one line.

    Returns
    -------
    object
        A copy with new names.

    Examples
    --------
    >>> with_new_result_names({"low_res": {"lattice_imprint": 0.1}})
    {'low_res': {'grid_artefact': 0.1}}
    """
    found = set[str]()

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(one) for one in value]
        if not isinstance(value, dict):
            return value
        found.update(value.keys() & RENAMED_RESULTS.keys())
        new = {RENAMED_RESULTS.get(key, key): renamed(one) for key, one in value.items()}
        metric = new.get("metric")
        if isinstance(metric, str) and metric in RENAMED_METRICS:
            found.add(metric)
            new["metric"] = RENAMED_METRICS[metric]
        return new

    content = renamed(result)
    _tell(found, path)
    return content


def with_new_columns(columns: Sequence[str], path: object = None) -> list[str]:
    """Return the columns of a quality.csv with new names in place of old ones.

    Parameters
    ----------
    columns : sequence of str
        The columns.
    path : object, optional
        The file. If it is given, the user is told of each old name in one line.

    Returns
    -------
    list of str
        The columns with new names.
    """
    _tell(RENAMED_RESULTS.keys() & set(columns), path)
    return [RENAMED_RESULTS.get(column, column) for column in columns]


def _tell(found: Iterable[str], path: object) -> None:
    for old in sorted(found) if path is not None else ():
        new = (RENAMED_RESULTS | RENAMED_METRICS)[old]
        log.warning("%s: %s is now %s; the old name is read all the same", path, old, new)
