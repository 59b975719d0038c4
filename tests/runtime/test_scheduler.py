"""The scheduler's rules, one example each. What must hold always is in test_scheduler_properties.py."""

import pytest

from tritium.errors import ConfigError, RequestError, RequestTooLarge
from tritium.testing.scheduling import ShadowKV, ids, make_request, make_scheduler, run_all, run_step, shape
from tritium.testing.scheduling import always_one as one

# -- what a step computes ----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes_within_one_budget():
    scheduler = make_scheduler()
    scheduler.add(make_request("short", [1, 2, 3]))
    assert shape(run_step(scheduler, one)[0]) == [("short", 0, 3, True)]
    scheduler.add(make_request("long", range(15)))
    assert shape(run_step(scheduler, one)[0]) == [("short", 3, 1, True), ("long", 0, 7, False)]
    assert shape(run_step(scheduler, one)[0]) == [("short", 4, 1, True), ("long", 7, 7, False)]
    batch, _ = run_step(scheduler, one)
    assert shape(batch) == [("short", 5, 1, True), ("long", 14, 1, True)]
    assert (batch.num_tokens, batch.num_sampled) == (2, 2)
    assert shape(run_step(scheduler, one)[0]) == [("short", 6, 1, True), ("long", 15, 1, True)]


def test_several_prompts_share_a_step_and_the_last_takes_what_is_left():
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_request(name, [ord(name), 2, 3]))
    assert shape(run_step(scheduler, one)[0]) == [("a", 0, 3, True), ("b", 0, 3, True), ("c", 0, 2, False)]


def test_no_more_than_max_num_seqs_run_at_once():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, [1], max_tokens=2))
    assert ids(s.request for s in run_step(scheduler, one)[0].sequences) == ["a", "b"]
    assert scheduler.stats[:2] == (2, 1)
    assert ids(run_step(scheduler, one)[1]) == ["a", "b"]
    assert ids(s.request for s in run_step(scheduler, one)[0].sequences) == ["c"]


def test_a_lower_priority_number_runs_sooner_and_equal_ones_in_order_of_arrival():
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -3), ("e", 0)):
        scheduler.add(make_request(name, [1], priority=priority, max_tokens=1))
    order = []
    while scheduler.has_work:
        order += ids(run_step(scheduler, one)[1])
    assert order == ["d", "b", "e", "a", "c"]


def test_a_better_priority_does_not_wait_for_the_rest_of_a_long_prompt():
    scheduler, kv = make_scheduler(), ShadowKV(4, (0,))
    scheduler.add(make_request("long", range(20)))
    run_step(scheduler, one, kv)
    scheduler.add(make_request("equal", [1, 2]))
    scheduler.add(make_request("urgent", [3, 4, 5], priority=-1))
    assert shape(run_step(scheduler, one, kv)[0]) == [("urgent", 0, 3, True), ("long", 8, 5, False)]
    assert shape(run_step(scheduler, one, kv)[0]) == [("urgent", 3, 1, True), ("long", 13, 7, True)]
    assert shape(run_step(scheduler, one, kv)[0])[2:] == [("equal", 0, 2, True)]


def test_prefills_that_get_no_budget_keep_their_blocks_and_take_nobody_elses():
    scheduler = make_scheduler()
    for name, priority in (("last", 1), ("middle", 0), ("first", -1)):
        scheduler.add(make_request(name, [ord(name[0]), *range(19)], priority=priority))
        batch, _ = run_step(scheduler, one)
        assert shape(batch) == [(name, 0, 8, False)] and batch.preempted == ()
    assert scheduler.stats.num_running == 3


def test_without_work_a_step_is_empty():
    scheduler = make_scheduler()
    assert not scheduler.has_work
    batch, finished = run_step(scheduler, one)
    assert batch == ((), (), (), 0, 0) and finished == []


# -- the end of a request ----------------------------------------------------------------------------------------------


def outputs_of(script, *, prompt=(5,), max_model_len=32, eos=(7, 8), **params):
    scheduler = make_scheduler(max_model_len=max_model_len)
    request = make_request("r", prompt, eos=eos, **params)
    scheduler.add(request)
    given = iter(script)
    run_all(scheduler, lambda request: next(given), limit=100)
    assert scheduler.stats.num_blocks_used == 0
    return request.output_token_ids, request.finish_reason, request.stop_reason


def test_any_of_several_eos_ids_stops_and_stays_in_the_output():
    assert outputs_of([1, 8, 1]) == ([1, 8], "stop", None)
    assert outputs_of([7]) == ([7], "stop", None)


def test_a_stop_token_id_stops_and_is_the_stop_reason():
    assert outputs_of([1, 3, 1], stop_token_ids=(3,)) == ([1, 3], "stop", 3)


def test_ignored_eos_does_not_stop_but_the_same_id_as_stop_token_does():
    assert outputs_of([7, 8, 1], ignore_eos=True, max_tokens=3) == ([7, 8, 1], "length", None)
    assert outputs_of([7, 8, 1], ignore_eos=True, stop_token_ids=(8,), max_tokens=3) == ([7, 8], "stop", 8)


def test_no_stop_is_honoured_before_min_tokens():
    assert outputs_of([7, 3, 7], min_tokens=3, stop_token_ids=(3,)) == ([7, 3, 7], "stop", None)
    assert outputs_of([7, 1, 1], min_tokens=2, max_tokens=3) == ([7, 1, 1], "length", None)


