"""What becomes of times: the margin of defaults, what a GPU's row must not be slower at, and sizes that are unknown."""

from pathlib import Path

import pytest

from tritium.engine.tactics import Choice
from tritium.kernels.kernel import Kernel, Tactic
from tritium.tuner.choose import choose
from tritium.tuner.sites import Candidate, Site, time_key
from tritium.tuner.timing_cache import TimingCache

FIRST, OTHER = "first", "other"
PLAIN: Tactic = {}
TILED: Tactic = {"tile": 64}
LARGE: Tactic = {"tile": 128}
GPU = 1.03
Times = dict[tuple[str, int], dict[int, float]]  # by kernel and the number of its tactic: seconds by size


def chosen(path: Path, times: Times, *, margin: float = 1.0, counts: tuple[int, ...] = (1, 16)) -> Choice | None:
    tactics = (PLAIN, TILED, LARGE)
    kernels = {name: Kernel(name=name, op="op", backend="gpu", target="a:b") for name in (FIRST, OTHER)}
    pairs = {(name, number): Candidate(kernels[name], tactics[number]) for name, number in times}
    site = Site("key", "op", "tokens", (3, 5), tuple(pairs.values()))
    cache = TimingCache({"hardware": "this"}, path / "timings.json")
    for pair, seconds in times.items():
        for count, value in seconds.items():
            cache.put(time_key(site, count, pairs[pair]), value)
    return choose(site, counts, cache, margin=margin)


def kernel_of(choice: Choice | None) -> str:
    assert choice is not None
    return choice.kernel


def test_each_size_has_its_fastest_tactic_and_the_times_stand_beside(tmp_path: Path) -> None:
    times: Times = {(FIRST, 0): {1: 2, 16: 2}, (FIRST, 1): {1: 1, 16: 3}, (FIRST, 2): {1: 3, 16: 1.5}}
    choice = chosen(tmp_path, times)
    assert choice == Choice(
        site="key", steps=(3, 5), kernel="first", tactics=((1, TILED), (16, LARGE)), seconds={"1": 1, "16": 1.5}
    )


def test_a_choice_of_defaults_alone_names_no_tactic(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {(FIRST, 0): {1: 1, 16: 1}, (FIRST, 1): {1: 2, 16: 2}})
    assert choice is not None and choice.tactics == ()


@pytest.mark.parametrize(("seconds", "tactics"), [(0.98, ()), (0.97, ((1, TILED), (16, PLAIN)))])
def test_a_kernels_default_tactic_is_left_only_for_one_that_gains_more_than_the_margin(
    tmp_path: Path, seconds: float, tactics: tuple[tuple[int, Tactic], ...]
) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (FIRST, 1): {1: seconds, 16: 1}}
    choice = chosen(tmp_path, times, margin=GPU)
    assert choice is not None and choice.tactics == tactics


def test_of_two_tactics_beyond_the_margin_the_faster_one_counts_however_close(tmp_path: Path) -> None:
    times: Times = {(FIRST, 0): {1: 1}, (FIRST, 1): {1: 0.9}, (FIRST, 2): {1: 0.899}}
    choice = chosen(tmp_path, times, margin=GPU, counts=(1,))
    assert choice is not None and choice.tactics == ((1, LARGE),)


@pytest.mark.parametrize(("seconds", "kernel"), [(0.98, "first"), (0.97, "other")])
def test_the_first_kernel_is_left_only_for_one_that_gains_more_than_the_margin(
    tmp_path: Path, seconds: float, kernel: str
) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (OTHER, 0): {1: seconds, 16: seconds}}
    assert kernel_of(chosen(tmp_path, times, margin=GPU)) == kernel


def test_on_a_gpu_a_kernel_that_is_slower_at_any_size_is_not_chosen_on_a_cpu_the_product_counts(tmp_path: Path) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (OTHER, 0): {1: 0.2, 16: 1.04}}
    assert kernel_of(chosen(tmp_path, times, margin=GPU)) == "first"
    assert kernel_of(chosen(tmp_path, times)) == "other"


def test_a_kernel_that_shares_a_sizes_code_with_the_first_is_not_lost_for_what_two_measurements_differ_by(
    tmp_path: Path,
) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (OTHER, 0): {1: 0.8, 16: 1.02}}
    assert kernel_of(chosen(tmp_path, times, margin=GPU)) == "other"


def test_slower_means_slower_than_the_first_kernels_best_tactic(tmp_path: Path) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (FIRST, 1): {1: 1, 16: 0.5}, (OTHER, 0): {1: 0.2, 16: 0.6}}
    assert kernel_of(chosen(tmp_path, times, margin=GPU)) == "first"


@pytest.mark.parametrize("margin", [1.0, GPU])
def test_a_kernel_that_misses_a_size_is_compared_with_nobody(tmp_path: Path, margin: float) -> None:
    times: Times = {(FIRST, 0): {1: 1, 16: 1}, (OTHER, 0): {1: 0.1}}
    assert kernel_of(chosen(tmp_path, times, margin=margin)) == "first"
    assert kernel_of(chosen(tmp_path, {(FIRST, 0): {1: 0.1}, (OTHER, 0): {1: 1, 16: 1}}, margin=margin)) == "other"


@pytest.mark.parametrize("margin", [1.0, GPU])
def test_kernels_that_were_measured_at_different_sizes_are_not_compared(tmp_path: Path, margin: float) -> None:
    times: Times = {(FIRST, 0): {1: 1}, (OTHER, 0): {16: 0.1}}
    choice = chosen(tmp_path, times, margin=margin)
    assert choice is not None and (choice.kernel, choice.seconds) == ("first", {"1": 1})


def test_a_tactic_that_misses_a_size_is_left_out_there_alone(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {(FIRST, 0): {16: 1}, (FIRST, 1): {1: 3, 16: 2}}, margin=GPU)
    assert choice is not None and choice.tactics == ((1, TILED), (16, PLAIN))


def test_where_nothing_was_measured_nothing_is_chosen(tmp_path: Path) -> None:
    assert chosen(tmp_path, {(FIRST, 0): {}, (OTHER, 0): {}}) is None
    assert chosen(tmp_path, {(FIRST, 0): {64: 1}}) is None
