"""Several seeds of one volume: labels of the first, where they agree, and the spread of what is measured."""

from __future__ import annotations

import os
import shutil
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from small_painting import both_stores, command, flip, make_study, mpirun, paint_alone, store_bytes, truncate

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.journal import StoreLock, agreement_path
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import find_faults, remove_faulty, repair_job
from hpcres.study.file import load_study
from hpcres.volumes.pyramid import coarsen_by_mean
from hpcres.volumes.stores import AgreementStore, LabelStore


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> Path:
    """Three seeds of a volume with two levels, and its study."""
    path = make_study(tmp_path_factory.mktemp("ensemble") / "s", "4", (68, 7, 6))
    infer(open_job(load_study(path, ["inference.ensemble=3"]), JobOptions(tiles="9x2x2")), Ranks())
    return path


def test_an_ensemble_is_its_seeds_one_by_one(ensemble, tmp_path):
    store = ensemble.parent / "out/labels.zarr"
    seed = load_study(ensemble).seed
    alone = [paint_alone(ensemble, tmp_path / str(k), tiles="9x2x2", seed=seed + k) for k in range(3)]
    assert store_bytes(store) == store_bytes(alone[0])
    opened = [LabelStore.open(one) for one in alone]
    whole = Box.whole(opened[0].levels[0].shape)
    labels = [one.read(0, whole) for one in opened]
    agree = sum((one == labels[0]).astype(int) for one in labels)
    assert 0.01 < (agree < 3).mean() < 0.9
    shares = AgreementStore.open(agreement_path(store))
    np.testing.assert_array_equal(shares.read(0, whole), np.array([0, 85, 170, 255])[agree])
    coarse = shares.read(1, Box.whole(shares.levels[1].shape))
    np.testing.assert_array_equal(coarse, coarsen_by_mean(shares.read(0, whole)))
    measured = [one.provenance["measured"] for one in opened]
    spread = LabelStore.open(store).provenance["spread"]
    assert spread["seeds"] == [seed, seed + 1, seed + 2]
    assert LabelStore.open(store).provenance["measured"] == measured[0]
    for path in (
        ("volume_fraction", "nickel"),
        ("specific_surface_area", "faces", "pore"),
        ("tpb", "density"),
        ("interphase_area", "pore|ceramic"),
        ("tpb", "by_phases", "pore|nickel|ceramic", "density"),
    ):
        values = [reduce(lambda tree, key: tree[key], path, one) for one in measured]
        found = reduce(lambda tree, key: tree[key], path, spread)
        assert found["values"] == values
        assert found["mean"] == pytest.approx(np.mean(values), rel=1e-14)
        assert found["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert len(set(values)) == 3
    assert shares.provenance["complete"]
    assert "labels.zarr" in shares.provenance["agreement"]


def test_an_ensemble_by_ranks_and_after_damage_is_the_same(ensemble, tmp_path):
    whole = ensemble.parent / "out/labels.zarr"
    checkpoint = str(ensemble.parent / "out/checkpoint.pt")
    more = ["--tiles", "9x2x2", "--ensemble", "3", "--checkpoint", checkpoint, "--output", str(tmp_path)]
    done = mpirun(2, *command(ensemble, "infer", *more))
    assert done.returncode == 0, done.stderr
    store = tmp_path / "labels.zarr"
    expected = {name.split("out/")[1]: content for name, content in both_stores(whole).items()}

    def ours() -> dict[str, bytes]:
        return {name.removeprefix(f"{tmp_path}/"): content for name, content in both_stores(store).items()}

    assert ours() == expected
    shares = agreement_path(store)
    for spoil, shard, why in (
        (flip, "0/c/1/0/0", "checksum"),
        (truncate, "0/c/0/0/1", "checksum"),
        (Path.unlink, "1/c/2/0/0", "missing"),
    ):
        spoil(shares / shard)
        assert why in next(str(fault) for fault in find_faults(store) if fault.volume == "agreement")
        with StoreLock(store) as store_lock:
            remove_faulty(store, find_faults(store, store_lock=store_lock))
            infer(repair_job(store), Ranks(), store_lock=store_lock)
        assert ours() == expected
        assert find_faults(store) == []
    job = open_job(
        load_study(ensemble, ["inference.ensemble=3"], str(tmp_path)), JobOptions(checkpoint=checkpoint, tiles="9x2x2")
    )
    shutil.rmtree(shares)
    assert infer(job, Ranks()).painted == 9 * 2 * 2
    assert ours() == expected


def test_another_ensemble_is_another_job(ensemble, tmp_path):
    study = make_study(tmp_path / "s", "4", (9, 8, 7))
    output = tmp_path / "out"
    output.mkdir()
    job = open_job(load_study(ensemble), JobOptions(tiles="9x2x2"))
    with pytest.raises(InputError, match="with ensemble 3, this job has 1"):
        infer(job, Ranks())
    (output / "labels-agreement.zarr").mkdir()
    options = ["inference.ensemble=2"]
    job = open_job(
        load_study(study, options, str(output)), JobOptions(checkpoint=str(study.parent / "out/checkpoint.pt"))
    )
    with pytest.raises(InputError, match=r"labels-agreement.zarr: exists already"):
        infer(job, Ranks())
    assert os.listdir(output) == ["labels-agreement.zarr"]
    (output / "labels-agreement.zarr").rmdir()
    infer(job, Ranks())
    alone = open_job(
        load_study(study, output=str(output)), JobOptions(checkpoint=str(study.parent / "out/checkpoint.pt"))
    )
    infer(alone, Ranks(), overwrite=True)
    assert not (output / "labels-agreement.zarr").exists()
