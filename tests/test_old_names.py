"""Settings and results that were renamed are read under their old names, in every file that has them."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
import yaml
from small_training import blobs, study_of

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError
from hpcres.old_names import RENAMED_SETTINGS, with_new_result_names
from hpcres.reports.write import find_result, report_volume
from hpcres.study import Study
from hpcres.study.file import load_study, save_study
from hpcres.training.journal import _Rows
from hpcres.training.loop import train
from hpcres.training.page import write_page
from hpcres.volumes.files import write_json
from hpcres.volumes.formats import open_volume

OLD = RENAMED_SETTINGS["training"]


@pytest.fixture
def study(tmp_path):
    return save_study(study_of(tmp_path, training={"context": 1, "recalibration_cubes": 3}), "train", tmp_path)


def renamed(path, names):
    content = yaml.safe_load(path.read_text())
    content["training"] = {names.get(key, key): value for key, value in content["training"].items()}
    path.write_text(yaml.safe_dump(content))


def test_an_old_study_is_the_same_and_says_so_in_a_line(study, caplog):
    new = load_study(study)
    renamed(study, {name: old for old, name in OLD.items()})
    with caplog.at_level(logging.WARNING):
        assert load_study(study) == new
    assert (new.training.context, new.training.recalibration_cubes) == (1, 3)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{study}: training.{old} is now training.{name}; the old name is read all the same"
        for old, name in OLD.items()
    ]


def test_an_old_name_goes_before_what_a_base_says_under_the_new_one(study, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text(f"base: {study}\nname: over\ntraining: {{surroundings: 2}}\n")
    assert load_study(over).training.context == 2
    assert load_study(study, ["training.surroundings=2"]).training.context == 2
    assert load_study(over, ["training.context=1"]).training.context == 1


def test_published_figures_under_old_names_are_read(study, tmp_path, caplog):
    figures = [
        {"metric": "normalised_tpb", "value": 0.01, "source": "someone"},
        {"metric": "tau", "value": 2, "source": ""},
    ]
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"base": str(study), "reference": {"published": figures}}))
    with caplog.at_level(logging.WARNING):
        loaded = load_study(over)
    assert [one.metric for one in loaded.reference.published] == ["tpb_normalised", "tau"]
    place = "reference.published: metric"
    told = f"{over}: {place} normalised_tpb is now {place} tpb_normalised; the old name is read all the same"
    assert [record.getMessage() for record in caplog.records] == [told]
    new = with_new_result_names({"published": [*figures, {"metric": "specific_surface_area", "of": "a"}]})
    assert [one["metric"] for one in new["published"]] == ["tpb_normalised", "tau", "specific_surface_faces"]


def test_both_names_together_are_refused(study):
    study.write_text(study.read_text().replace("training:\n", "training:\n  surroundings: 1\n"))
    with pytest.raises(InputError, match=r"training.surroundings: is the old name of training.context, and both"):
        load_study(study)


def test_the_study_of_an_old_checkpoint_is_read(study):
    new = load_study(study)
    content = json.loads(new.as_json())
    for old, name in OLD.items():
        content["training"][old] = content["training"].pop(name)
    assert Study.of_json(json.dumps(content)) == new


def test_an_old_result_file_is_read_and_says_so_in_a_line(caplog):
    old = {"low_res": {"agreement": 1.0, "lattice_imprint": 0.2}, "planes": [{"lattice_imprint": 0.1}]}
    with caplog.at_level(logging.WARNING):
        new = with_new_result_names(old, "metrics.json")
    assert new == {"low_res": {"agreement": 1.0, "grid_artefact": 0.2}, "planes": [{"grid_artefact": 0.1}]}
    told = ["metrics.json: lattice_imprint is now grid_artefact; the old name is read all the same"]
    assert [record.getMessage() for record in caplog.records] == told


def test_a_report_reads_the_old_name_as_the_new_one(tmp_path, caplog):
    np.save(tmp_path / "v.npy", blobs((16, 16, 16), 1, phases=2))
    volume = open_volume(tmp_path / "v.npy")
    groups = dict.fromkeys("01", 0.5)
    low_res = {
        "phases": ["0", "1"],
        "agreement": 1.0,
        "voxels_compared": 64,
        "confusion": {"0": {"0": 32, "1": 0}, "1": {"0": 0, "1": 32}},
        "volume_fraction": groups,
        "of_volume": groups,
        "changed_faces": {axis: [0.25, 0.2, 0.3, 0.25] for axis in "zyx"},
        "lattice_imprint": 0.2,
    }
    entry = {
        "path": volume.path,
        "shape": list(volume.shape),
        "voxel_size": [1.0] * 3,
        "voxel_unit": "voxel",
        "length_unit": "voxel",
        "phases": [{"label": 0, "name": "0"}, {"label": 1, "name": "1"}],
        "volume_fraction": groups,
        "specific_surface_area": {"unit": "1/voxel", "faces": groups, "crofton": groups},
        "interphase_area": {"0|1": 0.1},
        "tpb": {"unit": "1/voxel^2"},
    }
    old = tmp_path / "measured.json"  # a file whose name ends in metrics.json must fit today's schema
    write_json(old, {"schema": "hpcres metrics 1", "volume": entry, "low_res": low_res})
    with caplog.at_level(logging.WARNING):
        found = find_result(volume, "metrics", old, True, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"{old}: lattice_imprint is now grid_artefact; the old name is read all the same"
    ]
    page = report_volume(volume, found, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>Grid artefact 20.0%</b>" in page


def test_a_run_with_old_names_goes_on_and_says_so_in_a_line(tmp_path, caplog):
    def study(steps):
        training = {"steps": steps, "quality_steps": 1, "quality_cubes": 1, "cubes": 1, "critic_steps": 1}
        return study_of(tmp_path, training=training | {"recalibration_cubes": 1})

    first, longer = study(1), study(2)
    train(first)
    table = first.folder / "quality.csv"
    table.write_text(table.read_text().replace("grid_artefact", "lattice_imprint"))
    content = torch.load(first.checkpoint_path, weights_only=True)
    best = content["training"]["best"]
    best["lattice_imprint"] = best.pop("grid_artefact")
    torch.save(content, first.checkpoint_path)
    with caplog.at_level(logging.WARNING, logger="hpcres"):
        assert train(longer).resumed_step == 1
    assert [record.getMessage() for record in caplog.records if "is now" in record.getMessage()] == [
        f"{table}: lattice_imprint is now grid_artefact; the old name is read all the same"
    ]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row["grid_artefact"]) >= 0 for row in rows)
    kept = load_checkpoint(longer.checkpoint_path).training_state["best"]
    assert "grid_artefact" in kept
    assert "lattice_imprint" not in kept


def test_training_html_shows_an_old_quality_csv_under_the_new_name(tmp_path):
    (tmp_path / "quality.csv").write_text("step,seconds,score,lattice_imprint\n10,1,2,0.5\n20,2,1,0.25\n")
    assert "<th>score</th><th>grid artefact</th>" in write_page(tmp_path, "old").read_text(encoding="utf-8")


def test_rows_of_an_old_quality_csv_are_kept_by_a_run_that_goes_on(tmp_path):
    (tmp_path / "quality.csv").write_text("step,score,lattice_imprint\n10,2,0.5\n20,1,0.25\n30,1,0.125\n")
    rows = _Rows(tmp_path / "quality.csv", ["step", "score", "grid_artefact"], 20)
    rows.close()
    assert (tmp_path / "quality.csv").read_text().split() == ["step,score,grid_artefact", "10,2,0.5", "20,1,0.25"]
