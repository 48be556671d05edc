"""Intervals from repeated runs: they hold one more draw as often as they say; runs that do not belong together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from hpcres.cli import commands
from hpcres.errors import InputError
from hpcres.metrics.confidence import intervals, prediction_interval


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_intervals_hold_one_more_draw_as_often_as_they_say(level, count, logarithmic):
    draws = np.random.default_rng(0).normal(-1.0, 0.2, (4000, count + 1))
    draws = np.exp(draws) if logarithmic else draws
    held = 0
    for *values, more in draws:
        _, low, high = prediction_interval(values, level, logarithmic)
        held += low <= more <= high
    assert held / len(draws) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / len(draws)))


def run_in(folder, seed, pore=0.4, d_rel=0.2, truth=None, state="converged", **provenance):
    """The files of a run whose numbers are made up."""
    folder.mkdir()

    def volume(pore):
        return {
            "path": "labels.zarr",
            "shape": [64, 64, 64],
            "voxel_size": [50.0] * 3,
            "voxel_unit": "nanometer",
            "provenance": {"weights_sha256": f"w{seed}", "input_sha256": "low", "scale_factor": "4"} | provenance,
            "volume_fraction": {"pore": pore, "solid": 1 - pore},
            "specific_surface_area": {
                "unit": "1/micrometer",
                "faces": {"pore": 3.0 + seed, "solid": 3.0 + seed},
                "crofton": {"pore": 2.0, "solid": 2.0},
            },
            "interphase_area": {"pore|solid": 0.1},
            "tpb": {"unit": "1/micrometer^2"},
        }

    def solved(value, state="converged"):
        settings = {"rtol": 1e-3, "periodic": [], "crop": None, "voxel_size": [50.0] * 3, "profile": seed % 2 == 0}
        one = {"phase": "pore", "direction": "z", "conductivity": None, "settings": settings, "state": state}
        return {"results": [one | {"D_rel": value}]}

    # The files hold only what is read of them, so they state a version that has no schema.
    metrics = {"schema": "hpcres metrics 0", "volume": volume(pore), "images": {"pixels": 9, "volume_fraction": {}}}
    transport = {"schema": "hpcres transport 0", "volume": solved(d_rel, state)}
    if truth is not None:
        metrics["reference"], transport["reference"] = volume(truth[0]), solved(truth[1])
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "transport.json").write_text(json.dumps(transport))
    return folder


@pytest.fixture
def runs(tmp_path):
    numbers = ((0.40, 0.20), (0.41, 0.22), (0.39, 0.18))
    return [
        run_in(tmp_path / str(seed), seed, pore, d_rel, truth=(0.43, 0.21))
        for seed, (pore, d_rel) in enumerate(numbers)
    ]


def test_every_number_that_runs_share_has_an_interval(runs):
    found = {(one.metric, one.of): one for one in intervals(runs)}
    pore, d_rel = found["volume fraction", "pore"], found["D_rel", "pore, z"]
    # t(2, 0.95) = 2.919986, s = 0.01
    assert (pore.low, pore.high) == pytest.approx((0.4 - 0.0337172, 0.4 + 0.0337172), abs=1e-6)
    logs = np.log([0.20, 0.22, 0.18])
    half = 2.919986 * logs.std(ddof=1) * np.sqrt(4 / 3)
    assert (d_rel.low, d_rel.high) == pytest.approx(tuple(np.exp([logs.mean() - half, logs.mean() + half])), rel=1e-6)
    assert (pore.reference, pore.holds_reference, d_rel.holds_reference) == (0.43, True, True)
    assert found["interphase area", "pore – solid"].low == pytest.approx(0.1)  # no spread
    shown = CliRunner().invoke(commands, ["confidence", *map(str, runs)])
    assert shown.exit_code == 0, shown.output
    line = next(line for line in shown.output.splitlines() if line.startswith("D_rel pore, z"))
    assert "0.142 … 0.280" in line
    assert line.split()[-2:] == ["0.210", "yes"]
    printed = json.loads(CliRunner().invoke(commands, ["confidence", "--json", *map(str, runs)]).output)
    assert printed["schema"] == "hpcres confidence 1"
    assert printed["intervals"][0]["values"] == [0.40, 0.41, 0.39]
    narrower = {(one.metric, one.of): one for one in intervals(runs, 0.5)}
    assert narrower["D_rel", "pore, z"].high < d_rel.high


def test_an_interval_of_a_fraction_ends_at_0_and_1(tmp_path):
    runs = [run_in(tmp_path / str(seed), seed, pore) for seed, pore in enumerate((0.05, 0.4, 0.6))]
    pore, solid = [one for one in intervals(runs) if one.metric == "volume fraction"]
    assert (pore.low, solid.high) == (0, 1)


def test_a_run_without_a_path_gives_no_interval(runs, tmp_path):
    four = [*runs, run_in(tmp_path / "3", 3, d_rel=None, state="not percolating")]
    d_rel = next(one for one in intervals(four) if one.metric == "D_rel")
    assert (d_rel.values[-1], d_rel.low, d_rel.high, d_rel.mean) == (0, None, None, None)
    assert d_rel.reference is None  # the fourth run has none
    shown = CliRunner().invoke(commands, ["confidence", *map(str, four)])
    assert "no interval: a run has none" in shown.output


def test_a_solve_that_not_every_run_has_is_left_out(runs):
    (runs[1] / "transport.json").unlink()
    assert not [one for one in intervals(runs) if one.metric == "D_rel"]


def test_a_pair_of_phases_that_meets_in_some_runs_only_is_left_out(runs):
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    metrics["volume"]["interphase_area"] = {}
    (runs[1] / "metrics.json").write_text(json.dumps(metrics))
    found = {one.metric for one in intervals(runs)}
    assert "interphase area" not in found
    assert {"volume fraction", "D_rel"} < found


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match="2 runs: an interval needs at least 3 trainings"):
        intervals(runs[:2])
    with pytest.raises(InputError, match=r"/0: has the weights of .*/0; .*train with another seed"):
        intervals([*runs, runs[0]])
    other = run_in(tmp_path / "other", 7, input_sha256="another")
    with pytest.raises(InputError, match=r"other: its low-res volume differs from that of .*/0"):
        intervals([*runs, other])
    with pytest.raises(InputError, match=r"none/metrics.json: no such file; run hpcres metrics --output .*none"):
        intervals([*runs, tmp_path / "none"])
    (runs[2] / "transport.json").write_text('{"schema": "another"}')
    with pytest.raises(InputError, match=r"transport.json: is no hpcres transport file"):
        intervals(runs)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    metrics["volume"]["provenance"] = {}
    (runs[0] / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"is not of a volume that hpcres infer painted"):
        intervals(runs)
