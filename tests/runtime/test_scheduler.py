"""The scheduler's rules, one example each. What must hold always is in test_scheduler_properties.py."""

import pytest

from tritium.errors import ConfigError, RequestError, RequestTooLarge
from tritium.runtime.request import RequestStatus, SampledToken
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.testing.scheduling import FakeClock, ShadowKV, make_request, run_all, run_step


def make_scheduler(**changes):
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "max_model_len": 32,
        "block_size": 4,
        "num_blocks": 33,
        **changes,
    }
    return Scheduler(SchedulerConfig(**settings), FakeClock())


def shape(batch):
    return [(s.request.request_id, s.start, s.num_tokens, s.is_sampled) for s in batch.sequences]


def ids(requests):
    return [request.request_id for request in requests]


def one(request):
    return 1


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
    with pytest.raises(RequestTooLarge) as caught:
        scheduler.add(make_request("big", range(10), max_tokens=8))
    for number in ("'big'", "10 tokens", "8 output tokens", "5 KV blocks of 4", "the cache has 4"):
        assert number in str(caught.value)
    fits = make_request("fits", range(10), max_tokens=7)  # 16 tokens in the cache: the last output needs no slot
    scheduler.add(fits)
    run_all(scheduler, one)
    assert len(fits.output_token_ids) == 7


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


# -- abort and failure -------------------------------------------------------------------------------------------------


def test_abort_while_waiting_in_the_second_chunk_decoding_and_in_flight():
    for num_steps in range(4):
        scheduler = make_scheduler()
        request = make_request("r", range(15))
        scheduler.add(request)
        for _ in range(num_steps):
            run_step(scheduler, one)
        assert request.num_output_tokens == max(0, num_steps - 1)
        assert scheduler.abort("r") is request
        assert (request.finish_reason, request.is_finished) == ("abort", True)
        assert not scheduler.has_work and scheduler.stats.num_blocks_used == 0
        assert scheduler.abort("r") is None
        assert ids(scheduler.schedule().finished) == ["r"]


def test_abort_of_an_unknown_id_does_nothing():
    assert make_scheduler().abort("nobody") is None


