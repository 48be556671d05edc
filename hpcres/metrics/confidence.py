"""Confidence of the numbers of a super-resolved volume: intervals from repeated runs.

A run is a training, and the volume that its generator paints. Runs of the same images and the same low-res volume with
different seeds differ by their training and by their noise, that is by all that images and low-res volume leave open.
The true volume is taken for one more draw from the distribution of such runs. Of k runs with mean m and standard
deviation s the interval that holds the next draw with probability p is m ± t(k − 1, (1 + p) / 2) · s · √(1 + 1/k)
(prediction interval of a normal distribution). Phase fractions are taken as they are, all other numbers by their
logarithm, since their errors are relative.

The interval does not contain errors that all runs have in common: an imaging operator that is not the instrument's,
images that are not typical, a recipe that is too short. `bench/confidence.py` counts how often the interval holds the
truth of phantoms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.metrics.quantities import HEADINGS
from hpcres.metrics.table import metric_rows, pair_name

SCHEMA = "hpcres confidence 1"
LEVEL = 0.9
"""Probability with which an interval is to hold the truth, by default."""
_FEWEST_RUNS = 3
"""With two, t is 6.3 and an interval says nothing."""
_LINEAR = HEADINGS["volume_fraction"]


@dataclass(frozen=True)
class Interval:
    """A number of several runs, and the interval that it gives.

    Attributes
    ----------
    metric, of, unit : str
        As in the table of `hpcres metrics`; D_rel is of a phase along an axis.
    values : tuple of float
        One for each run.
    mean, low, high : float or None
        Mean of the runs, and the ends of the interval. None where a value of 0 has no logarithm, as D_rel without a
        path.
    reference : float or None
        The number of the true volume, where the runs have the same one.
    """

    metric: str
    of: str
    unit: str
    values: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    reference: float | None = None

    @property
    def holds_reference(self) -> bool | None:
        """Whether the true value is within; None where one of them is not known."""
        if self.reference is None or self.low is None or self.high is None:
            return None
        return self.low <= self.reference <= self.high


def prediction_interval(
    values: Sequence[float], level: float = LEVEL, logarithmic: bool = True
) -> tuple[float, float, float]:
    """Compute the mean of some values, and the interval that holds one more value with probability `level`.

    Parameters
    ----------
    values : sequence of float
        At least two; positive where `logarithmic`.
    level : float
        Between 0 and 1.
    logarithmic : bool
        Whether the logarithms of the values have a normal distribution, and not the values.

    Returns
    -------
    tuple of float
        Mean (geometric where `logarithmic`), lower and upper end.

    Examples
    --------
    >>> [round(end, 3) for end in prediction_interval([0.40, 0.41, 0.39], 0.9, logarithmic=False)]
    [0.4, 0.366, 0.434]
    """
    from scipy.stats import t

    given = np.log(values) if logarithmic else np.asarray(values, float)
    mean, count = given.mean(), len(given)
    half = t.ppf((1 + level) / 2, count - 1) * given.std(ddof=1) * np.sqrt(1 + 1 / count)
    ends = np.array([mean, mean - half, mean + half])
    middle, low, high = (np.exp(ends) if logarithmic else ends).tolist()
    return middle, low, high


def intervals(folders: Sequence[str | Path], level: float = LEVEL) -> list[Interval]:
    """Compute the intervals of all numbers that runs have in common.

    Parameters
    ----------
    folders : sequence of path
        Output folders of at least three runs, each with the metrics.json and the transport.json of its labels.zarr;
        where one lacks its transport.json there is no D_rel.
    level : float
        Probability with which an interval is to hold the truth.

    Returns
    -------
    list of Interval

    Raises
    ------
    InputError
        Too few runs; a folder without metrics.json; runs of different inputs, or twice the same training.
    """
    if len(folders) < _FEWEST_RUNS:
        raise InputError(
            f"{len(folders)} runs: an interval needs at least {_FEWEST_RUNS} trainings of the same images and low-res "
            "volume with different seeds; give their output folders"
        )
    runs = [_Run.read(Path(folder)) for folder in folders]
    for other in runs[1:]:
        runs[0].refuse_other_inputs(other)
    for place, run in enumerate(runs):
        for earlier in runs[:place]:
            if run.weights == earlier.weights:
                raise InputError(
                    f"{run.folder}: has the weights of {earlier.folder}; another noise tells less than another "
                    "training; train with another seed"
                )
    return [*_of_metrics(runs, level), *_of_transport(runs, level)]


@dataclass(frozen=True)
class _Run:
    folder: Path
    metrics: dict[str, Any]
    transport: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> _Run:
        metrics = _read(folder / "metrics.json", "hpcres metrics", f"run hpcres metrics --output {folder}")
        if "weights_sha256" not in (metrics["volume"].get("provenance") or {}):
            raise InputError(f"{folder / 'metrics.json'}: is not of a volume that hpcres infer painted; give a study's")
        transport = folder / "transport.json"
        solved = _read(transport, "hpcres transport", "solve again") if transport.exists() else None
        return cls(folder, metrics, solved)

    @property
    def weights(self) -> str:
        return str(self.metrics["volume"]["provenance"]["weights_sha256"])

    def refuse_other_inputs(self, other: _Run) -> None:
        def inputs(run: _Run) -> dict[str, Any]:
            volume, images = run.metrics["volume"], run.metrics.get("images") or {}
            provenance = volume["provenance"]
            return {
                "low-res volume": provenance["input_sha256"],
                "scale factor": provenance["scale_factor"],
                "shape": volume["shape"],
                "voxel size": (volume["voxel_size"], volume["voxel_unit"]),
                "phases": list(volume["volume_fraction"]),
                "images": (images.get("pixels"), images.get("volume_fraction")),
            }

        ours, theirs = inputs(self), inputs(other)
        for name, value in ours.items():
            if value != theirs[name]:
                raise InputError(
                    f"{other.folder}: its {name} differs from that of {self.folder}, so that together they say nothing "
                    "of either; give runs of one study that differ by their seed"
                )


def _read(path: Path, schema: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith(f"{schema} "):
        raise InputError(f"{path}: is no {schema} file; {remedy}")
    return found


def _of_metrics(runs: Sequence[_Run], level: float) -> Iterator[Interval]:
    by_name = [{(row.metric, row.of): row for row in metric_rows(run.metrics)} for run in runs]
    for name, first in by_name[0].items():
        if all(name in rows for rows in by_name):
            rows = [rows[name] for rows in by_name]
            values, references = [row.value for row in rows], [row.reference for row in rows]
            yield _interval(first.metric, first.of, first.unit, values, level, references)


def _of_transport(runs: Sequence[_Run], level: float) -> Iterator[Interval]:
    solved = [_d_rel(run.transport, "volume") for run in runs]
    true = [_d_rel(run.transport, "reference") for run in runs]
    for key, of in {key: of for found in solved for key, (of, _) in found.items()}.items():
        if all(key in found for found in solved):
            values = [found[key][1] for found in solved]
            references = [found[key][1] if key in found else None for found in true]
            yield _interval(HEADINGS["D_rel"], of, "", values, level, references)


def _d_rel(transport: Mapping[str, Any] | None, which: str) -> dict[str, tuple[str, float]]:
    """Return name and D_rel of each finished solve, by what was solved; D_rel is 0 where there is no path."""
    found = {}
    for one in ((transport or {}).get(which) or {}).get("results", ()):
        settings = {key: value for key, value in one["settings"].items() if key not in ("profile", "blocks")}
        key = json.dumps([one["phase"], one["direction"], one["conductivity"], settings], sort_keys=True)
        if one["state"] in ("converged", "not percolating"):
            found[key] = (f"{one['phase']}, {one['direction']}", float(one["D_rel"] or 0))
    return found


def _interval(
    metric: str, of: str, unit: str, values: Sequence[float], level: float, references: Sequence[float | None]
) -> Interval:
    reference = references[0] if len(set(references)) == 1 else None
    linear = metric == _LINEAR
    mean, low, high = None, None, None
    if linear or min(values) > 0:
        mean, low, high = prediction_interval(values, level, logarithmic=not linear)
        if linear:  # a fraction is within 0 and 1
            low, high = max(low, 0.0), min(high, 1.0)
    return Interval(metric, of, unit, tuple(values), mean, low, high, reference)


def confidence_text(found: Sequence[Interval], level: float) -> str:
    """Format the intervals as a table of plain text, with the true values where they are known."""
    known = any(one.reference is not None for one in found)
    truth_heads = ["reference", "within"] if known else []
    lines = [["number", "mean", f"{level:.0%} interval", "±", "unit", "runs", *truth_heads]]
    for one in found:
        text = ["–", "no interval: a run has none", "–"]
        if one.mean is not None and one.low is not None and one.high is not None:
            half = max(one.high - one.mean, one.mean - one.low)
            digits = _digits(half)
            text = [
                f"{one.mean:.{digits}f}",
                f"{one.low:.{digits}f} … {one.high:.{digits}f}",
                f"{half / one.mean:.1%}" if one.mean else "–",
            ]
        digits = _digits(max(one.values) - min(one.values))
        runs = "  ".join(f"{value:.{digits}f}" for value in one.values)
        name = f"{one.metric} {pair_name(one.of)}".strip()
        within = {True: "yes", False: "no", None: ""}[one.holds_reference]
        truth = "" if one.reference is None else f"{one.reference:.{digits}f}"
        lines.append([name, *text, one.unit, runs, *([truth, within] if known else [])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _digits(width: float) -> int:
    """Return the number of decimals that show a number to a twentieth of `width`."""
    return 6 if width <= 0 else int(np.clip(np.ceil(1.3 - np.log10(width)), 0, 9))


def confidence_json(found: Sequence[Interval], folders: Sequence[str | Path], level: float) -> dict[str, Any]:
    """Return what `hpcres confidence --json` prints."""
    each = [vars(one) | {"values": list(one.values), "holds_reference": one.holds_reference} for one in found]
    return {"schema": SCHEMA, "level": level, "runs": [str(folder) for folder in folders], "intervals": each}
