"""Registry of generator families, read by study, checkpoint, training and inference.

A family is one module in `networks`, one data source in `training`, and one entry here (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpcres.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

Made = Callable[..., Any] | str
"""A function, or where it is, as `module:name`, so that it is imported when it is first called."""


@dataclass(frozen=True)
class Family:
    """A kind of generator and how it is trained.

    Parameters
    ----------
    name : str
        The study's `network.family`.
    network, training : type of pydantic.BaseModel
        Models of the study's sections; subclasses of study.NetworkSettings and study.TrainingSettings.
    builds : function or str
        Takes a study and returns the untrained generator (networks.generator.Generator).
    rebuilds : function or str
        Takes a generator's `config` without `family` and returns that generator.
    trains : function or str
        Takes a study, the processes and threads that train it, and the checkpoint that it continues from, or None.
        Returns the trainer (training.trainer.Trainer).
    begins : function or str, optional
        Takes a study and the checkpoint of a run. Returns the study with what was chosen when that run began. None if
        training chooses nothing.
    needs_low_res, needs_images : bool
        Whether the study must have `low_res`, and `high_res.images`.
    """

    name: str
    network: type[BaseModel]
    training: type[BaseModel]
    builds: Made
    rebuilds: Made
    trains: Made
    begins: Made | None = None
    needs_low_res: bool = True
    needs_images: bool = True

    def build(self, study: Any) -> Any:
        """Build the untrained generator of a study."""
        return _function(self.builds)(study)

    def rebuild(self, config: dict[str, Any]) -> Any:
        """Build the generator that a `config` without `family` describes."""
        return _function(self.rebuilds)(config)

    def trainer(self, *given: Any) -> Any:
        """Build the trainer from the arguments that `trains` takes."""
        return _function(self.trains)(*given)

    def as_begun(self, study: Any, before: Any) -> Any:
        """Return the study with what was chosen when the run of the checkpoint `before` began."""
        return study if self.begins is None else _function(self.begins)(study, before)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its name; it replaces an earlier family of that name."""
    FAMILIES[family.name] = family


def family_of(name: str) -> Family:
    """Return the family with this name.

    Raises
    ------
    InputError
        No family has this name.
    """
    if name not in FAMILIES:
        raise InputError(f"network.family: {name!r} is no family of generators; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _function(made: Made) -> Callable[..., Any]:
    if not isinstance(made, str):
        return made
    module, _, name = made.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