def test_a_token_that_arrives_after_the_abort_is_dropped_and_the_neighbour_gets_its_own():
    scheduler = make_scheduler()
    requests = [make_request(name, [1, 2], max_tokens=4) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    batch = scheduler.schedule()
    scheduler.abort("a")
    assert scheduler.update(batch, [SampledToken(5), SampledToken(6)]) == []
    assert [request.output_token_ids for request in requests] == [[], [6]]


def test_a_stop_string_ends_a_request_with_its_reason():
    scheduler = make_scheduler()
    request = make_request("r", [1])
    scheduler.add(request)
    run_step(scheduler, one)
    scheduler.abort("r", reason="stop", stop_reason="END")
    assert (request.finish_reason, request.stop_reason, request.output_token_ids) == ("stop", "END", [1])


def test_abort_of_a_preempted_request():
    scheduler, requests = preempting_pair()
    while not requests[1].num_preemptions:
        run_step(scheduler, one)
    assert requests[1].status is RequestStatus.PREEMPTED
    assert scheduler.abort("b") is requests[1]
    run_all(scheduler, one)
    assert requests[0].num_output_tokens == 10 and scheduler.stats.num_blocks_used == 0


def test_a_failed_step_ends_only_its_own_requests_and_shares_nothing_of_them():
    scheduler = make_scheduler(max_num_seqs=1)
    for name in "ab":
        scheduler.add(make_request(name, range(6), max_tokens=1))
    batch = scheduler.schedule()
    failed = scheduler.fail(batch)
    assert [(r.request_id, r.finish_reason) for r in failed] == [("a", "error")]
    assert scheduler.stats.num_blocks_used == 0
    batch, finished = run_step(scheduler, one)
    assert shape(batch) == [("b", 0, 6, True)] and ids(batch.finished) == ["a"]
    assert finished[0].output_token_ids == [1]


def test_what_a_failed_request_had_published_in_earlier_steps_is_not_shared_either():
    scheduler = make_scheduler()
    assert [cached_tokens(scheduler, range(9)) for _ in range(2)] == [0, 8]
    scheduler.add(make_request("broken", range(20)))
    scheduler.add(make_request("neighbour", range(50, 60)))
    run_step(scheduler, one)
    run_step(scheduler, one)
    scheduler.abort("broken", reason="error")
    run_step(scheduler, one)
    scheduler.abort("neighbour")
    assert cached_tokens(scheduler, range(20)) == 0
    assert cached_tokens(scheduler, range(50, 60)) == 8


def test_steps_must_alternate_and_bring_as_many_tokens_as_were_sampled():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", [1]))
    batch = scheduler.schedule()
    with pytest.raises(RuntimeError, match=r"schedule\(\) was called again"):
        scheduler.schedule()
    with pytest.raises(RuntimeError, match="0 tokens came back for 1 sampled"):
        scheduler.update(batch, [])
    scheduler.update(batch, [SampledToken(1)])
    for again in (lambda: scheduler.update(batch, [SampledToken(1)]), lambda: scheduler.fail(batch)):
        with pytest.raises(RuntimeError, match="the batch that schedule"):
            again()


# -- blocks run out ----------------------------------------------------------------------------------------------------


def preempting_pair(**changes):
    """Two requests that fit at first (1 and 1 of 4 blocks, one in reserve each), not to their ends (4 and 4)."""
    scheduler = make_scheduler(num_blocks=5, max_model_len=16, **changes)
    requests = [make_request(name, [ord(name), 2, 3, 4], max_tokens=10) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def test_max_utilization_preempts_the_last_arrived_and_recomputes_its_outputs():
    scheduler, (a, b) = preempting_pair()
    kv, tokens = ShadowKV(4, (0,)), iter(range(100, 200))
    batch, _ = run_step(scheduler, lambda request: next(tokens), kv)
    while not batch.preempted:
        batch, _ = run_step(scheduler, lambda request: next(tokens), kv)
    assert ids(batch.preempted) == ["b"] and b.status is RequestStatus.PREEMPTED
    outputs_then = list(b.output_token_ids)
    assert outputs_then and b.block_tables == []
    scheduler.add(make_request("newcomer", [9], max_tokens=1))
    batch, _ = run_step(scheduler, lambda request: next(tokens), kv)
    assert "newcomer" not in ids(s.request for s in batch.sequences)  # b is ahead in line
    run_all(scheduler, lambda request: next(tokens), kv)
    assert b.output_token_ids[: len(outputs_then)] == outputs_then
    assert (a.num_output_tokens, b.num_output_tokens) == (10, 10)
    assert (a.num_preemptions, b.num_preemptions, scheduler.stats.num_preemptions) == (0, 1, 1)


def test_a_preempted_request_finds_its_own_blocks_again_when_they_were_not_needed():
    scheduler, (_, b) = preempting_pair()
    while not b.num_preemptions:
        run_step(scheduler, one)
    scheduler.abort("a")
    batch, _ = run_step(scheduler, one)
    start, num_tokens = batch.sequences[0][1:3]
    assert start >= 4 and start + num_tokens + 1 == b.num_tokens  # and one more sampled
    assert b.num_cached_tokens == 0  # that is about the prompt, when it first ran


def test_the_lowest_priority_is_preempted_first_whenever_it_came():
    scheduler = make_scheduler(num_blocks=5, max_model_len=16)
    low = make_request("low", [1, 2, 3, 4], max_tokens=10, priority=5)
    high = make_request("high", [5, 2, 3, 4], max_tokens=10)
    scheduler.add(low)
    scheduler.add(high)
    run_all(scheduler, one)
    assert (low.num_preemptions > 0, high.num_preemptions) == (True, 0)
    assert low.timings.finished > high.timings.finished


def test_a_prefill_that_is_ahead_takes_the_blocks_of_a_decode_that_was_already_in_the_batch():
    scheduler, kv = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2, num_blocks=11), ShadowKV(4, (0,))
    behind = make_request("behind", [1, 2, 3, 4], priority=1)
    scheduler.add(behind)
    while behind.num_output_tokens < 2:
        run_step(scheduler, one, kv)
    ahead = make_request("ahead", range(10, 34))
    scheduler.add(ahead)
    batch, _ = run_step(scheduler, one, kv)
    while not batch.preempted:
        assert ids(s.request for s in batch.sequences) == ["behind", "ahead"]
        batch, _ = run_step(scheduler, one, kv)
    assert ids(batch.preempted) == ["behind"] and ids(s.request for s in batch.sequences) == ["ahead"]
    assert batch.num_tokens == 1 and not ahead.output_token_ids
    run_all(scheduler, one, kv)
    assert (behind.num_tokens, ahead.num_tokens) == (32, 32)


def test_guaranteed_no_evict_waits_until_a_request_fits_to_its_end():
    scheduler, (a, b) = preempting_pair(policy="guaranteed_no_evict")
    while not a.is_finished:
        batch, _ = run_step(scheduler, one)
        assert ids(s.request for s in batch.sequences) == ["a"]
    run_all(scheduler, one)
    assert b.num_output_tokens == 10 and scheduler.stats.num_preemptions == 0


def test_guaranteed_no_evict_admits_what_max_tokens_lets_fit():
    scheduler = make_scheduler(num_blocks=5, policy="guaranteed_no_evict")
    for name in "ab":
        scheduler.add(make_request(name, [1, 2, 3, 4], max_tokens=5))  # 8 tokens in the cache: 2 of 4 blocks
    assert len(run_step(scheduler, one)[0].sequences) == 2


def test_guaranteed_no_evict_does_not_count_on_shared_blocks_that_part_behind_a_window():
    scheduler = make_scheduler(
        max_num_seqs=2, max_num_batched_tokens=2, windows=(8,), num_blocks=6, policy="guaranteed_no_evict"
    )
    kv, first, second = ShadowKV(4, (8,)), *(make_request(name, range(9)) for name in ("first", "second"))
    scheduler.add(first)
    while not first.output_token_ids:
        run_step(scheduler, one, kv)
    scheduler.add(second)  # 3 blocks each of 5; two of them are shared now, none later
    while not first.is_finished:
        assert ids(s.request for s in run_step(scheduler, one, kv)[0].sequences) == ["first"]
    run_all(scheduler, one, kv)
    assert (second.num_tokens, scheduler.stats.num_preemptions) == (32, 0)


def test_max_utilization_keeps_a_block_for_each_running_request_before_it_admits_another():
    scheduler = make_scheduler(num_blocks=6)  # 5 usable
    for name in "abc":
        scheduler.add(make_request(name, [ord(name), 1, 2], max_tokens=17))  # 2 blocks each to start
    assert ids(s.request for s in run_step(scheduler, one)[0].sequences) == ["a", "b"]
    batch, _ = run_step(scheduler, one)
    assert ids(s.request for s in batch.sequences) == ["a", "b"]  # 3 free, but one each is for a and b
    assert scheduler.stats.num_blocks_used == 2


# -- the prefix cache --------------------------------------------------------------------------------------------------


def cached_tokens(scheduler, prompt, *, salt="", kv=None):
    request = make_request("probe", prompt, max_tokens=1)
    request.cache_salt = salt
    scheduler.add(request)
    run_all(scheduler, one, kv)
    return request.num_cached_tokens


def test_a_second_prompt_reuses_the_full_blocks_of_the_first_but_its_last_token():
    scheduler, kv = make_scheduler(), ShadowKV(4, (0,))
    assert cached_tokens(scheduler, range(14), kv=kv) == 0
    assert cached_tokens(scheduler, range(14), kv=kv) == 12
    assert cached_tokens(scheduler, range(12), kv=kv) == 8
    assert cached_tokens(scheduler, [*range(6), 99, *range(7, 14)], kv=kv) == 4
    assert cached_tokens(scheduler, [99, *range(1, 14)], kv=kv) == 0
    stats = scheduler.stats
    assert (stats.num_prefix_hit_tokens, stats.num_prefix_query_tokens) == (24, 68)


def test_outputs_are_cached_too_so_a_conversation_continues_from_them():
    scheduler = make_scheduler()
    first = make_request("first", range(5), max_tokens=8)
    scheduler.add(first)
    run_all(scheduler, one)
    assert cached_tokens(scheduler, [*first.token_ids, 50]) == 12


def test_only_equal_salts_share():
    scheduler = make_scheduler()
    assert [cached_tokens(scheduler, range(9), salt=salt) for salt in ("a", "b", "a", "")] == [0, 0, 8, 0]


def test_reset_forgets_all_and_what_is_in_flight_is_not_shared_afterwards():
    scheduler = make_scheduler()
    cached_tokens(scheduler, range(9))
    running = make_request("running", range(20, 29), max_tokens=3)
    scheduler.add(running)
    run_step(scheduler, one)
    scheduler.reset_prefix_cache("new weights")
    run_all(scheduler, one)
    assert cached_tokens(scheduler, range(9)) == 0
    assert cached_tokens(scheduler, [*range(20, 29), 1, 1]) == 0
    assert cached_tokens(scheduler, range(9)) == 8


def test_prefix_caching_can_be_switched_off():
    scheduler = make_scheduler(enable_prefix_caching=False)
    assert [cached_tokens(scheduler, range(9)) for _ in range(2)] == [0, 0]


def test_the_oldest_prefix_is_evicted_first_when_blocks_are_needed():
    scheduler = make_scheduler(num_blocks=9)
    for first in (100, 200, 300):  # three blocks each, of eight
        cached_tokens(scheduler, range(first, first + 12))
    hits = [cached_tokens(scheduler, [*range(first, first + 12), 0]) for first in (300, 200)]
    assert hits == [12, 12]
    assert cached_tokens(scheduler, [*range(100, 112), 0]) < 12


def test_a_window_frees_blocks_while_the_request_runs():
    scheduler, kv = make_scheduler(windows=(0, 5)), ShadowKV(4, (0, 5))
    request = make_request("r", range(4))
    scheduler.add(request)
    for _ in range(25):
        run_step(scheduler, one, kv)
    whole, windowed = request.block_tables
    assert len(whole) == len(windowed) and 0 not in whole
    assert windowed[:-2] == [0] * (len(windowed) - 2) and 0 not in windowed[-2:]
    assert scheduler.stats.num_blocks_used == len(whole) + 2
