"""Probabilities as the low-res volume: read, trained on, painted from and compared, as labels where 0 and 1."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import tifffile
import torch
import yaml
import zarr
from click.testing import CliRunner
from small_painting import LABELS, command, make_study, mpirun, store_bytes
from small_training import ALONE, blobs, history, same, study_of, weights
from test_metrics import small_study
from test_resume import EVERY_STEP
from test_unknown import DAMAGED, damaged_study

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.cli import commands
from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import audit, repair_job
from hpcres.metrics.agreement import agreement
from hpcres.metrics.schedule import connect
from hpcres.noise import normals
from hpcres.study.file import load_study, save_study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.loop import train
from hpcres.training.losses import voxel_loss
from hpcres.training.wgan import Models
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import open_low_res, probabilities
from hpcres.volumes.stores import LabelStore

NAMES = tuple(LABELS.values())


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def soft(shape, channels=3, seed=0, unknown=0.1):
    """Random probabilities (channel, z, y, x), float64, of which some voxels are 0 in all channels."""
    rng = np.random.default_rng(seed)
    given = rng.dirichlet([0.4] * channels, shape)
    given[rng.random(shape) < unknown] = 0
    return np.moveaxis(given, -1, 0)


def channels_of(folder, given, names=NAMES):
    """`given` (channel, z, y, x) as files, and low_res of a study that names them."""
    for name, values in zip(names, given, strict=True):
        np.save(folder / f"{'+'.join(np.atleast_1d(name))}.npy", values)
    return {"channels": [{"path": f"{'+'.join(np.atleast_1d(n))}.npy", "phases": n} for n in names]}


def soft_study(path, given):
    """A study beside one of small_painting that paints from `given`, with the other's weights."""
    content = yaml.safe_load(path.read_text())
    content |= {"low_res": channels_of(path.parent, given), "output": "soft"}
    ours = path.with_name("soft.yaml")
    ours.write_text(yaml.safe_dump(content))
    generator = load_checkpoint(path.parent / "out" / "checkpoint.pt").generator
    study = load_study(ours)
    save_checkpoint(study.checkpoint_path, generator=generator, study=study, step=1)
    return ours


def painted(path, output, **options):
    checkpoint = str(load_study(path).checkpoint_path)
    store = infer(
        open_job(load_study(path, output=str(output)), JobOptions(checkpoint=checkpoint, **options)), Ranks()
    ).store
    opened = LabelStore.open(store)
    return store, opened.read(0, Box.whole(opened.levels[0].shape))


# ---- reading ----


def test_every_format_and_scale_gives_the_same_probabilities(tmp_path):
    given = soft((6, 5, 7), 5)
    rounded = np.rint(given * 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", given[0].astype(np.float32), compression="zlib")
    np.save(tmp_path / "b.npy", given[1])
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["p"] = np.rint(given[2] * 65535).astype(np.uint16)
    zarr.save_array(str(tmp_path / "d.zarr"), given[3].astype(np.float32))
    given[4].astype(">f8").tofile(tmp_path / "e.raw")
    raw = {"shape": [6, 5, 7], "dtype": "float64", "byte_order": "big"}
    channels = [
        {"path": str(tmp_path / name), "phases": phase}
        for name, phase in zip(("a.tif", "b.npy", "c.h5:/p", "d.zarr", "e.raw"), "abcde", strict=True)
    ]
    channels[4]["raw"] = raw
    study = study_of(
        tmp_path,
        low_res={"channels": channels},
        high_res={"phases": dict(enumerate("abcde")), "images": [{"path": "x.npy"}]},
    )
    volume, box = open_low_res(study.low_res), Box((1, 0, 2), (5, 4, 7))
    whole = volume.read(Box.whole(volume.shape))
    known = given.sum(0) > 0
    assert whole.dtype == np.float32
    assert np.abs(np.moveaxis(whole, 3, 0) - given).max() < 1e-5
    np.testing.assert_allclose(whole.sum(3), known, atol=2e-7)
    np.testing.assert_array_equal(volume.read(box), whole[box.slices])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume)).read(box), whole[box.slices])
    for channel, values in enumerate(rounded):
        np.save(tmp_path / f"{channel}.npy", values)
    rough = probabilities([open_volume(tmp_path / f"{channel}.npy") for channel in range(5)])
    coarse = rough.read(Box.whole(rough.shape))
    assert 1e-4 < np.abs(coarse - whole).max() < 5 * 0.5 / 255
    np.testing.assert_allclose(coarse.sum(3), known, atol=2e-7)
    stamp = volume.stamp()
    np.save(tmp_path / "b.npy", given[1])
    assert volume.stamp() != stamp


