"""Section of the page with the few numbers that decide whether a volume is good, each with a grade."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcres.metrics.table import Row, metric_rows
from hpcres.pages import render
from hpcres.study import Study

# Shares that call for a second look, and for doubt: fractions in points, the others relative.
_LIMITS = {"volume fraction": (0.01, 0.02), "interphase area": (0.07, 0.15), "TPB": (0.1, 0.2), "surface": (0.07, 0.15)}
_AGREEMENT_LIMITS = (0.98, 0.95)


@dataclass(frozen=True)
class _Card:
    """A metric's largest error.

    Attributes
    ----------
    title : str
        Name of the metric.
    value : str
        The error, with its sign and unit.
    of : str
        Phase or pair that has it; empty for a metric of the whole volume.
    grade : str
        `good`, `fair` or `poor`.
    """

    title: str
    value: str
    of: str
    grade: str


def verdict_section(metrics: Mapping[str, Any] | None, study: Study) -> str:
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
    truth = metrics.get("reference") is not None
    agreement = None
    if low_res := metrics.get("low_res"):
        share, (good, fair) = low_res["agreement"], _AGREEMENT_LIMITS
        agreement = {"share": share, "grade": "good" if share >= good else "fair" if share >= fair else "poor"}
    cards = list(_cards(metric_rows(metrics), truth)) if truth or study.high_res.isotropic else []
    if agreement is None and not cards:
        return ""
    return render("verdict", agreement=agreement, cards=cards, truth=truth)


def _cards(rows: Sequence[Row], truth: bool) -> Iterator[_Card]:
    for title, key, limit, in_points in (
        ("Phase fractions", "volume_fraction", "volume fraction", True),
        ("Surface areas", "specific_surface_faces", "surface", False),
        ("Interphase areas", "interphase_area", "interphase area", False),
        ("Triple-phase boundary", "tpb_normalised", "TPB", False),
    ):
        worst = _worst([r for r in rows if r.key == key and r.of != "…"], truth, in_points)
        if worst is None:
            continue
        error, row = worst
        good, fair = _LIMITS[limit]
        grade = "good" if abs(error) <= good else "fair" if abs(error) <= fair else "poor"
        # The truth is the same place and its difference exact; the images are another, and chance has its share.
        spread = None if truth or row.standard_error is None else 100 * row.standard_error
        chance = "" if spread is None else f" ± {spread:.2f}" if in_points else f" ± {spread / (row.images or 1):.1f}"
        text = f"{100 * error:+.2f}{chance} points" if in_points else f"{100 * error:+.1f}{chance} %"
        yield _Card(title, text, row.of, grade)


def _worst(rows: Sequence[Row], truth: bool, in_points: bool) -> tuple[float, Row] | None:
    """Return the largest error and its row, without pairs that hardly touch, which would only show noise."""
    found = []
    targets = [(row.reference if truth else row.images, row) for row in rows]
    largest = max((t for t, _ in targets if t), default=0.0)
    for target, row in targets:
        if target is not None and (in_points or target > 0.01 * largest):
            found.append((row.value - target if in_points else row.value / target - 1, row))
    return max(found, key=lambda pair: abs(pair[0]), default=None)
