"""The JSON schemas: of the study file, and of what the commands write (conftest checks the files of every test)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_schemas import faults, validate_files

import hpcres
from hpcres.metrics.measure import SCHEMA as METRICS
from hpcres.schemas import schema_of
from hpcres.study import Study, SubVolumes
from hpcres.transport import SCHEMA as TRANSPORT

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "hpcres/recipes").glob("*.yaml")])
EVERY = ("correlations", "chords", "connectivity", "spectrum", "representative", "geodesic")


def test_schemas_have_the_names_that_the_files_state():
    assert (schema_of("metrics")["$id"], schema_of("transport")["$id"]) == (METRICS, TRANSPORT)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_shipped_study_fits_and_a_misspelt_setting_does_not(file):
    content = json.loads(json.dumps(yaml.safe_load(file.read_text())))
    assert faults("study", content) == []
    assert faults("study", content | {"outptu": "x"})
    assert faults("study", content | {"training": {"stpes": 3}})


def test_a_study_has_a_schema_for_each_of_its_settings():
    found = schema_of("study")["properties"]
    assert set(Study.model_fields) <= set(found)


@pytest.mark.parametrize("kind", ["study", "metrics", "transport"])
def test_the_command_prints_a_schema(kind):
    done = subprocess.run([sys.executable, "-m", "hpcres", "schema", kind], capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(schema_of(kind)))


def test_a_measurement_with_all_statistics_fits_and_any_other_key_does_not():
    labels = np.random.default_rng(0).integers(0, 4, (40, 40, 40))
    cubes = SubVolumes(count=4, voxels=16, transport_count=2)
    found = json.loads(json.dumps(hpcres.measure(labels, statistics=EVERY, subvolumes=cubes).to_dict()))
    whole = {"schema": METRICS, "hpcres": "0", "command": "", "absent_chunks": [], "volume": found}
    assert faults("metrics", whole) == []
    for place in (whole, found, found["tpb"], found["counts"], found["statistics"], found["statistics"]["geodesic"]):
        place["else"] = 1
        assert faults("metrics", whole)
        del place["else"]
    del found["volume_fraction"]
    assert faults("metrics", whole)


def test_files_that_do_not_fit_are_found(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"schema": METRICS}))
    with pytest.raises(AssertionError, match="is a required property"):
        validate_files(tmp_path)
    (tmp_path / "metrics.json").unlink()
