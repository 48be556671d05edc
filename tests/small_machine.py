"""All stages in a process whose environment may hold the CPU to AVX2: `python small_machine.py FOLDER OUTPUT`.

FOLDER holds a folder per study. Inference, metrics and transport of each are written to OUTPUT; a study without a
checkpoint is trained first. The last line printed is a JSON object: the results of `machine` and `prepared`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from fractions import Fraction
from pathlib import Path

AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's convolutions
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # torch's matrix products
    "OPENBLAS_CORETYPE": "Haswell",  # those of numpy and scipy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",  # otherwise numba adds the features of this CPU
}
"""The environment in which all libraries use AVX2 only, also on a CPU with AVX-512."""


def machine() -> dict[str, object]:
    """The CPU capability that each library uses."""
    import numpy as np
    import torch
    from numba.core.registry import cpu_target

    from hpcres.compiled import register_floats
    from hpcres.simd.registers import WIDEST, width_of

    numpy_has = np._core._multiarray_umath.__cpu_features__
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "numpy": any(numpy_has.get(one) for one in ("X86_V4", "AVX512_SKX")),
        "numba": name,
        "numba_has_avx512": "+avx512f" in features,
        "register_floats": register_floats(),
        "widest": width_of(WIDEST),
    }


def prepared() -> str:
    """SHA-256 of weights that are computed before a network runs: of smooth noise, of interpolation, of a layer."""
    import numpy as np

    from hpcres.engines import winograd
    from hpcres.networks.stages import Stage
    from hpcres.noise import gaussian_taps

    digest = hashlib.sha256()
    for d in (8, 16, 24, 33, 40, 64):
        scale = Fraction(64, d)
        digest.update(winograd.axis_of("resized", scale, "replicate", 0, 640 * 64 // d, 640).table.tobytes())
        for sigma in range(1, 60):
            digest.update(gaussian_taps(sigma / 7, scale).tobytes())
    weight = np.random.default_rng(0).standard_normal((64, 64, 3, 3, 3))
    layer = winograd._layer_of(Stage("", "convolution", 64, 64, weight=weight, bias=np.zeros(64)))
    digest.update(layer.weights.tobytes())
    return digest.hexdigest()


def main(folder: Path, output: Path) -> None:
    from hpcres.cli import commands

    for study in sorted(folder.glob("*/study.yaml")):
        into = output / study.parent.name
        checkpoint = study.parent / "out" / "checkpoint.pt"
        if not checkpoint.exists():
            commands(["train", str(study), "--output", str(into)], standalone_mode=False)
            checkpoint = into / "checkpoint.pt"
        paint = ["infer", str(study), "--output", str(into), "--checkpoint", str(checkpoint)]
        commands(paint, standalone_mode=False)
        for command, file in (("metrics", "metrics.json"), ("tortuosity", "transport.json")):
            commands([command, str(into / "labels.zarr"), "--output", str(into / file)], standalone_mode=False)
    print(json.dumps({"machine": machine(), "prepared": prepared()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
