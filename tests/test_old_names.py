"""Settings that were renamed are read under their old names, in study files, bases, --set and checkpoints."""

import json
import logging

import pytest
import yaml
from small_training import study_of

from hpcres.errors import InputError
from hpcres.old_names import RENAMED_SETTINGS, with_new_result_names
from hpcres.study import Study
from hpcres.study_file import load_study, save_study
from hpcres.training.journal import _Rows

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


def test_rows_of_an_old_quality_csv_are_kept_by_a_run_that_goes_on(tmp_path):
    (tmp_path / "quality.csv").write_text("step,score,lattice_imprint\n10,2,0.5\n20,1,0.25\n30,1,0.125\n")
    rows = _Rows(tmp_path / "quality.csv", ["step", "score", "grid_artefact"], 20)
    rows.close()
    assert (tmp_path / "quality.csv").read_text().split() == ["step,score,grid_artefact", "10,2,0.5", "20,1,0.25"]
