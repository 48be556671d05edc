"""What to solve, how exactly, and in which memory: the options of transport.json, and which of them exclude each other.

Messages name the options as `hpcres.result_files.write_transport` takes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcres.errors import InputError
from hpcres.geometry import AXES, Periodic, meeting_sides
from hpcres.transport.phases import BLOCK_VOXELS, Conducting, FieldStore, Watch, tortuosity
from hpcres.transport.problem import DEFAULT_RTOL, Means, SolveSettings
from hpcres.transport.second_opinion import refuse_check
from hpcres.volumes.volume import Volume


@dataclass(frozen=True)
class TransportOptions:
    """What to solve, how exactly, and in which memory.

    Attributes
    ----------
    phase : sequence of str
        Names or labels of the phases to solve one by one; all of them if it is empty.
    direction : sequence of str
        Any of z, y, x; all three if it is empty.
    conductivity : mapping or None
        Phase → conductivity, of phases that conduct together. It excludes `phase`.
    periodic : sequence of str
        Axes along which the volume's two sides meet.
    crop : str or None
        `z0:z1,y0:y1,x0:x1`, to solve only this part of the volume.
    rtol : float
        The solver stops when the estimated error of D_rel is below this share of it.
    profile : bool
        Also tau of each layer along the direction.
    field : str or None
        A store for potential and flux density.
    threads : int or None
        All cores by default. The result does not depend on it.
    estimate : str or None
        `blocks` solves blocks alone, which is no solution of the volume.
    memory : int or None
        Bytes that the process may hold; it solves out of core if it would hold more.
    scratch : str or None
        Folder of scratch storage for `memory`; beside the output by default.
    device : str or None
        A GPU, such as `cuda:1`.
    check : str or None
        `taufactor` solves with TauFactor too.
    """

    phase: Sequence[str] = ()
    direction: Sequence[str] = ()
    conductivity: Mapping[str, float] | None = None
    periodic: Sequence[str] = ()
    crop: str | None = None
    rtol: float = DEFAULT_RTOL
    profile: bool = False
    field: str | None = None
    threads: int | None = None
    estimate: str | None = None
    memory: int | None = None
    scratch: str | None = None
    device: str | None = None
    check: str | None = None

    @property
    def sides(self) -> Periodic:
        """Whether the volume's two sides meet along z, y and x."""
        return meeting_sides(self.periodic)

    @property
    def block(self) -> int | None:
        """Edge of the blocks of an estimate, in voxels; None for a solution."""
        return BLOCK_VOXELS if self.estimate else None

    def solve(
        self,
        volume: Volume,
        *,
        phases: Sequence[str] | None,
        voxel_size: Sequence[float],
        means: Means,
        field: FieldStore | None,
        report: Callable[[str, str, int, float, float], None],
        finished: Callable[[dict[str, Any]], None],
        solved: Callable[[Mapping[str, Any]], dict[str, Any] | None],
    ) -> dict[str, Any]:
        """Solve a volume as the options say; the arguments are those of `phases.tortuosity` and its dataclasses.

        With a store for potential and flux density every system is solved anew.
        """
        return tortuosity(
            volume,
            Conducting(phases, self.phase, self.conductivity),
            SolveSettings(self.direction or AXES, voxel_size, self.sides, self.rtol, self.profile),
            means,
            crop=self.crop,
            estimate=self.block,
            field=field,
            watch=Watch(report, finished, None if field else solved),
        )

    def open_device(self) -> Any:
        """Return the torch device that `device` names, or None; InputError if there is none of this name."""
        if self.device is None:
            return None
        from hpcres.transport.device import find_device  # torch

        return find_device(self.device)

    def refuse_phases(self) -> None:
        """Raise InputError if both `phase` and `conductivity` say what to solve."""
        if self.phase and self.conductivity:
            raise InputError(f"`phase` {self.phase[0]}: `conductivity` already names the phases; drop one of them")

    def scratch_for(self, target: Path | None) -> Path:
        """Return the folder of scratch storage for results in `target`, after the checks of what is held in memory.

        Raises
        ------
        InputError
            An estimate or `memory` excludes another option, or the folder cannot be written.
        """
        refused = ("memory", "device", "profile", "field", "periodic")
        if self.estimate and (other := next((name for name in refused if getattr(self, name)), None)):
            raise InputError(
                f"`estimate` blocks: takes no `{other}`, which needs a solution of the whole volume; drop one"
            )
        if self.scratch is not None and self.memory is None:
            raise InputError(f"`scratch` {self.scratch}: is for solving out of core; give `memory` too")
        if self.memory is not None and self.device is not None:
            raise InputError(
                f"`device` {self.device}: a GPU holds all of the volume, `memory` a part of it; drop one of them"
            )
        if self.scratch is not None:
            scratch = Path(self.scratch)
        else:
            scratch = target.absolute().parent if target else Path.cwd()
            if self.memory is not None:
                scratch.mkdir(parents=True, exist_ok=True)
        if self.memory is not None and not (scratch.is_dir() and os.access(scratch, os.W_OK)):
            raise InputError(f"`scratch` {scratch}: is not a folder that can be written; make it, or name another")
        return scratch

    def refuse_check(self, volumes: Iterable[Volume], voxel_size: Sequence[float]) -> None:
        """Raise InputError if the solver that `check` names cannot solve the same (see `second_opinion`)."""
        if self.check is not None:
            asked = {name: getattr(self, name) for name in ("conductivity", "periodic", "estimate", "memory")}
            refuse_check(self.check, volumes, voxel_size, asked=asked, crop=self.crop)

    def refuse_several_processes(self) -> None:
        """Raise InputError for an option of a job that has one process; this one has several."""
        given = {"`memory`": self.memory, "`estimate` blocks": self.estimate, "`device`": self.device}
        given["`check` taufactor"] = self.check
        if option := next((name for name, value in given.items() if value is not None), None):
            raise InputError(f"{option}: is for one process, and this job has several; drop it, or mpirun")
