"""Every shard is made once, after those below it, by whoever is free first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from hpcres.geometry import Box, blocks
from hpcres.inference.tasks import Shard, WorkQueue


def work_off(tasks: WorkQueue, pace: list[float], capacity: int) -> tuple[list[tuple[float, int, Shard]], float]:
    """Give ranks that take pace[rank] seconds a shard what they may have; (start, rank, shard) and when all is done."""
    now, busy, history = 0.0, list[tuple[float, int, Shard]](), []
    while True:
        for rank in sorted(range(len(pace)), key=lambda r: tasks.in_hand[r]):
            while tasks.in_hand[rank] < capacity and (shard := tasks.take(rank)) is not None:
                history.append((now, rank, shard))
                queued = max([end for end, r, _ in busy if r == rank], default=now)
                busy.append((queued + pace[rank], rank, shard))
        if not busy:
            assert tasks.over
            return history, now
        busy.sort()
        now, rank, shard = busy.pop(0)
        tasks.done(rank, shard, True)


def a_pyramid(n: int) -> tuple[list[Shard], Callable[[Shard], list[Shard]]]:
    """Shards of one voxel, three levels from n³ on, and what each is made from."""
    levels = [Box.whole((-(-n // 2**level),) * 3) for level in range(3)]

    def below(shard: Shard) -> list[Shard]:
        level, box = shard
        finer = Box(tuple(2 * a for a in box.start), tuple(2 * b for b in box.stop)).clipped(levels[level - 1])
        return [(level - 1, place(part, finer.start)) for part in blocks(finer.shape, (1, 1, 1))]

    def place(box: Box, start: tuple[int, int, int]) -> Box:
        return box.relative_to([-a for a in start])

    return [(level, box) for level, whole in enumerate(levels) for box in blocks(whole.shape, (1, 1, 1))], below


@pytest.mark.parametrize("pace", [[1], [1, 1, 1], [1, 10], [3, 1, 1, 50], [1] * 80])
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_every_shard_is_made_once_after_those_below_it_and_no_rank_holds_the_rest(pace, capacity):
    wanted, below = a_pyramid(4)
    history, end = work_off(WorkQueue(wanted, below, len(pace)), pace, capacity)
    assert sorted(shard for _, _, shard in history) == sorted(wanted)
    began = {shard: start for start, _, shard in history}
    assert all(began[shard] > began[part] for shard in wanted if shard[0] for part in below(shard))
    tiles = [shard for _, _, shard in history if shard[0] == 0]
    assert tiles == sorted(tiles)  # neighbours at about the same time
    ideal = len(wanted) / sum(1 / one for one in pace)
    # Besides: the three levels' last shards, one after the other, and what the slowest had begun.
    assert end <= ideal + 3 * sorted(pace)[len(pace) // 2] + max(pace) * capacity
    if len(pace) == 80:
        assert Counter(rank for _, rank, shard in history if shard[0] == 0).most_common(1)[0][1] == 1


def test_what_failed_keeps_back_only_what_is_made_from_it():
    wanted, below = a_pyramid(4)
    tasks = WorkQueue(wanted, below, 1)
    made = set()
    while (shard := tasks.take(0)) is not None:
        tasks.done(0, shard, well := shard != (0, Box((0, 0, 0), (1, 1, 1))))
        made |= {shard} if well else set()
    assert tasks.over
    assert {(level, box.start) for level, box in set(wanted) - made} == {(level, (0, 0, 0)) for level in range(3)}
