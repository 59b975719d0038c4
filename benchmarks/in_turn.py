"""Calls that take turns, each on a copy of its own of what it reads, so that every one reads memory."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

LEAST_CALLS = 5


def best_seconds(calls: Sequence[Callable[[], object]], budget_s: float = 0.5) -> float:
    """The fastest of the calls, after one round of them."""
    for call in calls:
        call()
    best, turns, end = float("inf"), itertools.cycle(calls), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        call, start = next(turns), time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def median_seconds(
    ways: Sequence[Sequence[Callable[[], object]]],
    budget_s: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Of each of several ways to do the same, the median: one call of each in turn, so that a slow moment meets all.

    ways: the calls of each, as many of one as of another; every next call is on the next copy.
    """
    taken: list[list[float]] = [[] for _ in ways]
    copies, end = itertools.cycle(range(len(ways[0]))), time.perf_counter() + budget_s
    while len(taken[0]) < LEAST_CALLS or time.perf_counter() < end:
        in_order = range(len(ways))
        for number in in_order if len(taken[0]) % 2 == 0 else reversed(in_order):
            call = ways[number][next(copies)]
            start = clock()
            call()
            taken[number].append(clock() - start)
    return [statistics.median(of_one) for of_one in taken]
