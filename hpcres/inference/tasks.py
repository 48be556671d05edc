"""Distribution of shards: rank 0 hands shards out one by one as ranks ask, so that a slow rank gets fewer.

Tiles come in the plan's order, so neighbours are painted at about the same time. A coarser shard comes as soon as
every shard below it is made. No rank waits at a barrier between levels, and no two get the same shard.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from hpcres.geometry import Box
from hpcres.inference.ranks import Ranks

Shard = tuple[int, Box]
"""Pyramid level, and the shard's box in it; a shard of level 0 is a tile."""


class WorkQueue:
    """The shards that are missing, in the order they come, and how many each rank has in hand. No MPI."""

    def __init__(self, missing: Iterable[Shard], below: Callable[[Shard], Iterable[Shard]], ranks: int) -> None:
        """Order the missing shards.

        Parameters
        ----------
        missing
            Shards that are to be made.
        below
            Function that returns the shards that a shard of level ≥ 1 is made from.
        ranks
            Number of ranks.
        """
        wanted = list(missing)
        order = {shard: place for place, shard in enumerate(wanted)}
        self._above: dict[Shard, list[Shard]] = {}
        self._waits: Counter[Shard] = Counter()
        for shard in wanted:
            for part in below(shard) if shard[0] else ():
                if part in order:
                    self._above.setdefault(part, []).append(shard)
                    self._waits[shard] += 1
        # The coarser first: what they are made from is still at hand.
        self._turn = {shard: (-shard[0], order[shard]) for shard in wanted}
        self._ready = [(self._turn[shard], shard) for shard in wanted if not self._waits[shard]]
        heapq.heapify(self._ready)
        self.in_hand = [0] * ranks
        self.tiles_done = self.voxels_done = 0

    @property
    def over(self) -> bool:
        """Whether nothing is left to hand out or to wait for; what failed, and all above it, stays undone."""
        return not self._ready and not any(self.in_hand)

    def take(self, rank: int) -> Shard | None:
        """Return the next shard for `rank`, or None.

        None means that no shard is ready now, or that the other ranks will need those that are.
        """
        own = self.in_hand[rank]
        if not self._ready or (own and len(self._ready) <= sum(n <= own for n in self.in_hand) - 1):
            return None
        self.in_hand[rank] += 1
        return heapq.heappop(self._ready)[1]

    def done(self, rank: int, shard: Shard, made: bool) -> None:
        """Record that `rank` has made a shard, or could not."""
        self.in_hand[rank] -= 1
        if made:
            if shard[0] == 0:
                self.tiles_done, self.voxels_done = self.tiles_done + 1, self.voxels_done + shard[1].voxels
            for above in self._above.get(shard, ()):
                self._waits[above] -= 1
                if not self._waits[above]:
                    heapq.heappush(self._ready, (self._turn[above], above))


class Dispatcher:
    """A rank's requests for shards, by messages that nobody waits for: call `exchange` every few milliseconds.

    Rank 0 has the tasks and serves the others between its own tiles. Such messages, unlike one-sided MPI, make
    progress on any transport without a rank that spins inside the library.
    """

    def __init__(self, ranks: Ranks, tasks: WorkQueue | None, capacity: int) -> None:
        """Begin with nothing in hand.

        Parameters
        ----------
        ranks
            Ranks of the job.
        tasks
            The shards, on rank 0; None on the others.
        capacity
            Shards that this rank has in hand at most.
        """
        self._ranks, self._tasks, self._capacity = ranks, tasks, capacity
        self._in_hand = self._asked = 0
        self._made: list[tuple[Shard, bool]] = []
        self._wanted = [0] * ranks.size
        self._leaving: set[int] = set()
        self._told_over = False
        self.over = False
        """Whether no more shards come."""

    def done(self, shard: Shard, made: bool) -> None:
        """Record that this rank has made a shard, or could not."""
        self._in_hand -= 1
        self._made.append((shard, made))

    def exchange(self, stopping: bool) -> list[Shard]:
        """Report what is done, and return the shards that this rank is given.

        Parameters
        ----------
        stopping
            Begin nothing more.

        Returns
        -------
        list of Shard
            Shards to make now; empty where `stopping`.
        """
        given = self._serve(stopping) if self._tasks is not None else self._ask()
        if stopping:
            given = []
        self._in_hand += len(given)
        return given

    def may_leave(self) -> bool:
        """Return whether this rank's part is over; on rank 0, whether all the others have left too."""
        if not self.over or self._in_hand:
            return False
        if self._tasks is None:
            self._ranks.tell(0, (self._made, None))
            return True
        return len(self._leaving) == self._ranks.size - 1

    def _ask(self) -> list[Shard]:
        given: list[Shard] = []
        for _, shards in self._ranks.heard():
            if shards is None:
                self.over = True
            else:
                given += shards
                self._asked -= len(shards)
        more = 0 if self.over else self._capacity - self._in_hand - len(given) - self._asked
        if more or (self._made and not self.over):
            self._ranks.tell(0, (self._made, more))
            self._asked, self._made = self._asked + more, []
        return given

    def _serve(self, stopping: bool) -> list[Shard]:
        assert self._tasks is not None
        for rank, (made, more) in [*self._ranks.heard(), (0, (self._made, 0))]:
            for shard, well in made:
                self._tasks.done(rank, shard, well)
            if more is None:
                self._leaving.add(rank)
            else:
                self._wanted[rank] += more
        self._made = []
        self._wanted[0] = self._capacity - self._in_hand
        given: dict[int, list[Shard]] = {}
        # Whoever has least in hand comes first, rank 0 among them.
        asking = [] if stopping else [(n, r) for r, n in enumerate(self._tasks.in_hand) if self._wanted[r]]
        heapq.heapify(asking)
        while asking:
            _, rank = heapq.heappop(asking)
            shard = self._tasks.take(rank)
            if shard is not None:
                given.setdefault(rank, []).append(shard)
                self._wanted[rank] -= 1
                if self._wanted[rank]:
                    heapq.heappush(asking, (self._tasks.in_hand[rank], rank))
        own = given.pop(0, [])
        for rank, shards in given.items():
            self._ranks.tell(rank, shards)
        if (stopping or self._tasks.over) and not self._told_over:
            self.over = self._told_over = True
            for rank in range(1, self._ranks.size):
                self._ranks.tell(rank, None)
        return own
