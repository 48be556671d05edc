"""Where a super-resolved phase conducts other than the truth: in low-res voxels that show the phase, or in others.

    python bench/bridges.py truth.zarr low_res.zarr labels.zarr --phase active

truth.zarr and labels.zarr have the same shape and phases; one of the low-res volume's phases is the one asked for.
Prints D_rel along an axis of the truth, of nearest upsampling, of the volume, and of the volume with the true labels in
the low-res voxels that show the phase, and in those that do not; the mean share of the phase in the blocks of both, and
in those between two voxels of the other kind; and how these shares are distributed.
"""

from __future__ import annotations

import argparse

import numpy as np

import hpcres


def between(shown: np.ndarray, kind: bool) -> np.ndarray:
    """Low-res voxels of a kind whose two neighbours along some axis are both of the other kind."""
    found = np.zeros(shown.shape, bool)
    for axis in range(3):
        inner = [slice(None)] * 3
        inner[axis] = slice(1, -1)
        below, above = (shown.take(range(a, shown.shape[axis] - 2 + a), axis) for a in (0, 2))
        found[tuple(inner)] |= (below != kind) & (above != kind)
    return found & (shown == kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("truth", "low_res", "labels"):
        parser.add_argument(name)
    parser.add_argument("--phase", required=True)
    parser.add_argument("--direction", default="y", choices=tuple("zyx"))
    options = parser.parse_args()

    def has(path: str) -> np.ndarray:
        volume = hpcres.open(path)
        return np.asarray(volume) == volume.phases.index(options.phase)

    true, shown, painted = (has(path) for path in (options.truth, options.low_res, options.labels))
    edge = true.shape[0] // shown.shape[0]
    if any(edge * n != m for n, m in zip(shown.shape, true.shape, strict=True)):
        parser.error("the scale factor must be a whole number")
    up = shown.repeat(edge, 0).repeat(edge, 1).repeat(edge, 2)
    volumes = {
        "truth": true,
        "nearest upsampling": up,
        "volume": painted,
        "volume, true labels where the phase is shown": np.where(up, true, painted),
        "volume, true labels where it is not shown": np.where(up, painted, true),
    }
    for name, conducts in volumes.items():
        print(f"D_rel {options.direction} {hpcres.tortuosity(conducts, direction=options.direction).D_rel:.4f}  {name}")
    shape = [part for n in shown.shape for part in (n, edge)]
    shares = {"truth": true, "volume": painted}
    for kind in (True, False):
        for which, chosen in (("", shown == kind), (" between two of the other kind", between(shown, kind))):
            means = {name: one.reshape(shape).mean((1, 3, 5))[chosen] for name, one in shares.items()}
            print(f"low-res voxels that show it: {kind}{which}, {chosen.sum()}: share of the phase in their blocks")
            for name, share in means.items():
                eighths = np.histogram(share, 8, (0, 1))[0] / max(1, share.size)
                print(
                    f"  {name:6} mean {share.mean():.3f}, above one half {(share > 0.5).mean():.4f}, by eighths "
                    + " ".join(f"{part:.4f}" for part in eighths)
                )


if __name__ == "__main__":
    main()
