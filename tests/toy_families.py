"""Two families of generators that the package does not know, and the command line with both of them registered.

    python toy_families.py train study.yaml

`toy-nearest` upsamples the low-res labels to their nearest voxel and convolves once; `toy-latent` has noise alone.
"""

from __future__ import annotations

import os
import time
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from hpcres.conditions import conditions_of
from hpcres.families import Family, register
from hpcres.geometry import MIRROR, Boundaries, Box
from hpcres.networks.generator import Generator
from hpcres.networks.stages import Inputs, Stage, Stages, folded_weights
from hpcres.study import NetworkSettings, Study, TrainingSettings
from hpcres.training.journal import Shown


class NearestNetwork(NetworkSettings):
    family: Literal["toy-nearest"] = "toy-nearest"
    kernel: Annotated[int, Field(ge=1)] = 3


class LatentNetwork(NetworkSettings):
    family: Literal["toy-latent"] = "toy-latent"
    channels: Annotated[int, Field(ge=1)] = 4


class ToyTraining(TrainingSettings):
    edge: Annotated[int, Field(ge=1)] = 4
    """Low-res voxels of a cube."""


class EndlessTraining(ToyTraining):
    @property
    def boundaries(self) -> Boundaries:
        return MIRROR  # a lattice of noise has no faces


class Nearest(Generator):
    def __init__(self, conditions: int, phases: int, scale: Fraction, kernel: int) -> None:
        super().__init__()
        self.scale = scale
        self.config = {
            "family": "toy-nearest",
            "conditions": conditions,
            "phases": phases,
            "scale": str(scale),
            "kernel": kernel,
        }
        self.convolution = nn.Conv3d(conditions, phases, kernel, padding=kernel // 2, padding_mode="replicate")

    @property
    def phases(self) -> int:
        return self.convolution.out_channels

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.convolution.in_channels, ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.convolution(functional.interpolate(x, scale_factor=float(self.scale)))
        return logits

    def stages(self) -> Stages:
        weight, bias = folded_weights(self.convolution, None)
        return Stages(
            (
                Stage(
                    "only",
                    "resized",
                    self.inputs.conditions,
                    self.phases,
                    self.config["kernel"],
                    "softmax",
                    self.scale,
                    "replicate",
                    interpolation="nearest",
                    weight=weight,
                    bias=bias,
                ),
            ),
            self.scale,
        )


class Latent(Generator):
    def __init__(self, phases: int, channels: int) -> None:
        super().__init__()
        self.scale = Fraction(4)
        self.config = {"family": "toy-latent", "phases": phases, "channels": channels}
        self.first = nn.ConvTranspose3d(2, channels, 4, stride=2, padding=2)
        self.norm = nn.BatchNorm3d(channels)
        self.last = nn.ConvTranspose3d(channels, phases, 4, stride=2, padding=3)

    @property
    def phases(self) -> int:
        return self.last.out_channels

    @property
    def inputs(self) -> Inputs:
        return Inputs(0, (0.0, 6.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(functional.leaky_relu(self.norm(self.first(x)), 0.2))
        return logits

    def stages(self) -> Stages:
        layers = [folded_weights(self.first, self.norm), folded_weights(self.last, None)]
        channels, two = self.config["channels"], Fraction(2)
        return Stages(
            (
                Stage(
                    "first",
                    "transposed",
                    2,
                    channels,
                    4,
                    "leaky",
                    two,
                    crop=2,
                    slope=np.array([0.2]),
                    weight=layers[0][0],
                    bias=layers[0][1],
                ),
                Stage(
                    "last",
                    "transposed",
                    channels,
                    self.phases,
                    4,
                    "softmax",
                    two,
                    crop=3,
                    weight=layers[1][0],
                    bias=layers[1][1],
                ),
            ),
            self.scale,
        )


class ToyTrainer:
    """Learns to give each group's first phase where the low-res volume shows the group, or equal fractions."""

    losses, measures, choices, init_from = ("loss",), (), (), None
    shown = (Shown("loss", "loss", ".3g"),)

    def __init__(self, study: Any, group: Any, threads: Any, before: Any) -> None:
        self.study, self.group = study, group
        torch.manual_seed(study.seed)
        self.generator = build(study)
        self.modules = {"generator": self.generator}
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=study.training.learning_rate)
        self.conditions = None if study.low_res is None else conditions_of(study)
        self.loss = 0.0
        if before is not None:
            self.generator.load_state_dict(before.training_state["generator"])
            self.optimizer.load_state_dict(before.training_state["optimizer"])

    def notes(self):
        yield "this family is a toy"

    def _given(self, number: int) -> torch.Tensor:
        rng, edge = np.random.default_rng([self.study.seed, number]), self.study.training.edge
        if self.conditions is None:
            return torch.from_numpy(rng.standard_normal((1, 2, edge, edge, edge), np.float32))
        start = [int(rng.integers(0, n - edge, endpoint=True)) for n in self.conditions.shape]
        cube = self.conditions.read(Box(tuple(start), tuple(a + edge for a in start)))
        return torch.from_numpy(cube.transpose(3, 0, 1, 2)[None].copy())

    def step(self, number: int, rate: float) -> bool:
        if os.environ.get("TOY_SLOW"):
            time.sleep(0.05)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        given = self._given(number)
        logits = self.generator.train()(given)
        if self.conditions is None:
            loss = (functional.softmax(logits, 1).mean((0, 2, 3, 4)) - 1 / self.generator.phases).square().sum()
        else:
            phases, groups = list(self.study.phases), self.study.low_res.groups
            first = torch.tensor([phases.index(group[0]) for group in groups])
            wanted = first[functional.interpolate(given, scale_factor=float(self.generator.scale)).argmax(1)]
            loss = functional.cross_entropy(logits, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())
        return bool(np.isfinite(self.loss))

    def report(self) -> dict[str, float]:
        return {"loss": float(self.group.mean(torch.tensor(self.loss)))}

    def to_save(self) -> Generator:
        return self.generator.eval()

    def quality_columns(self):
        return ["score"]

    def evaluate(self):
        return self.to_save(), {"score": self.loss}, np.zeros((8, 8), np.uint8)

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def closing(self, steps: int, best: Any):
        yield f"the toy is done after {steps} steps"


def build(study: Study) -> Generator:
    net: Any = study.network
    if net.family == "toy-latent":
        return Latent(len(study.phases), net.channels)
    return Nearest(len(study.low_res.groups), len(study.phases), study.scale_factor, net.kernel)


def register_both() -> None:
    register(
        Family(
            "toy-nearest",
            NearestNetwork,
            ToyTraining,
            build,
            lambda config: Nearest(**{**config, "scale": Fraction(config["scale"])}),
            ToyTrainer,
            needs_images=False,
        )
    )
    register(
        Family(
            "toy-latent",
            LatentNetwork,
            EndlessTraining,
            build,
            lambda config: Latent(**config),
            ToyTrainer,
            needs_low_res=False,
            needs_images=False,
        )
    )


if __name__ == "__main__":
    from hpcres.cli import main
    from hpcres.inference.generate import Painter

    register_both()
    if os.environ.get("TOY_SLOW"):  # so that a test can end the job in its middle
        plain = Painter.paint

        def paint(self, *given, **more):
            time.sleep(0.2)
            return plain(self, *given, **more)

        Painter.paint = paint
    main()
