"""Section `cluster`: what is asked of Slurm."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcres.study.values import Section


class Cluster(Section):
    """Resources to ask Slurm for; `hpcres plan` turns them into the sbatch lines."""

    partition: str | None = None
    train_nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    infer_nodes: Annotated[int, Field(ge=1)] = 1
    ranks_per_node: Annotated[int, Field(ge=1)] = 2
    cores_per_rank: Annotated[int, Field(ge=1)] = 1
    train_hours: Annotated[float, Field(gt=0)] = 12.0
