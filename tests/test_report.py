"""The page says what metrics.json and transport.json say, shows the voxels it claims to, and needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.lengths import Length, cubic
from hpcres.metrics.measure import Sampling, Work, header, measure, measure_study
from hpcres.metrics.schedule import connect
from hpcres.metrics.table import metric_rows, metrics_text
from hpcres.pages import render
from hpcres.reports.numbers import metrics_sections
from hpcres.reports.write import find_result, report_study, report_volume
from hpcres.study import Study, SubVolumes
from hpcres.transport import SCHEMA, Conducting, SolveSettings, describe, tortuosity
from hpcres.volumes.files import write_json
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import PHASE_COLOURS
from hpcres.volumes.stores import LabelStore, Layout

SHAPE = (32, 24, 28)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Study, np.ndarray, dict]:
    """A study whose every stage left its files: blobs of three phases, low-res at scale factor 4."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 3, (8, 6, 7)).repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    sharp = truth.copy()
    sharp[::5, ::3] = (sharp[::5, ::3] + 1) % 3
    np.save(folder / "truth.npy", truth)
    np.save(folder / "low.npy", np.where(truth[::4, ::4, ::4] == 1, 9, 5).astype(np.uint8))
    np.save(folder / "slice.npy", rng.integers(0, 3, (1, 16, 16)).repeat(4, 1).repeat(4, 2).astype(np.uint8))
    study = Study.model_validate(
        {
            "name": "anode",
            "scale_factor": 4,
            "output": str(folder / "out"),
            "high_res": {
                "phases": {0: "pore", 1: "nickel", 2: "YSZ <8 %>"},
                "voxel_size": "65 nm",
                "images": [{"path": str(folder / "slice.npy")}],
            },
            "low_res": {"path": str(folder / "low.npy"), "phases": {5: ["pore", "YSZ <8 %>"], 9: "nickel"}},
            "imaging": {"operator": "under-sampled"},
            "metrics": {"subvolumes": {"count": 6, "voxels": 12, "transport_count": 1}},
            "reference": {
                "volume": str(folder / "truth.npy"),
                "published": [
                    {"metric": "tpb_normalised", "value": 0.01087, "spread": 0.00121, "source": "Dahari 2022"},
                    {"metric": "tau", "of": "nickel", "value": 3.5, "source": "someone & sons"},
                ],
            },
        }
    )
    store = LabelStore.create(
        study.labels_path,
        Layout(SHAPE, (32, 32, 32), 32),
        voxel_size=65.0,
        unit="nanometer",
        phases=study.phases,
        provenance={"weights": {"sha256": "feed" * 16}, "seed": 7},
    )
    store.write(0, Box((0, 0, 0), SHAPE), sharp)
    volume = open_volume(study.labels_path)
    with connect(threads=2) as client:
        metrics = measure_study(study, volume, client=client, progress=False, command="hpcres metrics study.yaml")
    write_json(study.metrics_path, metrics)
    both = [
        tortuosity(v, conducting=Conducting(phases=study.phases), settings=SolveSettings(directions="z"))
        for v in (volume, open_volume(study.reference.volume))
    ]
    published = [p.model_dump(mode="json") for p in study.reference.published]
    write_json(
        study.transport_path,
        {
            "schema": SCHEMA,
            "hpcres": "0",
            "command": "",
            "solver": describe(1e-3),
            "volume": both[0],
            "reference": both[1],
            "published": published,
        },
    )
    with (study.folder / "training.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "seconds", "critic_loss", "wasserstein", "voxel_loss", "fraction_pore"])
        rows.writerows([i, i * 2.0, -1 / i, 1 / i, 0.1 / i, 0.4] for i in range(1, 90))
    return study, sharp, metrics


def page_of(study: Study) -> str:
    return report_study(study, open_volume(study.labels_path)).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


def pictures(page: str) -> dict[str, np.ndarray]:
    """Alternative text → RGB of every inlined PNG."""
    found = re.findall(r"<img alt='([^']+)' src='data:image/png;base64,([^']+)'>", page)
    return {alt: np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for alt, data in found}


def test_the_page_loads_nothing_and_runs_nothing(finished):
    page = page_of(finished[0])
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page
    assert all(source.startswith("data:") for source in re.findall(r"src=['\"]([^'\"]+)", page))


def test_the_page_shows_every_metric_beside_truth_images_and_published(finished):
    study, _, metrics = finished
    text = text_of(page_of(study))
    for phase, value in metrics["volume"]["volume_fraction"].items():
        reference = metrics["reference"]["volume_fraction"][phase]
        shown = "YSZ &lt;8 %&gt;" if phase.startswith("YSZ") else phase
        assert f"{shown} {value:.5f} {reference:.5f} {value - reference:+.5f} {value / reference - 1:+.1%}" in text
    normalised = metrics["volume"]["tpb"]["normalised"]
    assert f"TPB, normalised {normalised:.5f}" in text
    assert f"{metrics['images']['tpb']['normalised']:.5f}" in text
    assert "0.01087 ± 0.00121 Dahari 2022" in text
    assert f"{metrics['low_res']['agreement']:.2%}" in text
    assert "feed" * 16 in text
    assert "hpcres metrics study.yaml" in text
    assert "someone &amp; sons" in text
    assert "no number" not in text
    assert "89 generator steps" in text


def test_appearance_and_the_grid_artefact_of_the_lattice_stand_there_with_what_they_mean(finished):
    study, _, metrics = finished
    page = page_of(study)
    text = text_of(page)
    for key in ("tv1", "tv4", "area_error", "tpb_error", "fraction_error", "correlation_error"):
        errors = [metrics[of]["appearance"]["planes"]["all"]["errors"][key] for of in ("volume", "reference")]
        quarters = metrics["images"]["planes"]["all"]["quarters"][key]
        shown = [*errors, np.mean(quarters), max(quarters)]
        numbers = ["0" if v == 0 else f"{v:.5f}" if 1e-3 <= v < 10 else f"{v:.5g}" for v in shown]
        assert " ".join(numbers) in text
        grade = "good" if errors[0] <= max(quarters) else "fair" if errors[0] <= 2 * max(quarters) else "poor"
        assert f"<td class='strong {grade}'>{numbers[0]}<" in page
    assert f"Grid artefact {metrics['low_res']['grid_artefact']:.1%}" in text
    assert "Matter knows nothing of the low-res lattice" in text
    assert "the lower, the less can be told apart" in text
    assert "alt='grid artefact'" in page


def test_box_agreement_and_visible_fractions_stand_there_with_notes_where_they_are_off(finished, tmp_path):
    study, _, metrics = finished
    low_res = metrics["low_res"]
    text = text_of(page_of(study))
    assert f"Box agreement {low_res['box_agreement']:.3%} : the share of low-res voxels whose label is" in text
    for sentence in ("Visible fraction: the share of", "Inside: the share of", "Outside: the same share where"):
        assert sentence in text
    for name, shown in (("pore + YSZ <8 %>", "pore + YSZ &lt;8 %&gt;"), ("nickel", "nickel")):
        coarse, found = low_res["volume_fraction"][name], low_res["visible_fraction"][name]
        away = [low_res[kind][name] for kind in ("inside", "outside")]
        shares = ["–" if share is None else f"{share:.2%}" for share in away]
        difference = f"{found - coarse:+.2g}" if abs(found - coarse) < 1e-3 else f"{found - coarse:+.5f}"
        assert f"{shown} {coarse:.5f} {found:.5f} {difference} {' '.join(shares)}" in text

    def page_with(**changed):
        return text_of("".join(metrics_sections(metrics | {"low_res": low_res | changed}, "")))

    names = list(low_res["volume_fraction"])
    for off, warned in ((0.019, False), (0.021, True), (-0.021, True)):
        shares = {names[0]: low_res["volume_fraction"][names[0]] - off, names[1]: low_res["volume_fraction"][names[1]]}
        said = page_with(visible_fraction=shares, outside={names[0]: None, names[1]: 0.05})
        note = f"differ from the low-res volume by more than 0.02: pore + YSZ &lt;8 %&gt; {-off:+.3f}."
        assert (note in said) == warned
        assert "The share outside exceeds" not in said
        assert ("imaging operator hardly sees it" in said) == warned
    said = page_with(visible_fraction=low_res["volume_fraction"], outside={names[0]: None, names[1]: 0.0512})
    assert "The share outside exceeds 0.05: nickel 5.12%." in said
    assert "differ from the low-res volume" not in said
    # A file of an earlier version lacks these numbers.
    older = {key: value for key, value in low_res.items() if key != "box_agreement"}
    assert "Box agreement" not in text_of("".join(metrics_sections(metrics | {"low_res": older}, "")))
    printed = metrics_text(metrics)
    assert f"box agreement {low_res['box_agreement']:.4%} of them" in printed
    assert f"nickel: visible fraction {low_res['visible_fraction']['nickel']:.5f}, in the low-res volume" in printed
    assert "box agreement" not in metrics_text(metrics | {"low_res": older})


def test_every_table_has_errors_or_says_why_there_are_none(finished):
    """Of a volume of 32 × 24 × 28 cubes of one size fit: there is no fit, and the page says so."""
    study, _, metrics = finished
    text = text_of(page_of(study))
    for why in (
        "fewer than eight cubes of two sizes fit",
        "differences from it are exact too",
        "so these shares have no error",
        "Exact for this volume: every voxel is counted",
        "the solver's estimated error",
        "± standard error as a sample",
    ):
        assert why in text
    for axis in "zyx":
        chords = metrics["volume"]["statistics"]["chords"][axis]["nickel"]
        mean, error = chords["mean_length"], chords["standard_error"]
        assert 0.01 < error < 0.1 < mean
        assert f" {mean:.3f} ± {error:.3f} " in text


def test_slices_are_the_voxels_of_the_volume_and_of_the_same_region(finished):
    study, sharp, _ = finished
    shown = pictures(page_of(study))
    colours = np.array(PHASE_COLOURS[:3])
    np.testing.assert_array_equal(shown["super-resolved, yx plane"], colours[sharp[16]])
    np.testing.assert_array_equal(shown["super-resolved, zx plane"], colours[sharp[:, 12]])
    np.testing.assert_array_equal(shown["super-resolved, zy plane"], colours[sharp[:, :, 14]])
    truth = np.load(study.reference.volume)
    np.testing.assert_array_equal(shown["ground truth, zx plane"], colours[truth[:, 12]])
    low = shown["low-res input, zy plane"]
    assert low.shape == (8, 6, 3)
    nickel = (low == colours[1]).all(-1)
    np.testing.assert_array_equal(nickel, truth[::4, ::4, 12] == 1)


def test_large_volumes_show_their_middle_from_a_whole_coarse_voxel_on(finished, monkeypatch):
    from hpcres.reports import slices as module

    monkeypatch.setattr(module, "_SLICE_VOXELS", 20)
    study, sharp, _ = finished
    shown = pictures(page_of(study))
    # From a whole coarse voxel on: (32 − 20) // 2 = 6 → 4, (28 − 20) // 2 = 4.
    colours = np.array(PHASE_COLOURS[:3])
    np.testing.assert_array_equal(shown["super-resolved, zx plane"], colours[sharp[4:24, 12, 4:24]])
    assert shown["low-res input, zx plane"].shape == (5, 5, 3)


def test_the_verdict_names_the_worst_phase(finished):
    study, _, metrics = finished
    errors = {
        phase: value - metrics["reference"]["volume_fraction"][phase]
        for phase, value in metrics["volume"]["volume_fraction"].items()
    }
    worst = max(errors, key=lambda phase: abs(errors[phase]))
    card = re.search(r'<div class="card (\w+)"><div class="title">Phase fractions.*?"value">([^<]+)', page_of(study))
    assert card
    assert card.group(2) == f"{100 * errors[worst]:+.2f} points"
    assert card.group(1) == ("good" if abs(errors[worst]) <= 0.01 else "fair" if abs(errors[worst]) <= 0.02 else "poor")


def test_what_is_missing_is_said_with_the_command_that_makes_it(finished, tmp_path):
    study, _, _ = finished
    bare = study.model_copy(update={"output": str(tmp_path)})
    page = text_of(report_study(bare, open_volume(study.labels_path)).read_text(encoding="utf-8"))
    for file, command in (
        ("metrics.json", "hpcres metrics"),
        ("transport.json", "hpcres tortuosity"),
        ("training.csv", "hpcres train"),
    ):
        assert f"No {file} yet: run {command} , then" in page


def test_metrics_of_another_volume_are_called_stale(finished, tmp_path):
    study, _, metrics = finished
    other = study.model_copy(update={"output": str(tmp_path)})
    write_json(other.metrics_path, {**metrics, "volume": {**metrics["volume"], "provenance": {"seed": 8}}})
    page = report_study(other, open_volume(study.labels_path)).read_text(encoding="utf-8")
    assert "metrics.json belongs to another" in page
    assert "metrics.json belongs to another" not in page_of(study)


def test_broken_json_is_named(finished, tmp_path):
    study, _, _ = finished
    other = study.model_copy(update={"output": str(tmp_path)})
    Path(other.metrics_path).write_text('{"schema": ')
    with pytest.raises(InputError, match=r"metrics\.json: not valid JSON"):
        report_study(other, open_volume(study.labels_path))
    assert not other.report_path.exists()


def test_the_figures_of_the_page_are_svg(finished):
    found = re.findall(r"src='data:image/svg\+xml;base64,([^']+)'", page_of(finished[0]))
    assert len(found) >= 6
    for data in found:
        assert ElementTree.fromstring(base64.b64decode(data, validate=True)).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_template_escapes_what_it_is_given_and_needs_all_of_it():
    page = render("provenance", facts={"<b>": "'a' & b", "empty": ""})
    assert "<th>&lt;b&gt;</th><td>&#39;a&#39; &amp; b</td>" in page
    assert "empty" not in page
    with pytest.raises(UndefinedError, match="'facts' is undefined"):
        render("provenance")


def test_the_same_numbers_give_the_same_page(finished):
    study = finished[0]
    assert page_of(study) == page_of(study)


def test_a_bare_volume_has_a_page(tmp_path):
    labels = np.array([0, 85, 170], np.uint8)[np.random.default_rng(0).integers(0, 3, (20, 22, 24))]
    np.save(tmp_path / "v.npy", labels)
    volume = open_volume(tmp_path / "v.npy")
    with connect(threads=2) as client:
        measured = measure(volume, Work(client, progress=False), sampling=Sampling(SubVolumes(count=4, voxels=8)))
    path = report_volume(volume, {**header(), "volume": measured}, tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    shown = pictures(page)["v.npy, yx plane"]
    np.testing.assert_array_equal(shown, np.array(PHASE_COLOURS[:3])[labels[10] // 85])
    assert "ground truth" not in page
    assert f"{np.mean(labels == 85):.5f}" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "v.npy"]


def test_a_bare_volume_shows_all_that_metrics_shows_and_takes_what_was_measured(hpcres, tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (48, 52, 50)).astype(np.uint8)
    np.save(tmp_path / "v.npy", labels)
    report = ("report", "v.npy", "--output", "out/page.html")

    def page() -> tuple[str, str]:
        done = hpcres(*report, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return text_of((tmp_path / "out/page.html").read_text(encoding="utf-8")), done.stderr

    measured, said = page()
    for part in ("Two-point correlations", "Chord lengths", "Radial spectrum", "Connected share", "± standard error"):
        assert part in measured
    assert "No transport.json yet: run hpcres tortuosity v.npy --output out/transport.json , then" in measured
    assert "from out" not in said
    # Numbers that no measurement gives, so that one sees where they are from.
    with connect(threads=2) as client:
        entry = measure(open_volume(tmp_path / "v.npy"), Work(client, progress=False))
    entry["volume_fraction"]["0"] = 0.98765
    write_json(tmp_path / "out/metrics.json", {**header("hpcres metrics v.npy"), "volume": entry})
    solution = tortuosity(
        open_volume(tmp_path / "v.npy"), conducting=Conducting(only=["0"]), settings=SolveSettings(directions="z")
    )
    solution["results"][0]["D_rel"] = 0.12345
    transport = {"schema": SCHEMA, "hpcres": "0", "command": "", "solver": describe(1e-3), "volume": solution}
    transport |= {"reference": None, "published": [], "absent_chunks": []}
    solution["digest"] = ""
    write_json(tmp_path / "out/transport.json", transport)
    taken, said = page()
    assert "0.98765" in taken
    assert "0.12345" in taken
    assert "hpcres metrics v.npy (hpcres" in taken
    assert said.splitlines() == ["metrics from out/metrics.json", "transport from out/transport.json"]
    here = tmp_path / "out"
    path = str(tmp_path / "v.npy")
    assert find_result(open_volume(path), "metrics", here / "metrics.json", False, None) is not None
    other = cubic(Length(65, "nanometer"))
    assert find_result(open_volume(path), "metrics", here / "metrics.json", False, other) is None
    np.save(path, 1 - labels)  # what lies there is older than the volume now
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)
    for stage in ("metrics", "transport"):
        assert find_result(open_volume(path), stage, here / f"{stage}.json", False, None) is None
        assert find_result(open_volume(path), stage, here / f"{stage}.json", True, None) is not None
    np.save(path, labels[1:])
    for stage, file, why in (
        ("metrics", here / "metrics.json", r"is of \[48, 52, 50\] voxels, .*v\.npy has \[47, 52, 50\]; run hpcres m"),
        ("metrics", here / "transport.json", r"transport\.json: was not written by hpcres metrics; "),
        ("transport", here / "gone.json", r"gone\.json: no such file; run hpcres tortuosity --output "),
    ):
        with pytest.raises(InputError, match=why):
            find_result(open_volume(path), stage, file, True, None)
        assert find_result(open_volume(path), stage, file, False, None) is None


def test_the_terminal_table_has_each_number_once(finished):
    _, _, metrics = finished
    table = metrics_text(metrics)
    rows = metric_rows(metrics)
    assert len({(r.metric, r.of) for r in rows}) == len(rows) == 3 + 6 + 3 + 2
    for row in rows:
        line = next(line for line in table.splitlines() if line.startswith(row.name + "  "))
        assert f"{row.value:.6f}" in line
        assert f"{row.reference:.6f}" in line
        assert f"{row.difference:+.6f}" in line
    assert "published TPB, normalised: 0.01087 ± 0.00121 (Dahari 2022)" in table
    json.dumps(metrics, allow_nan=False)
