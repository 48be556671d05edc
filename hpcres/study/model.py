"""The study as a whole, where its results go, and the model of it that a family of generators selects."""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from hpcres.families import Family, family_of
from hpcres.lengths import Length
from hpcres.old_names import rename_old_settings
from hpcres.study.cluster import Cluster
from hpcres.study.images import HighRes, HighResImage, Imaging, LowRes
from hpcres.study.inference import Inference
from hpcres.study.metrics import Metrics, Reference
from hpcres.study.phantom import Phantom
from hpcres.study.superres import Network, Training
from hpcres.study.values import Device, ScaleFactor, Section


class Study(Section):
    """A study of the family superres.

    `study_model` gives the model of another family. It is this one with other sections `network` and `training`. If the
    family needs no low-res volume, `low_res` may be None. If it needs no images, there may be none.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    output: str = "results"
    """Folder for everything the stages write."""
    scale_factor: ScaleFactor
    recipe: Literal["auto"] | None = None
    """`auto`: training chooses a shipped recipe by the images, the scale factor, the visible phases, the minutes and
    the speed of this machine, and says why. What the study sets under `network` and `training` goes before the recipe.
    By default there is no recipe, and settings that are not given are as published."""
    high_res: HighRes
    low_res: LowRes
    imaging: Imaging = Imaging()
    network: Network = Network()
    training: Training = Training()
    inference: Inference = Inference()
    metrics: Metrics = Metrics()
    reference: Reference = Reference()
    phantom: Phantom | None = None
    cluster: Cluster = Cluster()
    device: Device = "auto"
    allow_voxel_size_mismatch: bool = False
    """Use the study's voxel size where a file gives one that differs by more than 2 %, instead of refusing it."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.low_res is not None:
            self._refuse_other_phases(self.low_res)
        self.training.refuse_misfit(self)
        return self

    def _refuse_other_phases(self, low_res: LowRes) -> None:
        """Raise ValueError if the low-res volume has a phase that the images lack, or lacks one of theirs."""
        known = set(self.high_res.phases.values())
        named = [name for group in low_res.groups for name in group]
        for name in named:
            if name not in known:
                hint = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"low_res.phases: {name!r} is no phase of high_res ({', '.join(sorted(known))})"
                    + (f"; did you mean {hint[0]!r}?" if hint else "")
                )
        for name in self.high_res.phases.values():
            if name not in named:
                raise ValueError(
                    f"low_res.phases: {name!r} has no place, so the generator could not put it anywhere; list it "
                    f"with the phase it cannot be told from, as [{named[0]}, {name}]"
                )

    def plain(self, **options: Any) -> dict[str, Any]:
        """Return all settings as plain dicts, lists and numbers for JSON and YAML.

        pydantic's own JSON mode refuses file names that are not UTF-8.

        Parameters
        ----------
        **options
            Options of pydantic's model_dump.
        """
        return _plain(self.model_dump(**options))

    def as_json(self) -> str:
        """Return all settings that are not None as JSON text."""
        return json.dumps(self.plain(exclude_none=True))

    @staticmethod
    def of_json(text: str) -> Study:
        """Return the study that `as_json` wrote.

        A setting that an earlier version did not have gets the value that describes what that version did.

        Raises
        ------
        pydantic.ValidationError
            The text is not a valid study.
        """
        settings = json.loads(text)
        rename_old_settings(settings)
        model = study_model(settings)
        if model is Study:
            settings["training"] = {"real_patches": "slices", "penalties": "slices"} | settings.get("training", {})
        return model.model_validate(settings)

    @property
    def phases(self) -> tuple[str, ...]:
        """Phase names in the order 0, 1, 2, … of the output's labels."""
        return tuple(self.high_res.phases.values())

    @property
    def low_res_voxel_size(self) -> Length:
        """Edge of a low-res voxel: the high-res voxel size times the scale factor."""
        return self.high_res.voxel_size.times(self.scale_factor)

    @property
    def folder(self) -> Path:
        """Folder for everything the stages write."""
        return Path(self.output)

    @property
    def inputs(self) -> list[str]:
        """Paths of all input files that the study names."""
        named = [image.path for image in self.high_res.images], () if self.low_res is None else self.low_res.paths
        single = self.reference.volume, self.training.init_from
        return [*(path for paths in named for path in paths), *(path for path in single if path is not None)]

    @property
    def checkpoint_path(self) -> Path:
        """Path of checkpoint.pt, which training writes and inference reads."""
        return self.folder / "checkpoint.pt"

    @property
    def best_path(self) -> Path:
        """Path of the generator with the best score so far, if training judges generators."""
        return self.folder / "best.pt"

    @property
    def labels_path(self) -> Path:
        """Path of the painted volume, labels.zarr."""
        return self.folder / "labels.zarr"

    @property
    def metrics_path(self) -> Path:
        """Path of metrics.json."""
        return self.folder / "metrics.json"

    @property
    def transport_path(self) -> Path:
        """Path of transport.json."""
        return self.folder / "transport.json"

    @property
    def report_path(self) -> Path:
        """Path of the page, report.html."""
        return self.folder / "report.html"


class _HighResWithoutImages(HighRes):
    images: tuple[HighResImage, ...] = ()


@cache
def _model_of(family: Family) -> type[Study]:
    if family.name == "superres":
        return Study
    fields: dict[str, Any] = {
        "network": (family.network, Field(default_factory=lambda: family.network())),
        "training": (family.training, Field(default_factory=lambda: family.training())),
    }
    if not family.needs_low_res:
        fields["low_res"] = (LowRes | None, None)
    if not family.needs_images:
        fields["high_res"] = (_HighResWithoutImages, ...)
    return create_model("Study", __base__=Study, **fields)


def study_model(settings: Any) -> type[Study]:
    """Return the model that validates these settings, by their network.family.

    Parameters
    ----------
    settings : object
        Content of a study file.

    Raises
    ------
    InputError
        No family has this name.
    """
    network = settings.get("network") if isinstance(settings, dict) else None
    return _model_of(family_of(network.get("family", "superres") if isinstance(network, dict) else "superres"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