def change(place, value):
    def spoil(given):
        given[place] = value
        return given

    return spoil


BAD = {
    "NaN": (change((1, 2, 3, 4), np.nan), r"nickel.npy: nan at voxel z 2, y 3, x 4 is no probability"),
    "negative": (change((0, 0, 0), -0.1), r"pore.npy: -0.1 at voxel z 0, y 0, x 0 \(and 6 more near it\) is no prob"),
    "infinite": (change((2, 1, 1, 1), np.inf), r"at voxel z 1, y 1, x 1 add up to inf, not 1; give each phase its"),
    "sum": (change((0, 5, 4, 6), 0.5), r"pore.npy, .*ceramic.npy: probabilities at voxel z 5, y 4, x 6 add up to 1.5,"),
    "per cent": (lambda given: given * 100, "add up to 100, not 1"),
    "one channel forgotten": (change(2, 0), "add up to 0.6, not 1; give each phase its channel"),
    "bits": (lambda given: given > 0.5, "add up to 0.003922, not 1"),
    "wide integers": (lambda given: given.astype(np.int32), "pore.npy: holds int32, which is no probability; save"),
    "halves": (lambda given: given * 0.5, "add up to 0.5, not 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_probability_is_refused_with_its_place(tmp_path, what):
    given = np.zeros((3, 6, 5, 7))
    given[1], given[2] = 0.6, 0.4
    given[:, 5, 4, 6] = 0, 1, 0
    spoil, words = BAD[what]
    channels_of(tmp_path, spoil(given))
    with pytest.raises(InputError, match=words):
        probabilities([open_volume(tmp_path / f"{n}.npy", grey=True) for n in NAMES]).read(Box.whole((6, 5, 7)))


def test_rounding_of_probabilities_is_no_fault(tmp_path):
    given = np.zeros((3, 2, 2, 2), np.float32)
    given[0], given[1] = 1.015, -1e-8  # as an interpolation might leave them
    channels_of(tmp_path, given)
    seen = probabilities([open_volume(tmp_path / f"{n}.npy", grey=True) for n in NAMES]).read(Box.whole((2, 2, 2)))
    assert (seen == [1, 0, 0]).all()
    flat = [np.full((2, 2, 2), round(255 / 16), np.uint8)] * 16  # 16 · 16 = 256
    for channel, values in enumerate(flat):
        np.save(tmp_path / f"{channel}.npy", values)
    seen = probabilities([open_volume(tmp_path / f"{c}.npy") for c in range(16)]).read(Box.whole((2, 2, 2)))
    assert (seen == 1 / 16).all()


def test_a_study_holds_labels_or_probabilities(tmp_path):
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    ours = load_study(soft_study(path, soft((9, 8, 7))))
    assert ours.low_res.holds == "probabilities"
    assert ours.low_res.groups == tuple((name,) for name in NAMES)
    assert load_study(save_study(ours, "train")) == ours
    over = path.with_name("over.yaml")  # the one form takes the other's place, in either direction
    over.write_text(yaml.safe_dump({"base": "study.yaml", "low_res": channels_of(path.parent, soft((9, 8, 7)))}))
    assert load_study(over).low_res == ours.low_res
    over.write_text(yaml.safe_dump({"base": "soft.yaml", "low_res": {"path": "low.npy", "phases": LABELS}}))
    assert load_study(over).low_res == load_study(path).low_res


# ---- painting ----


@pytest.mark.parametrize("dtype", ["f4", "u1", "u2"])
def test_ones_and_zeros_paint_what_labels_paint(tmp_path, dtype):
    path = damaged_study(tmp_path / "s", (9, 8, 9))
    low = np.load(path.parent / "low.npy")
    one = {"f4": 1, "u1": 255, "u2": 65535}[dtype]
    given = [(low == label).astype(dtype) * np.dtype(dtype).type(one) for label in LABELS]
    assert (sum(given) == 0).sum() == (low == DAMAGED).sum() > 0
    _, labels = painted(path, tmp_path / "labels")
    assert np.array_equal(painted(soft_study(path, given), tmp_path / "ones")[1], labels)


def test_tiles_ranks_and_the_network_itself_agree_on_probabilities(tmp_path):
    shape = (9, 8, 9)
    path = make_study(tmp_path / "s", "4", shape)
    ours = soft_study(path, soft(shape))
    study = load_study(ours)
    _, labels = painted(ours, tmp_path / "whole", tiles="1x1x1")
    given = np.moveaxis(open_low_res(study.low_res).read(Box.whole(shape)), 3, 0)
    seen = np.concatenate([given, normals(study.seed, Box.whole(shape))[None]]).astype(np.float32)
    with torch.inference_mode():
        logits = load_checkpoint(study.checkpoint_path).generator(torch.from_numpy(seen)[None])[0]
    best, differ = logits.sort(0).values, labels != logits.argmax(0).numpy()
    assert differ.mean() <= 1e-4
    assert not differ.any() or (best[-1] - best[-2]).numpy()[differ].max() < 1e-5 * logits.abs().max()
    tiled, again = painted(ours, tmp_path / "tiled", tiles="3x2x2")
    assert np.array_equal(again, labels)
    at = ("--output", str(tmp_path / "ranks"), "--checkpoint", str(study.checkpoint_path), "--tiles", "3x2x2")
    done = mpirun(3, *command(ours, "infer", *at))
    assert done.returncode == 0, done.stderr
    assert store_bytes(tmp_path / "ranks" / "labels.zarr") == store_bytes(tiled)
    # A probability says more than its label: the likeliest label paints something else.
    likeliest = [(given.argmax(0) == channel) * (given.sum(0) > 0.5) * 1.0 for channel in range(3)]
    assert (painted(soft_study(path, likeliest), tmp_path / "hard")[1] != labels).mean() > 1e-3


def test_periodic_probabilities_have_no_face(tmp_path):
    shape = (6, 4, 4)
    path = make_study(tmp_path / "s", "4", shape)
    text = path.read_text().replace("  chunk_voxels", "  boundary: {z: periodic}\n  chunk_voxels")
    path.write_text(text)
    given = soft(shape)
    _, labels = painted(soft_study(path, given), tmp_path / "whole", tiles="1x1x1")
    assert np.array_equal(painted(soft_study(path, given), tmp_path / "tiled", tiles="3x1x1")[1], labels)
    # As in the middle of the same volume three times over, but for the noise, which is silenced.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpcres.noise.normals", lambda seed, box, channel=0: np.zeros(box.shape, np.float32))
        _, alone = painted(soft_study(path, given), tmp_path / "alone")
        _, thrice = painted(soft_study(path, np.concatenate([given] * 3, 1)), tmp_path / "thrice")
    assert np.array_equal(thrice[24:48], alone)


def test_probabilities_are_part_of_the_store_and_come_back_for_its_repair(tmp_path, hpcres):
    shape = (9, 8, 7)
    path = make_study(tmp_path / "s", "4", shape)
    given = soft(shape)
    ours = soft_study(path, given)
    store, labels = painted(ours, tmp_path / "out")
    assert LabelStore.open(store).provenance["low_res"] == [str(path.parent / f"{name}.npy") for name in NAMES]
    assert infer(repair_job(store), Ranks()).painted == 0
    assert audit(repair_job(store), 2, Ranks()).flips == 0
    (store / "0/c/0/0/1").unlink()
    assert hpcres("verify", store, "--repair").returncode == 0
    assert np.array_equal(LabelStore.open(store).read(0, Box.whole(labels.shape)), labels)
    checkpoint = str(load_study(ours).checkpoint_path)
    files = [str(path.parent / f"{name}.npy") for name in NAMES]
    at = ("--checkpoint", checkpoint, "--output", tmp_path / "alone.zarr", "--seed", load_study(ours).seed)
    alone = hpcres("infer", tmp_path / "no.yaml", *at, *(word for file in files for word in ("--low-res", file)))
    assert alone.returncode == 0, alone.stderr
    assert np.array_equal(open_volume(tmp_path / "alone.zarr").read(Box.whole(labels.shape)), labels)
    with pytest.raises(InputError, match=r"on probabilities; give a file for each of 3 channels \(pore; nickel;"):
        open_job(None, JobOptions(checkpoint=checkpoint, low_res=files[:2], output=str(tmp_path / "x")))
    with pytest.raises(InputError, match="trained on labels; give one file of labels"):
        open_job(
            None,
            JobOptions(checkpoint=str(path.parent / "out/checkpoint.pt"), low_res=files, output=str(tmp_path / "x")),
        )
    given[:, 0, 0, 0] = given[::-1, 0, 0, 0] + (given[:, 0, 0, 0].sum() == 0) * np.array([1.0, 0, 0])
    channels_of(path.parent, given)
    with pytest.raises(InputError, match="was painted with input_sha256"):
        painted(ours, tmp_path / "out")
    with pytest.raises(InputError, match="was painted with input_sha256"):
        infer(repair_job(store), Ranks())


def test_labels_and_probabilities_are_different_trainings(tmp_path):
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    ours = soft_study(path, soft((9, 8, 7)))
    with pytest.raises(InputError, match="trained with a low-res volume of labels, the study has probabilities; train"):
        open_job(load_study(ours), JobOptions(checkpoint=str(path.parent / "out/checkpoint.pt")))
    with pytest.raises(InputError, match="trained with a low-res volume of probabilities, the study has labels; train"):
        open_job(load_study(path), JobOptions(checkpoint=str(path.parent / "soft/checkpoint.pt")))
    turned = ours.with_name("turned.yaml")
    content = yaml.safe_load(ours.read_text())
    content["low_res"]["channels"].reverse()
    turned.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="trained with low-res channels"):
        open_job(load_study(turned))


def test_a_bad_voxel_that_only_infer_reads_leaves_nothing(tmp_path):
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    given = soft((9, 8, 7))
    given[1, 8, 7, 6] = np.nan
    with pytest.raises(InputError, match=r"nickel\.npy: nan at voxel z 8, y 7, x 6"):
        painted(soft_study(path, given), tmp_path / "out")
    assert not (tmp_path / "out" / "labels.zarr").exists()


# ---- training ----


@pytest.mark.parametrize("scale", ["4", "8/5"])
def test_fractions_by_bins_are_means(tmp_path, scale):
    given = soft((20, 18, 17), 2, unknown=0)
    low_res = channels_of(tmp_path, given, ("a", ["b", "c"]))
    study = study_of(
        tmp_path, low_res=low_res, imaging={"box": True}, scale_factor=scale, network={"width": 3, "critic_width": 5}
    )
    operator = ImagingOperator.of(study).double()
    labels = torch.from_numpy(blobs((16, 16, 16), 4).astype(np.int64))[None]
    seen = operator(one_hot(labels, 3).double())[0].numpy()
    fine = np.asarray(labels[0] != 0, float)  # group 1
    for _ in range(3):  # each low-res voxel along one axis, by area
        edges = np.arange(int(16 / study.scale_factor) + 1) * float(study.scale_factor)
        total = np.concatenate([np.zeros((1, *fine.shape[1:])), fine.cumsum(0)])
        at = np.stack([np.interp(edges, np.arange(17), column) for column in total.reshape(17, -1).T], 1)
        fine = np.moveaxis((np.diff(at, axis=0) / float(study.scale_factor)).reshape(-1, *fine.shape[1:]), 0, 2)
    np.testing.assert_allclose(seen[1], fine, atol=1e-6)
    np.testing.assert_allclose(seen.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("imaging", [{"operator": "under-sampled"}, {}, {"box": True}], ids=["sampled", "blur", "box"])
def test_the_voxel_wise_loss_is_least_where_the_fractions_are_right(tmp_path, imaging):
    low_res = channels_of(tmp_path, soft((20, 18, 17)), "abc")
    study = study_of(tmp_path, low_res=low_res, imaging=imaging)
    operator = ImagingOperator.of(study)
    sharp = torch.rand(1, 3, 64, 64, 64, generator=torch.Generator().manual_seed(1)).softmax(1).requires_grad_()
    target = operator(sharp).detach()
    loss = voxel_loss(operator, sharp, target)
    (slope,) = torch.autograd.grad(loss, sharp)
    assert float(loss.detach()) < 1e-12
    assert float(slope.abs().max()) < 1e-9
    assert voxel_loss(operator, sharp.roll(1, 1), target).item() > 1e-4
    unknown = target.clone()
    unknown[:, :, 3:9] = 0
    other = sharp.detach().clone()
    other[:, :, 20:28] = other[:, :, 20:28].roll(1, 1)  # deep inside what is unknown
    assert float(voxel_loss(operator, other, unknown)) < 1e-12


def as_ones(folder, volume, **more):
    """study_of with its labels as probabilities of 0 and 1."""
    low_res = channels_of(folder, [(volume == label) * 1.0 for label in range(3)], "abc")
    low_res["channels"] = [{**c, "path": str(folder / c["path"])} for c in low_res["channels"]]
    return study_of(folder, volume=volume, low_res=low_res, **more)


@pytest.mark.parametrize("held", [2**29, 10])
def test_cubes_are_those_of_labels(tmp_path, monkeypatch, held):
    monkeypatch.setattr("hpcres.training.data.cubes._HELD_BYTES", held)
    volume = blobs((20, 18, 17), 1)
    labels, given = LowResCubes(study_of(tmp_path, volume=volume)).draw(3, range(4), ALONE.device, 1, 0.2)
    cubes = LowResCubes(as_ones(tmp_path, volume))
    known, same_given = cubes.draw(3, range(4), ALONE.device, 1, 0.2)
    assert torch.equal(same_given, given)
    assert torch.equal(known, one_hot(labels, 3))
    assert (cubes._held is None) == (held == 10)
    assert torch.equal(cubes.draw(3, range(4), ALONE.device, 1)[1][:, :3].sum(1), torch.ones(4, 16, 16, 16))


def test_training_from_ones_and_zeros_is_that_from_labels(tmp_path, capfd):
    """Under-sampled, where neither form is sharpened."""
    volume, training = blobs((20, 18, 17), 1), {**EVERY_STEP, "quality_steps": 2, "quality_cubes": 1}
    training |= {"steps": 2, "masked_fraction": 0.1}
    plain = study_of(tmp_path, volume=volume, training=training, output=str(tmp_path / "plain"))
    ours = as_ones(tmp_path, volume, training=training, output=str(tmp_path / "ours"))
    train(plain)
    train(ours)
    assert same(weights(plain), weights(ours))
    assert history(plain) == history(ours)
    assert history(plain, "quality.csv") == history(ours, "quality.csv")


def soft_training(folder, name, given, **training):
    low_res = channels_of(folder, given, "abc")
    low_res["channels"] = [{**c, "path": str(folder / c["path"])} for c in low_res["channels"]]
    return study_of(folder, low_res=low_res, imaging={}, training=EVERY_STEP | training, output=str(folder / name))


def test_training_on_probabilities_goes_on_bit_for_bit(tmp_path, capfd):
    given = soft((20, 18, 17))
    whole = soft_training(tmp_path, "whole", given, steps=3)
    train(whole)
    assert f"{(given.sum(0) == 0).mean():.2%} of the low-res volume is unknown" in capfd.readouterr().err
    cut = soft_training(tmp_path, "cut", given, steps=2)
    train(cut)
    assert train(soft_training(tmp_path, "cut", given, steps=3)).resumed_step == 2
    assert same(weights(whole), weights(cut))
    assert history(whole) == history(cut)
    store = LabelStore.open(infer(open_job(whole), Ranks()).store)
    assert store.levels[0].shape == (80, 72, 68)
    with pytest.raises(InputError, match="was trained with low_res"):
        train(study_of(tmp_path, imaging={}, training={"steps": 5}, output=str(tmp_path / "cut")))


def test_what_training_reports_is_of_the_likeliest_known_phases(tmp_path):
    study = soft_training(tmp_path, "out", soft((20, 18, 17)))
    low_res, models = LowResCubes(study), Models(study, ALONE)
    outcome = models.step(0, range(2), low_res, RealSlices(study, ALONE.device), 1e-4)
    seen = models.operator(one_hot(outcome.probabilities.argmax(1), 3)).argmax(1)
    known, likeliest = outcome.labels.sum(1) > 0, outcome.labels.argmax(1)
    assert 0 < known.float().mean() < 1
    told = models.report(outcome, 3)["low_res_agreement"]
    assert told == pytest.approx(float((seen == likeliest)[known].float().mean()))


def test_nothing_known_is_refused(tmp_path):
    with pytest.raises(InputError, match="every voxel is unknown"):
        LowResCubes(soft_training(tmp_path, "out", np.zeros((3, 20, 18, 17))))


# ---- comparing, and the other stages ----


def test_agreement_and_fractions_are_those_of_the_whole_volume(tmp_path, monkeypatch):
    monkeypatch.setattr("hpcres.metrics.agreement._BLOCK_HIGH_RES", 8)
    given = soft((7, 6, 5), 2)
    low_res = channels_of(tmp_path, given, (["pore", "binder"], "solid"))
    low_res["channels"] = [{**c, "path": str(tmp_path / c["path"])} for c in low_res["channels"]]
    study = small_study(tmp_path, low_res=low_res, imaging={"operator": "under-resolved"})
    sharp = np.random.default_rng(1).integers(0, 3, (14, 12, 10)).astype(np.uint8)
    np.save(tmp_path / "sharp.npy", sharp)
    operator = ImagingOperator.of(study)
    seen = operator(one_hot(torch.from_numpy(sharp.astype(np.int64))[None], 3))[0].numpy()
    with connect(threads=1) as client:
        found = agreement(
            study, open_low_res(study.low_res), open_volume(tmp_path / "sharp.npy"), client=client, progress=False
        )
    known = given.sum(0) > 0
    solid = (sharp == 1).reshape(7, 2, 6, 2, 5, 2).sum((1, 3, 5))  # of 8; at 4 both groups have the most
    assert found["box_agreement"] == np.where(given.argmax(0) == 1, solid >= 4, solid <= 4)[known].mean()
    assert found["visible_fraction"]["solid"] == pytest.approx(solid[known].mean() / 8)
    assert found["voxels_compared"] == known.sum()
    assert found["unknown"] == pytest.approx(1 - known.mean())
    assert found["agreement"] == pytest.approx((given.argmax(0) == seen.argmax(0))[known].mean())
    for channel, name in enumerate(("pore + binder", "solid")):
        assert found["volume_fraction"][name] == pytest.approx(given[channel][known].mean(), rel=1e-5)
        assert found["of_volume"][name] == pytest.approx(seen[channel][known].mean(), rel=1e-5)
        off = np.abs(given[channel] - seen[channel])[known].mean()
        assert found["fraction_difference"][name] == pytest.approx(off, rel=1e-5)


def test_a_phantom_of_probabilities_goes_through_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("hpcres.inference.plan._TRIAL_SECONDS", 0.1)
    study = {
        "name": "p",
        "scale_factor": 4,
        "output": "out",
        "device": "cpu",
        "high_res": {
            "phases": {0: "pore", 1: "solid"},
            "voxel_size": "1 um",
            "images": [{"path": "${output}/phantom/slices.tif"}],
        },
        "low_res": {
            "channels": [
                {"path": "${output}/phantom/low_res_0.tif", "phases": "pore"},
                {"path": "${output}/phantom/low_res_1.tif", "phases": "solid"},
            ]
        },
        "imaging": {"box": True},
        "network": {"width": 3, "critic_width": 5, "padding": "zeros", "last_stage": "transposed"},
        "training": {"steps": 1, "cubes": 1, "slices_per_axis": 2, "critic_steps": 1, "recalibration_cubes": 1},
        "inference": {"tiles": "1x1x1", "threads": 1},
        "metrics": {"subvolumes": {"count": 0, "voxels": 64}, "statistics": []},
        "reference": {"volume": "${output}/phantom/truth.zarr"},
        "phantom": {"kind": "chi2", "voxels": "64x64x64", "feature_voxels": 6, "slices": 1},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))

    def stage(name):
        outcome = CliRunner().invoke(commands, [name, str(path)], catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output

    stage("phantom")
    truth = open_volume(tmp_path / "out/phantom/truth.zarr").read(Box.whole((64, 64, 64)))
    means = (truth == 1).reshape(16, 4, 16, 4, 16, 4).mean((1, 3, 5))
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out/phantom/low_res_1.tif"), means, atol=1e-6)
    for name in ("train", "plan", "infer", "metrics", "report"):
        stage(name)
    assert "fraction_difference" in (tmp_path / "out/metrics.json").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert "likeliest phase" in page
    assert "Mean difference of fractions" in page
    with pytest.raises(InputError, match=r"low_res\.channels are probabilities, and a store holds labels"):
        stage("convert")
