"""Settings that were renamed are read under their old names, in study files, bases, --set and checkpoints."""

import json
import logging

import pytest
import yaml
from small_training import study_of

from hpcres.errors import InputError
from hpcres.study import RENAMED, Study
from hpcres.study_file import load_study, save_study

OLD = RENAMED["training"]


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
