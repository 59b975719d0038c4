"""From times to a choice: one kernel for a site, and for each size of batch the tactic that it runs by.

A default, what stands first and what nothing tuned would run, is left only for what is faster by more than two
measurements of the same differ: `margin` times. On a CPU that is 1; there times repeat themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tritium.engine.tactics import Choice, Tactic
from tritium.tuner.sites import Candidate, Site, time_key
from tritium.tuner.timing_cache import TimingCache


class Timed(NamedTuple):
    """A tactic and the seconds that a step takes by it."""

    seconds: float
    tactic: Tactic


BySize = Mapping[int, Timed]  # a kernel's best tactic by size of batch, smallest first


def choose(site: Site, counts: Sequence[int], cache: TimingCache, *, margin: float = 1.0) -> Choice | None:
    """The kernel with the least product of times over all sizes, each with its best tactic; None: nothing is known.

    counts: sizes of batches, in rising order. margin: 1 or more. Where it is more than 1, on a GPU, a kernel that is
    slower than the first by more than that at any size is not chosen: batches there are larger than any that is
    measured. Up to that it counts as equal: two rows that share the code of a size never measure the same.
    """
    first = site.candidates[0].kernel.name
    kernels = _of_most_sizes(_best_of_each_kernel(site, counts, cache, margin))
    if margin > 1.0 and first in kernels:
        kernels = _slower_nowhere(kernels, kernels[first], margin)
    if not kernels:
        return None
    chosen = min(kernels, key=lambda name: _cost(kernels[name], 1.0 if name == first else margin))
    return _as_choice(site, chosen, kernels[chosen])


def _best_of_each_kernel(
    site: Site, counts: Sequence[int], cache: TimingCache, margin: float
) -> dict[str, dict[int, Timed]]:
    """By kernel, in the order of the candidates, and size; only what was measured, not what is refused."""
    by_kernel: dict[str, list[Candidate]] = {}
    for candidate in site.candidates:
        by_kernel.setdefault(candidate.kernel.name, []).append(candidate)
    best: dict[str, dict[int, Timed]] = {}
    for name, candidates in by_kernel.items():
        default = candidates[0].tactic
        for count in counts:
            seconds = [(cache.get(time_key(site, count, candidate)), candidate.tactic) for candidate in candidates]
            if timed := [Timed(known, tactic) for known, tactic in seconds if known is not None and known < math.inf]:
                best.setdefault(name, {})[count] = _best_tactic(timed, default, margin)
    return best


def _best_tactic(timed: Sequence[Timed], default: Tactic, margin: float) -> Timed:
    """The fastest, or the default, when it was measured and the fastest gains less than the margin."""
    fastest = min(timed, key=lambda one: one.seconds)
    known = next((one for one in timed if one.tactic == default), None)
    return fastest if known is None or fastest.seconds * margin < known.seconds else known


def _of_most_sizes(kernels: Mapping[str, BySize]) -> dict[str, BySize]:
    """Those that were measured at as many sizes as any, and at the same: products of others are not comparable."""
    widest: BySize = max(kernels.values(), key=len, default={})
    return {name: best for name, best in kernels.items() if best.keys() == widest.keys()}


def _slower_nowhere(kernels: Mapping[str, BySize], first: BySize, margin: float) -> dict[str, BySize]:
    """Those that are slower than `first` by more than the margin at no size, itself among them."""
    return {
        name: best
        for name, best in kernels.items()
        if all(timed.seconds <= margin * first[count].seconds for count, timed in best.items())
    }


def _cost(best: BySize, allowance: float) -> float:
    """The product's logarithm, of times that are multiplied by `allowance` first."""
    return sum(math.log(max(timed.seconds * allowance, 1e-9)) for timed in best.values())


def _as_choice(site: Site, kernel: str, best: BySize) -> Choice:
    has_tactics = any(timed.tactic for timed in best.values())
    return Choice(
        site=site.key,
        steps=site.steps,
        kernel=kernel,
        tactics=tuple((count, timed.tactic) for count, timed in best.items()) if has_tactics else (),
        seconds={str(count): timed.seconds for count, timed in best.items()},
    )
