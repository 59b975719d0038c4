"""Aborts, failures, too few blocks, shared prefixes: the scheduler's rules for what does not go smoothly."""

import pytest

from tritium.runtime.request import RequestStatus, SampledToken
from tritium.testing.scheduling import ShadowKV, ids, make_request, make_scheduler, run_all, run_step, shape
from tritium.testing.scheduling import always_one as one


def preempting_pair(**changes):
    """Two requests that fit at first (1 and 1 of 4 blocks, one in reserve each), not to their ends (4 and 4)."""
    scheduler = make_scheduler(num_blocks=5, max_model_len=16, **changes)
    requests = [make_request(name, [ord(name), 2, 3, 4], max_tokens=10) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def cached_tokens(scheduler, prompt, *, salt="", kv=None):
    request = make_request("probe", prompt, max_tokens=1)
    request.cache_salt = salt
    scheduler.add(request)
    run_all(scheduler, one, kv)
    return request.num_cached_tokens


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
