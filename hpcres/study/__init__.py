"""The study: everything a run needs, each setting with its unit, default and limits, and the places of all results.

A module for each section or group of sections; `model` puts them together, and `file` reads a study from a file. Other
rooms import the sections from here. Lengths carry their unit (`65 nm`).
"""

from hpcres.study.family import NetworkSettings, TrainingSettings
from hpcres.study.images import HighRes, Imaging, LowRes, RawHeader
from hpcres.study.inference import Inference
from hpcres.study.metrics import Metrics, Representative, Statistic, SubVolumes
from hpcres.study.model import Study, study_model
from hpcres.study.phantom import Phantom
from hpcres.study.superres import Training
from hpcres.study.values import PATCH_VOXELS, checked_phase_name, parse_boundary, parse_grid

__all__ = [
    "PATCH_VOXELS",
    "HighRes",
    "Imaging",
    "Inference",
    "LowRes",
    "Metrics",
    "NetworkSettings",
    "Phantom",
    "RawHeader",
    "Representative",
    "Statistic",
    "Study",
    "SubVolumes",
    "Training",
    "TrainingSettings",
    "checked_phase_name",
    "parse_boundary",
    "parse_grid",
    "study_model",
]
