"""One name for each quantity: in the files, in the tables, and in the glossary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from hpcres.counting.totals import Counts, finalize
from hpcres.metrics.quantities import HEADINGS
from hpcres.results import Measurement, SurfaceArea, Tortuosity, TriplePhaseBoundary
from hpcres.schemas import schema_of
from hpcres.study.metrics import Published

GLOSSARY = Path(__file__).resolve().parent.parent / "docs/glossary.md"
NO_QUANTITIES = {
    "volume": """appearance by_phases chords connectivity correlations count counts cubes edge errors geodesic label
        lags length length_unit name neighbours path periodic phases pixels planes provenance quarters representative
        seed shape sizes skipped slices spectrum starts statistics subvolumes tpb transport unit values voxel_unit x y
        z""",
    "low_res": "path phases shape x y z",
    "images": "errors isotropic length_unit paths pixels planes quarters tpb unit voxel_unit",
    "result": "blocks crop direction estimate labels periodic phase rtol settings state",
}
"""Keys that say where, of what, in which unit and with which settings a number is."""


def quantities() -> dict[str, list[str]]:
    """Heading → names, of the glossary."""
    _, _, table = GLOSSARY.read_text(encoding="utf-8").partition("| quantity | name |")
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in table.splitlines()[2:] if line.startswith("|")]
    return {heading.strip(): re.findall("`([^`]+)`", names) for heading, names in rows}


def keys(schema: dict[str, Any], whole: dict[str, Any]) -> set[str]:
    """All keys that a schema names, at any depth."""
    if "$ref" in schema:
        return keys(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    own = schema.get("properties", {})
    below = [*own.values(), *schema.get("anyOf", []), schema.get("items"), schema.get("additionalProperties")]
    return set(own).union(*(keys(one, whole) for one in below if isinstance(one, dict)))


@pytest.mark.parametrize(
    ("kind", "entry"), [("metrics", e) for e in ("volume", "low_res", "images")] + [("transport", "result")]
)
def test_every_quantity_of_a_file_is_in_the_glossary(kind, entry):
    whole, listed = (
        schema_of(kind),
        {part for names in quantities().values() for one in names for part in one.split(".")},
    )
    found = keys(whole["$defs"][entry], whole)
    others = set(NO_QUANTITIES[entry].split())
    assert others <= found
    assert found - others - listed == set()


def test_tables_use_the_words_of_the_glossary():
    names = quantities()
    for key, words in HEADINGS.items():
        name = "geodesic.inlet.tau" if key == "geodesic_tau" else key
        assert name in names[words], (key, words)


def test_no_name_is_of_two_quantities():
    every = [name for names in quantities().values() for name in names]
    assert sorted(every) == sorted(set(every))


def test_published_figures_and_results_have_these_names():
    listed = {name for names in quantities().values() for name in names}
    assert set(get_args(Published.model_fields["metric"].annotation)) <= listed & set(HEADINGS)
    assert set(vars(finalize(Counts({0: 1}), (1, 1, 1)))) <= listed
    for result, before in ((Measurement, ""), (SurfaceArea, "specific_surface_area."), (TriplePhaseBoundary, "tpb.")):
        numbers = {name for name, of in result.__annotations__.items() if of in ("float", "dict[str, float]")}
        assert {before + name for name in numbers} <= listed
    assert {name for name, of in Tortuosity.__annotations__.items() if of in ("float", "int")} <= listed