def test_max_tokens_ends_with_length_and_a_stop_at_the_same_token_with_stop():
    assert outputs_of([1, 1], max_tokens=2) == ([1, 1], "length", None)
    assert outputs_of([1, 7], max_tokens=2) == ([1, 7], "stop", None)


def test_the_context_ends_a_request_that_has_no_max_tokens():
    assert outputs_of([1] * 50, prompt=range(10, 30)) == ([1] * 12, "length", None)
    assert outputs_of([1] * 50, prompt=range(10, 30), max_tokens=50) == ([1] * 12, "length", None)


def test_timings_follow_the_injected_clock():
    scheduler = make_scheduler()
    request = make_request("r", [1], max_tokens=2)
    scheduler.add(request)
    run_all(scheduler, one)
    times = request.timings
    assert (times.arrival, times.first_scheduled, times.first_token, times.finished) == (1.0, 2.0, 3.0, 4.0)


def test_a_given_arrival_is_kept():
    scheduler = make_scheduler()
    request = make_request("r", [1], max_tokens=1)
    request.timings.arrival = -5.0
    scheduler.add(request)
    assert request.timings.arrival == -5.0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused():
    scheduler = make_scheduler()
    with pytest.raises(RequestError, match="'r': the prompt is empty"):
        scheduler.add(make_request("r", []))
    assert not scheduler.has_work


def test_a_prompt_is_accepted_up_to_the_limit_that_leaves_one_output_token():
    scheduler = make_scheduler()
    fits = make_request("fits", range(31))
    scheduler.add(fits)
    run_all(scheduler, one)
    assert (fits.output_token_ids, fits.finish_reason) == ([1], "length")
    with pytest.raises(RequestTooLarge, match=r"'long': the prompt has 32 tokens; max_model_len=32 .* at most 31 "):
        scheduler.add(make_request("long", range(32)))
    assert not scheduler.has_work and scheduler.stats.num_blocks_used == 0


@pytest.mark.parametrize("policy", ["max_utilization", "guaranteed_no_evict"])
def test_a_request_that_could_never_fit_is_refused_with_the_numbers(policy):
    scheduler = make_scheduler(num_blocks=5, policy=policy)
    neighbour = make_request("neighbour", [1, 2, 3], max_tokens=5)
    scheduler.add(neighbour)
    run_step(scheduler, one)
    used = scheduler.stats.num_blocks_used
    assert used > 0
    with pytest.raises(RequestTooLarge) as caught:
        scheduler.add(make_request("big", range(10), max_tokens=8))
    for number in ("'big'", "10 tokens", "8 output tokens", "5 KV blocks of 4", "the cache has 4"):
        assert number in str(caught.value)
    assert scheduler.stats.num_blocks_used == used and scheduler.stats.num_waiting == 0
    fits = make_request("fits", range(10), max_tokens=7)  # 16 tokens in the cache: the last output needs no slot
    scheduler.add(fits)
    run_all(scheduler, one)
    assert len(fits.output_token_ids) == 7
    assert neighbour.output_token_ids == [1] * 5
    assert scheduler.stats.num_blocks_used == 0


def test_a_window_makes_a_long_request_fit():
    scheduler = make_scheduler(num_blocks=4, windows=(6,))
    kv = ShadowKV(4, (6,))
    request = make_request("r", range(20))
    scheduler.add(request)
    run_all(scheduler, one, kv)
    assert request.num_tokens == 32 and request.num_preemptions == 0


def test_a_duplicate_id_is_refused_until_the_first_has_finished():
    scheduler = make_scheduler()
    first = make_request("r", [1], max_tokens=1)
    scheduler.add(first)
    with pytest.raises(RequestError, match="'r': another unfinished request has this request_id"):
        scheduler.add(make_request("r", [2]))
    run_all(scheduler, one)
    scheduler.add(make_request("r", [2], max_tokens=1))
    run_all(scheduler, one)
    with pytest.raises(RequestError, match="'r' is already finished"):
        scheduler.add(first)


def test_a_token_the_model_does_not_have_is_refused_with_its_place():
    scheduler = make_scheduler(vocab_size=100)
    with pytest.raises(RequestError, match=r"'r': prompt token id 100 at position 2 is out of range.* 100 tokens"):
        scheduler.add(make_request("r", [1, 99, 100, 3]))
    scheduler.add(make_request("r", [1, 99], max_tokens=1))
    run_all(scheduler, one)


def test_a_refused_request_does_not_disturb_its_neighbours():
    scheduler = make_scheduler(vocab_size=100)
    neighbour = make_request("n", [1, 2], max_tokens=3)
    scheduler.add(neighbour)
    run_step(scheduler, one)
    used = scheduler.stats.num_blocks_used
    for bad in ([], [100], range(40)):
        with pytest.raises(RequestError):
            scheduler.add(make_request("bad", bad))
    assert scheduler.stats.num_blocks_used == used and scheduler.stats.num_waiting == 0
    run_all(scheduler, one)
    assert neighbour.output_token_ids == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer from 1"),
        ({"max_num_batched_tokens": 3}, r"max_num_batched_tokens \(3\) must be at least max_num_seqs \(4\)"),
        ({"max_model_len": 1}, "max_model_len must be an integer from 2"),
        ({"block_size": 0}, "block_size must be an integer from 1"),
        ({"num_blocks": 1}, "num_blocks must be an integer from 2"),
        ({"windows": ()}, "windows must name at least one KV group"),
        ({"windows": (-1,)}, "windows must be an integer from 0"),
        ({"policy": "best"}, "policy must be one of max_utilization, guaranteed_no_evict, not 'best'"),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        make_scheduler(**changes)
