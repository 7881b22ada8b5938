"""Work on many weights side by side, each on a thread of its own.

A fit is a long row of products so small that torch's threads, which share each of them, lose more by waiting for each
other than they gain: with two of them fits took from as long to two thirds longer than with one. Two fits at a time, on
one thread each, took three quarters to nine tenths of the time of one after the other on one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import TypeVar

import torch

WIDE = 1 << 20  # numbers of a weight from which torch's threads help with its products
ROOM = 2e9  # bytes that all fits at work may take,
HELD = 40  # times the square of a weight's columns each, about: moments in two precisions, factors, inverses
AHEAD = 2  # items waiting for each worker, so that none waits for the first of all to end

Item = TypeVar("Item")
Found = TypeVar("Found")


def side_by_side(
    work: Callable[[Item], Found],
    items: Iterable[Item],
    shapes: Sequence[Sequence[int]],  # of their weights, (rows, columns, *taps)
    *,
    device: torch.device | None,
) -> Iterator[Found]:
    """What `work` makes of every item, in order; items are asked for one by one, a little ahead of what is given back.

    As many at a time as torch may use threads and memory allows; on other devices than the CPU one after the other.
    The number of torch's threads is the same afterwards, also where an item fails or nothing more is asked for.

    >>> list(side_by_side(sum, [[1, 2], [3, 4]], [(8, 8), (8, 8)], device=torch.device("cpu")))
    [3, 7]
    """
    threads = torch.get_num_threads()
    columns = max((prod(each[1:]) for each in shapes), default=0)
    workers = max(1, min(threads, len(shapes), int(ROOM / (HELD * columns**2 + 1))))
    share = threads // workers if any(prod(each) >= WIDE for each in shapes) else 1
    if (device is not None and device.type != "cpu") or (workers, share) == (1, threads):
        yield from map(work, items)
        return
    yield from _at_work(work, items, workers=workers, threads=share)


def _at_work(work: Callable[[Item], Found], items: Iterable[Item], *, workers: int, threads: int) -> Iterator[Found]:
    grown, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # which every thread has of its own

    def begin() -> None:
        torch.set_num_threads(threads)

    def done(item: Item) -> Found:
        with torch.inference_mode(inference), torch.set_grad_enabled(grown):
            return work(item)

    before = torch.get_num_threads()
    waiting: deque[Future[Found]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gmcompress", initializer=begin)
    try:
        for item in items:
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(done, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # `begin` also sets what later threads begin with
