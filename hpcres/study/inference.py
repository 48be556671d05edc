"""Section `inference`: how the volume is painted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpcres.study.values import BoundarySetting, Grid, Section


class Inference(Section):
    """How the volume is painted: tiles, storage, boundaries, precision, and the number of seeds."""

    output_voxels: Grid | None = None
    """Shape of the output, z, y, x, where no low-res volume gives it: of a generator fed by latents alone."""
    tiles: Grid = (2, 2, 2)
    chunk_voxels: Literal[16, 32, 64, 128] | None = None
    """Inner chunk of the store; 128, or 64 where the volume is below 512³."""
    boundary: BoundarySetting | None = None
    """What lies beyond the volume, z, y, x: its outermost voxels again (`replicate`, as published), its other side
    (`periodic`) or its mirror image (`mirror`). One for all axes or as `{z: periodic}`, where the others replicate; by
    default mirror for a network trained with context, which has never seen a face, or with `atypical_images:
    correct`, whose fractions are calibrated so; else replicate."""
    codec: Literal["zstd", "lz4"] = "zstd"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Half precision is faster, above all on GPUs, and changes labels; infer says how many."""
    ensemble: Annotated[int, Field(ge=1, le=255)] = 1
    """Seeds to paint, from the study's on: labels of the first, the share of seeds that agree, and metrics of all."""
    threads: Annotated[int, Field(ge=1)] | None = None
