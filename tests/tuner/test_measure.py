"""Rounds of measurements: what is kept when, and what becomes of candidates that cannot be bound or run."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tritium.engine.tactics import Tactics
from tritium.errors import KernelError, OutOfMemory
from tritium.kernels.kernel import Kernel, Tactic
from tritium.tuner.measure import Missing, TimeBatch, measure
from tritium.tuner.sites import Candidate, Site, time_key
from tritium.tuner.timing_cache import TimingCache

TACTICS: tuple[Tactic, ...] = ({}, {"tile": 64}, {"tile": 128})
SITES = [
    Site(op, op, "tokens", (number,), tuple(Candidate(Kernel(name=f"gpu.{op}", op=op, backend="gpu", target="a:b"), t)
                                            for t in TACTICS))
    for number, op in enumerate(("linear", "attention"))
]  # fmt: skip
Behaviour = Callable[[int, str, Tactic], float]


@pytest.fixture
def cache(tmp_path: Path) -> TimingCache:
    return TimingCache({"hardware": "this"}, tmp_path / "timings.json")


def everything(*counts: int) -> Missing:
    return {count: {site: list(site.candidates) for site in SITES} for count in counts}


def timer(behaviour: Behaviour) -> TimeBatch:
    """Each step in its turn does what `behaviour(count, op, tactic)` does: it takes so long, or raises."""

    def times(count: int, tactics: Tactics, repeats: int) -> list[float]:
        return [behaviour(count, s.op, tactics.tactic(i, f"gpu.{s.op}", count)) for i, s in enumerate(SITES)]

    return times


def known(cache: TimingCache, count: int) -> dict[str, float | None]:
    """By `op:tile`, what another process finds in the file."""
    saved = TimingCache(cache.environment, cache.path)
    return {
        f"{site.op}:{candidate.tactic.get('tile', 'default')}": saved.get(time_key(site, count, candidate))
        for site in SITES
        for candidate in site.candidates
    }


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling cublasLtMatmul"),
        KernelError("CUBLAS_STATUS_NOT_SUPPORTED"),
        TypeError("CUBLAS_STATUS_NOT_SUPPORTED"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_candidate_that_raises_is_refused_by_its_name_and_all_others_have_their_times(
    error: Exception, cache: TimingCache, caplog: pytest.LogCaptureFixture
) -> None:
    def behaviour(count: int, op: str, tactic: Tactic) -> float:
        if (op, tactic) == ("linear", {"tile": 64}):
            raise error
        return 0.5 if tactic else 1.0

    with caplog.at_level(logging.WARNING, logger="tritium"):
        measure(timer(behaviour), everything(1, 16), cache, 1, None)
    expected = {"linear:default": 1.0, "linear:64": math.inf, "linear:128": 0.5}
    expected |= {"attention:default": 1.0, "attention:64": 0.5, "attention:128": 0.5}
    assert known(cache, 1) == known(cache, 16) == expected
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"gpu.linear:tile=64 cannot run linear of {count} tokens here and is not chosen" for count in (1, 16)
    ]
    assert caplog.messages[0].endswith(f"({type(error).__name__}: CUBLAS_STATUS_NOT_SUPPORTED)")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory("no room for it")])
def test_for_want_of_memory_a_candidate_is_left_out_this_time_alone(error: Exception, cache: TimingCache) -> None:
    def behaviour(count: int, op: str, tactic: Tactic) -> float:
        if tactic == {"tile": 128}:
            raise error
        return 1.0

    measure(timer(behaviour), everything(1), cache, 1, None)
    assert known(cache, 1) == {
        f"{op}:{tile}": seconds
        for op in ("linear", "attention")
        for tile, seconds in (("default", 1.0), (64, 1.0), (128, None))
    }


def test_a_default_that_cannot_run_is_an_error_and_the_sizes_before_it_are_kept(cache: TimingCache) -> None:
    def behaviour(count: int, op: str, tactic: Tactic) -> float:
        if count == 16 and op == "attention":
            raise RuntimeError("an illegal memory access was encountered")
        return 1.0

    with pytest.raises(KernelError) as raised:
        measure(timer(behaviour), everything(1, 16, 64), cache, 1, None)
    for part in (
        "defaults cannot run a batch of 16 tokens (RuntimeError: an illegal memory access was encountered)",
        "Tried with it: gpu.linear, gpu.attention;",
        "`tritium tune --deny NAME`",
    ):
        assert part in str(raised.value)
    assert set(known(cache, 1).values()) == {1.0} and set(known(cache, 16).values()) == {None}


def test_a_default_that_wants_more_than_the_gpu_has_is_an_error_and_is_not_noted(cache: TimingCache) -> None:
    behaviour: Behaviour = lambda count, op, tactic: 1.0 if tactic or op == "linear" else math.inf  # noqa: E731
    with pytest.raises(KernelError, match=r"default kernel of attention wants more .* a batch of 1 tokens: build"):
        measure(timer(behaviour), everything(1), cache, 1, None)
    assert set(known(cache, 1).values()) == {None}


def test_what_the_timer_says_on_purpose_is_said_as_it_is(cache: TimingCache) -> None:
    def times(count: int, tactics: Tactics, repeats: int) -> list[float]:
        raise OutOfMemory(f"the KV cache has no room for {count} sequences")

    with pytest.raises(OutOfMemory, match="the KV cache has no room for 64 sequences"):
        measure(times, everything(64), cache, 1, None)


def test_the_first_of_those_that_are_not_denied_may_be_refused_like_any_other(cache: TimingCache) -> None:
    """The engine's own default is denied, and runs; what stands first in its place does not."""
    site = SITES[0]
    allowed = Site(site.key, site.op, site.phase, site.steps, site.candidates[1:])
    behaviour: Behaviour = lambda count, op, tactic: math.inf if tactic == {"tile": 64} else 1.0  # noqa: E731
    measure(timer(behaviour), {1: {allowed: list(allowed.candidates)}}, cache, 1, None)
    assert known(cache, 1)["linear:64"] == math.inf and known(cache, 1)["linear:128"] == 1.0


def test_who_interrupts_a_tuning_keeps_the_sizes_that_were_done(cache: TimingCache) -> None:
    def behaviour(count: int, op: str, tactic: Tactic) -> float:
        if count == 64:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        measure(timer(behaviour), everything(1, 16, 64), cache, 1, None)
    assert None not in {*known(cache, 1).values(), *known(cache, 16).values()}
