"""Measurements in rounds: a batch of one size, every site run by one of its candidates, until all have had their turn.

What is known when a size is done is kept at once. A candidate that cannot be bound or run (a foreign library's
exception among them) is refused, not the tuning: its round is run again with each site's candidate alone beside the
defaults of the others, which says whose it was, and its time is infinite. Defaults are what the engine runs by when
nothing is tuned: where they fail, that is an error.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from tritium.engine.tactics import Choice, Tactics
from tritium.errors import KernelError, TritiumError
from tritium.tuner.sites import Candidate, Site, time_key
from tritium.tuner.timing_cache import TimingCache

Progress = Callable[[int, int, float], None]  # rounds done, all rounds, estimated seconds left
TimeBatch = Callable[[int, Tactics, int], list[float]]  # of so many tokens, by these, so many times: seconds by step
Missing = Mapping[int, Mapping[Site, list[Candidate]]]  # by size: what is to be measured
logger = logging.getLogger("tritium")


def measure(times: TimeBatch, missing: Missing, cache: TimingCache, repeats: int, progress: Progress | None) -> None:
    """Note in `cache` and save what is missing; inf: refused. For want of memory alone nothing is noted: there may be
    more next time. Raises `KernelError`, or what the timer raises on purpose, when the defaults cannot run."""
    rounds = [
        (count, {site: left[i] for site, left in of_count.items() if i < len(left)})
        for count, of_count in missing.items()
        for i in range(max((len(left) for left in of_count.values()), default=0))
    ]
    work = [count + 16 for count, _ in rounds]  # a pass costs something whatever its size
    start, done = time.perf_counter(), 0
    for number, (count, chosen) in enumerate(rounds):
        if progress is not None:
            left = (time.perf_counter() - start) / done * (sum(work) - done) if done else math.nan
            progress(number, len(rounds), left)
        for site, seconds in _seconds(times, count, chosen, repeats).items():
            cache.put(time_key(site, count, chosen[site]), seconds)
        done += work[number]
        if number + 1 == len(rounds) or rounds[number + 1][0] != count:
            cache.save()
    if progress is not None:
        progress(len(rounds), len(rounds), 0.0)


def _seconds(times: TimeBatch, count: int, chosen: Mapping[Site, Candidate], repeats: int) -> dict[Site, float]:
    """Of each site's candidate in one round."""
    try:
        found = _of_sites(times(count, _forced(chosen), repeats), chosen)
    except Exception as error:  # noqa: BLE001 - a candidate's code may raise anything; whose it was is found below
        logger.debug("a round of %d tokens failed (%s), its candidates are tried alone", count, _text(error))
        found = None
    if found is None:
        _check_defaults(times, count, chosen)
        found = {}
        for site, candidate in chosen.items():
            found |= _alone(times, count, site, candidate, repeats)
    elif any(math.isinf(found[site]) and candidate is site.candidates[0] for site, candidate in chosen.items()):
        _check_defaults(times, count, chosen)
    for site, seconds in found.items():
        if math.isinf(seconds):
            logger.debug("%s is refused for %s of %d tokens", chosen[site].name, site.op, count)
    return found


def _alone(times: TimeBatch, count: int, site: Site, candidate: Candidate, repeats: int) -> dict[Site, float]:
    """A candidate's time beside the others' defaults, inf when it fails; empty when what it lacks is memory."""
    try:
        return _of_sites(times(count, _forced({site: candidate}), repeats), [site])
    except Exception as error:  # noqa: BLE001 - as above: it is one of many, and the others are fine
        logger.warning(
            "%s cannot run %s of %d tokens here and is not chosen (%s)", candidate.name, site.op, count, _text(error)
        )
        return {} if isinstance(error, MemoryError | torch.OutOfMemoryError) else {site: math.inf}


def _check_defaults(times: TimeBatch, count: int, sites: Mapping[Site, Candidate]) -> None:
    """Raise unless a batch of so many tokens can be run as an engine that is not tuned runs it."""
    try:
        found = _of_sites(times(count, _forced({}), 1), sites)
    except TritiumError:
        raise
    except Exception as error:
        raise KernelError(
            f"the engine's defaults cannot run a batch of {count} tokens ({_text(error)}), so that nothing can be "
            f"tuned. Tried with it: {', '.join(candidate.name for candidate in sites.values())}; where one of these "
            "has broken the GPU's state for all that comes after it, `tritium tune --deny NAME` leaves it out"
        ) from error
    if broken := [site.op for site, seconds in found.items() if math.isinf(seconds)]:
        raise KernelError(
            f"the default kernel of {', '.join(broken)} wants more than this GPU has for a batch of {count} tokens: "
            "build the model with another scheme or dtype"
        )


def _of_sites(samples: list[float], sites: Mapping[Site, Candidate] | list[Site]) -> dict[Site, float]:
    return {site: statistics.median(samples[step] for step in site.steps) for site in sites}


def _text(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"


def _forced(chosen: Mapping[Site, Candidate]) -> Tactics:
    always = 1 << 30
    choices = [
        Choice(site=site.key, steps=site.steps, kernel=one.kernel.name, tactics=((always, one.tactic),))
        for site, one in chosen.items()
    ]
    return Tactics(environment={}, effort="measuring", choices=tuple(choices))
