"""How fast training is on this machine: steps per second, where a step's time goes, and one process beside two.

    python bench/training.py                  a phantom, the small network, five minutes on two cores
    python bench/training.py --device cuda --paper
    python bench/training.py --peer SuperRes --steps 1 --turns 2
    git worktree add ../before COMMIT && python bench/training.py --beside ../before --steps 60 --turns 2

With --peer, a step beside one of the published code, whose own loop runs from a checkout of it that you have:
the same widths, cubes, slices and critic steps, by turns. On a busy machine CPU seconds of one thread (--threads 1)
say more than seconds.

With --beside, a step of configs/demo.yaml, with its phantom, beside that of another checkout of this repository, by
turns, in fp32 and, where a trial finds it faster, in bf16: CPU seconds of one thread, the median of the second half of
the steps, and seconds of `hpcres train` with all cores after the first third, which needs a machine without other work.
Settings that the other checkout does not know are left out there, and are printed.

`share of peak` is the arithmetic of a step (counted by torch, double backward included) over what this device does in
a matrix product of 2048² in the same run. Each row changes one setting of the row named first. Rows take turns, and
the fastest step of all counts, so that neighbours on the machine matter little; parts are shares of one whole turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from published import published_seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hpcres.study import Study
from hpcres.study.file import load_study, recipe_settings, save_study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import Processes, processes
from hpcres.training.trial import choose_precision
from hpcres.training.wgan import Models

_FAST = recipe_settings("fast")
_OF_THE_RUN = ("minutes", "quality_steps", "keep", "warm_up_steps")
FAST = {
    "network": _FAST["network"],
    "training": {key: value for key, value in _FAST["training"].items() if key not in _OF_THE_RUN},
}
"""The recipe of a step; not how long a run is, nor steps that only its beginning has."""
CHANGES = {
    "compiled": ("training", {"compile": True}),
    "fp32, no channels_last_3d": ("training", {"precision": "fp32"}),
    "generator width 6": ("network", {"width": 6}),
    "critic width 8": ("network", {"critic_width": 8}),
    "widths 4 and 6": ("network", {"width": 4, "critic_width": 6}),
    "padding replicate": ("network", {"padding": "replicate"}),
    "last stage resize": ("network", {"last_stage": "resize"}),
    "no label patterns": ("training", {"pattern_weight": 0}),
    "context of 3": ("training", {"context": 3}),
    "all slices": ("training", {"slices_per_axis": None}),
    "a generator forward for each critic step": ("training", {"reuse_generated": False}),
    "five critic steps": ("training", {"critic_steps": 5}),
}


PEER = {
    "ours": {},
    "ours, `real_patches` and `penalties` as many as slices": {"real_patches": "slices", "penalties": "slices"},
    "ours, bf16": {"precision": "bf16"},
}
"""Settings of training beside the published code's: its three critics, and all else by default. bf16 where a trial
finds it faster."""
PEER_WIDTHS, PEER_TRAINING = (5, 7), {"planes_apart": True}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def study_of(folder: Path, settings: dict, device: str) -> Study:
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(0)
    for name, shape in (("low", (48, 48, 48)), ("high", (1, 512, 512))):
        field = gaussian_filter(random.standard_normal(shape), 2 if name == "low" else 6, mode="wrap")
        np.save(folder / f"{name}.npy", np.digitize(field, np.quantile(field, [0.35, 0.7])).astype(np.uint8))
    return Study.model_validate(
        {
            "name": "bench",
            "output": str(folder / "out"),
            "scale_factor": 4,
            "device": device,
            "high_res": {
                "phases": {0: "a", 1: "b", 2: "c"},
                "voxel_size": "1 um",
                "images": [{"path": str(folder / "high.npy")}],
            },
            "low_res": {"path": str(folder / "low.npy"), "phases": {0: "a", 1: "b", 2: "c"}},
            "imaging": {"operator": "under-sampled"},
            **settings,
        }
    )


class Arithmetic(TorchDispatchMode):
    """Counts FLOPs of convolutions and matrix products (torch's own counter refuses a gradient penalty)."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        return found


def waited(group: Processes) -> float:
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(group: Processes, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product, the best of five."""
    a = torch.ones(2048, 2048, dtype=dtype, device=group.device)
    best = 0.0
    for _ in range(5):
        start = waited(group)
        a @ a
        best = max(best, 2 * 2048**3 / (waited(group) - start))
    return best


def measure(study: Study, group: Processes, steps: int) -> dict[str, float]:
    """Seconds of a step, of the first one beyond that, shares of its parts, and its FLOPs."""
    torch.compiler.reset()  # after eight generators it would silently compile no more
    models, low_res, real = Models(study, group), LowResCubes(study), RealSlices(study, group.device)
    cubes = range(study.training.cubes)
    parts: dict[str, list[float]] = {}

    def timed(owner: object, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def measured(*args, **more):
            start = waited(group)
            found = plain(*args, **more)
            parts.setdefault(part, []).append(waited(group) - start)
            return found

        setattr(owner, name, measured)

    plain_training = study.training.model_copy(update={"compile": False})
    with Arithmetic() as counter:  # of a generator that is not compiled: one that ran in here would never be
        Models(study.model_copy(update={"training": plain_training}), group).step(0, cubes, low_res, real, 1e-4)
    start = waited(group)
    models.step(0, cubes, low_res, real, 1e-4)
    first = waited(group) - start
    timed(low_res, "draw", "samples")
    timed(real, "draw", "samples")
    timed(models, "generate", "generator forward")
    timed(models.critics, "forward", "critic forward and penalty")
    timed(models.critics, "score", "critic on the generator's slices")
    for optimizer in (models.generator_optimizer, models.critic_optimizer):
        timed(optimizer, "step", "Adam")
    plain_backward = torch.Tensor.backward
    timed(torch.Tensor, "backward", "backward of both")
    seconds = []
    try:
        for step in range(1, steps + 1):
            start = waited(group)
            models.step(step, cubes, low_res, real, 1e-4)
            seconds.append(waited(group) - start)
    finally:
        torch.Tensor.backward = plain_backward
    shares = {part: sum(values) / sum(seconds) for part, values in parts.items()}
    return {"seconds": min(seconds), "first": first - min(seconds), "flops": counter.flops, **shares}


def processes_rate(study: Study, count: int) -> float:
    """Steps per second of `hpcres train` under torchrun, from its own rows after the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    command += ["hpcres", "train", str(save_study(study, "bench")), "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [line.split(",") for line in (study.folder / "training.csv").read_text().splitlines()[1:]]
    first, last = rows[0], rows[-1]
    return (int(last[0]) - int(first[0])) / (float(last[1]) - float(first[1]))


def step_seconds(study: Study, group: Processes, steps: int) -> np.ndarray:
    """(steps, 2): seconds, and CPU seconds of all threads, of each of some steps, after one that is not timed."""
    models, low_res, real = Models(study, group), LowResCubes(study), RealSlices(study, group.device)
    marks = []
    for step in range(steps + 1):
        models.step(step, range(study.training.cubes), low_res, real, 1e-4)
        marks.append((waited(group), time.process_time()))
    return np.diff(marks, axis=0)


def beside_the_published(checkout: Path, folder: Path, group: Processes, steps: int, turns: int) -> None:
    """A Markdown table of seconds of a generator step with its five critic steps."""
    found: dict[str, list[np.ndarray]] = {}
    network = dict(zip(("width", "critic_width"), PEER_WIDTHS, strict=True))
    fastest, _ = choose_precision(study_of(folder, {"network": network}, group.device.type), group)
    for turn in range(turns):
        place = folder / f"published-{turn}"
        place.mkdir()
        study = study_of(folder, {"network": network}, group.device.type)
        seconds = published_seconds(
            checkout, place, Path(study.low_res.paths[0]), Path(study.high_res.images[0].path), PEER_WIDTHS, steps
        )
        found.setdefault("published", []).extend(seconds)
        print(f"turn {turn + 1}: published {seconds.round(2).tolist()}", file=sys.stderr, flush=True)
        for row, training in PEER.items():
            if training.get("precision", fastest) != fastest:
                continue
            study = study_of(folder, {"network": network, "training": {**PEER_TRAINING, **training}}, group.device.type)
            seconds = step_seconds(study, group, steps)
            found.setdefault(row, []).extend(seconds)
            print(f"turn {turn + 1}: {row} {seconds.round(2).tolist()}", file=sys.stderr, flush=True)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    print(
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}{f', oneDNN held to {isa}' if isa else ''}, "
        f"{group.device.type}, {torch.get_num_threads()} threads, {turns} turns of {steps} steps\n"
    )
    with Arithmetic() as counter:  # counted in a step that is not timed
        step_seconds(study_of(folder, {"network": network, "training": PEER_TRAINING}, group.device.type), group, 0)
    limits = {kind: counter.flops / peak(group, dtype) for kind, dtype in PRECISIONS.items()}
    print(
        f"{counter.flops / 1e9:.0f} GFLOP a step, which at the speed of a matrix product of 2048² take "
        + ", ".join(f"{limit:.1f} s in {kind}" for kind, limit in limits.items())
        + "\n"
    )
    print("| fastest step | seconds | of the published | CPU seconds | of the published |\n|---|---|---|---|---|")
    fastest_of = {row: np.min(seconds, axis=0) for row, seconds in found.items()}
    for row, seconds in fastest_of.items():
        shares = seconds / fastest_of["published"]
        print(f"| {row} | {seconds[0]:.1f} | {shares[0]:.2f} | {seconds[1]:.1f} | {shares[1]:.2f} |")


READ = """
import json, sys, time
from pydantic import ValidationError
from hpcres.study import Study
with open(sys.argv[1]) as file:
    content = json.load(file)
try:
    study = Study.model_validate(content)
except ValidationError as found:
    for error in found.errors():
        if error["type"] != "extra_forbidden":
            raise
        *sections, key = error["loc"]
        section = content
        for name in sections:
            section = section[name]
        print("left out:", ".".join(error["loc"]), section.pop(key), file=sys.stderr)
    study = Study.model_validate(content)
"""
PROCESSOR_SECONDS = (
    READ
    + """
from hpcres.training.distributed import processes
try:
    from hpcres.training.data.cubes import LowResCubes
    from hpcres.training.data.slices import RealSlices
    from hpcres.training.wgan import Models
except ImportError:  # a checkout from before December 2026
    from hpcres.training.adversarial import Models
    from hpcres.training.samples import LowResCubes, RealSlices
with processes(study.device, 1) as group:
    models, low_res, real = Models(study, group), LowResCubes(study), RealSlices(study, group.device)
    seconds = []
    for step in range(int(sys.argv[2])):
        began = time.process_time()
        models.step(step, range(study.training.cubes), low_res, real, study.training.learning_rate)
        seconds.append(time.process_time() - began)
last = sorted(seconds[len(seconds) // 2 :])
print(last[len(last) // 2])
"""
)
COMMAND_SECONDS = (
    READ
    + """
import csv, os, subprocess
content["training"].update(steps=int(sys.argv[2]), report_seconds=3, least_steps=1)
known = set(type(study.training).model_fields)
content["training"] = {key: value for key, value in content["training"].items() if key in known}
content["training"].pop("quality_steps", None), content["training"].pop("keep", None)
with open(sys.argv[1], "w") as file:
    json.dump(content, file)
done = subprocess.run([sys.executable, "-m", "hpcres", "train", sys.argv[1], "--overwrite"],
                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
if done.returncode:
    sys.exit(done.stderr)
with open(os.path.join(content["output"], "training.csv")) as file:
    rows = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
(first, began), (last, ended) = rows[len(rows) // 3], rows[-1]
print((ended - began) / (last - first))
"""
)


def beside_another(checkout: Path, folder: Path, group: Processes, steps: int, turns: int) -> None:
    """Two Markdown tables of a step by the code of `checkout` and by this one, on the phantom of configs/demo.yaml: CPU
    seconds of one thread, and seconds of `hpcres train` with the threads that it takes by itself."""
    demo = Path(__file__).resolve().parent.parent / "configs/demo.yaml"
    subprocess.run(
        [sys.executable, "-m", "hpcres", "phantom", str(demo), f"--output={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    study = load_study(demo, ["training.minutes=null", "training.warm_up_steps=10", "device=cpu"], str(folder))
    fastest, _ = choose_precision(study, group)
    print(f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {turns} turns of {steps} steps")
    for head, program, variables in (
        ("CPU seconds of a step", PROCESSOR_SECONDS, {"OMP_NUM_THREADS": "1"}),
        ("seconds of a step by the command", COMMAND_SECONDS, {}),
    ):
        print(f"\n| {head} | before | after | ratio of the medians |\n|---|---|---|---|")
        for precision in dict.fromkeys(("fp32", fastest)):
            content = study.model_dump(mode="json", exclude_unset=True)
            content["training"]["precision"] = precision
            found: dict[Path, list[float]] = {checkout: [], Path(__file__).resolve().parent.parent: []}
            for _ in range(turns):
                for package, seconds in found.items():
                    file = folder / "study.json"
                    output = str(folder / ("before" if package == checkout else "after"))
                    file.write_text(json.dumps(content | {"output": output}))
                    done = subprocess.run(
                        [sys.executable, "-c", program, str(file), str(steps)],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                        cwd=package,
                        env=os.environ | {"PYTHONPATH": str(package)} | variables,
                    )
                    seconds.append(float(done.stdout))
            shown = [", ".join(f"{one:.3f}" for one in seconds) for seconds in found.values()]
            before, after = (float(np.median(seconds)) for seconds in found.values())
            print(f"| {precision} | {shown[0]} | {shown[1]} | {before / after:.2f} |", flush=True)


def processor() -> str:
    """Its name, and whether it has AMX, in which bf16 is many times as fast."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in lines.items()}
    return said.get("model name", platform.processor()) + ", AMX" * ("amx_bf16" in said.get("flags", "").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--paper", action="store_true", help="the paper's networks and recipe, too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, help="all cores by default")
    parser.add_argument("--peer", type=Path, help="checkout of https://github.com/amirDahari1/SuperRes")
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    options = parser.parse_args()
    if options.peer is not None and torch.cuda.is_available() != (options.device == "cuda"):
        parser.error("--peer: the published code computes on the GPU if there is one; use the same --device")
    with tempfile.TemporaryDirectory() as name, processes(options.device, options.threads) as group:
        folder = Path(name)
        if options.peer is not None:
            beside_the_published(options.peer.resolve(), folder, group, options.steps, options.turns)
            return
        if options.beside is not None:
            beside_another(options.beside.resolve(), folder, group, options.steps, options.turns)
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # an earlier run's would hide what it costs
        precision, bf16_speed = choose_precision(study_of(folder, FAST, options.device), group)
        print(f"precision auto is {precision}: bf16 had {bf16_speed:.2f} times the speed of fp32 in the trial")
        fast = {**FAST, "training": {**FAST["training"], "precision": precision}}
        rows = {f"configs/fast.yaml, {precision}": fast}
        for change, (section, values) in CHANGES.items():
            if values != {"precision": precision}:
                rows[change] = {**fast, section: {**fast[section], **values}}
        if options.paper:
            rows["the paper's, fp32"] = {}
            rows["the paper's, bf16"] = {"training": {"precision": "bf16"}}
        tops = {kind: peak(group, dtype) for kind, dtype in PRECISIONS.items()}
        print(
            f"{group.device.type}, {torch.get_num_threads()} threads; matrix product: "
            + ", ".join(f"{kind} {top / 1e9:.0f} GFLOP/s" for kind, top in tops.items())
        )
        best: dict[str, dict[str, float]] = {}
        compiling = 0.0
        for _ in range(options.turns):
            for row, settings in rows.items():
                found = measure(study_of(folder, settings, options.device), group, options.steps)
                first = found.pop("first")
                if row == "compiled":
                    compiling = max(compiling, first)
                if row not in best or found["seconds"] < best[row]["seconds"]:
                    best[row] = found
        for row, found in best.items():
            seconds, flops = found.pop("seconds"), found.pop("flops")
            share = flops / seconds / max(tops.values())
            print(
                f"{row:44} {1 / seconds:6.2f} steps/s  {flops / 1e9:7.1f} GFLOP  {share:5.1%} of peak  "
                + ", ".join(f"{part} {value:.0%}" for part, value in found.items())
            )
        print(f"compiling takes {compiling:.0f} s once")
        more = {"steps": 60, "report_seconds": 0.5, "recalibration_cubes": 2, "threads": 1}
        study = study_of(folder, {**fast, "training": {**fast["training"], **more}}, options.device)
        rates = {count: processes_rate(study, count) for count in (1, options.processes)}
        print(", ".join(f"{count} processes of one thread: {rate:.2f} steps/s" for count, rate in rates.items()))


if __name__ == "__main__":
    main()
