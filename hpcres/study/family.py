"""Settings that the sections `network` and `training` of every family of generators have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hpcres.geometry import REPLICATE, Boundaries
from hpcres.study.values import Section

if TYPE_CHECKING:
    from hpcres.study import Study


class NetworkSettings(Section):
    """Settings that the section `network` of every family has."""

    family: str

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return frozenset()


class TrainingSettings(Section):
    """Settings that the section `training` of every family has."""

    init_from: str | None = None
    """Another training's checkpoint.pt or best.pt whose weights a new run begins from; none by default, as published.
    Scale factor, widths and noise must be the same; phases may be others."""
    steps: Annotated[int, Field(ge=1)] = 100_000
    """Generator steps."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget; the learning-rate schedule runs on it where it is given."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    final_learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the learning rate left at the end; the decay is linear over the last half."""
    quality_steps: Annotated[int, Field(ge=1)] | None = None
    """Generator steps between two judgements by what a user has (docs/training.md); none by default, as published."""
    keep: Literal["last", "best"] = "last"
    """Whose weights a finished run leaves in checkpoint.pt: the last, or those with the best score."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    report_seconds: Annotated[float, Field(gt=0)] = 10.0
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per process; by default the cores divided by the processes on this node, or fewer while other work
    uses the cores. Another number of threads changes the rounding of the losses."""

    @model_validator(mode="after")
    def _best_is_judged(self) -> TrainingSettings:
        if self.keep == "best" and self.quality_steps is None:
            raise ValueError("keep: best, but nothing is judged; set quality_steps")
        return self

    @property
    def boundaries(self) -> Boundaries:
        """Boundaries that suit a network trained with these settings, for what lies beyond the faces of a volume."""
        return REPLICATE

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return frozenset(
            ("steps", "minutes", "threads", "report_seconds", "checkpoint_minutes", "quality_steps", "keep")
        ) | {"init_from"}

    def refuse_misfit(self, study: Study) -> None:
        """Raise ValueError if these settings do not fit the rest of the study."""
