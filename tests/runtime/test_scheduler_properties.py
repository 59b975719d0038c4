"""Random traffic, aborts, failures and resets against everything the scheduler promises (see `CheckedScheduler`)."""

import random
from collections import Counter
from itertools import cycle

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tritium.runtime.kv_manager import KVManager
from tritium.runtime.request import Request, RequestStatus
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.sampling_params import SamplingParams
from tritium.testing.checked_scheduler import CheckedScheduler

EOS, STOP, PLAIN = (7, 77), 8, 1
PREFIXES = ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9])
WINDOWS = [(0,), (0,), (3,), (0, 3), (5, 0, 2)]


def make_config(draw):
    """A random configuration; blocks for one or two of the longest requests, or not quite one: pressure is the rule."""
    block_size, windows, longest = draw([1, 2, 4]), draw(WINDOWS), draw(range(14, 25))
    scale = KVManager(num_blocks=2, block_size=block_size, windows=windows, fingerprint="", enable_prefix_caching=False)
    max_num_seqs = draw([1, 3, 4, 5])
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw([0, 0, 1, 2, 5, 9]),
        max_model_len=longest,
        block_size=block_size,
        num_blocks=max(2, 1 + scale.peak_blocks(longest - 1, 1) + draw(range(-2, 8))),
        windows=windows,
        policy=draw(["max_utilization", "max_utilization", "guaranteed_no_evict"]),
        enable_prefix_caching=draw([True, True, False]),
    )


def make_request(draw, request_id):
    max_tokens = draw([None, None, 10, 7, 5, 2, 1])
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(draw([0, 0, 1, 3]), max_tokens or 3),
        stop_token_ids=draw([(), (STOP,)]),
        ignore_eos=draw([True, False]),
        logprobs=draw([None, 0]),
    )
    prompt = draw(PREFIXES)[: draw([0, 3, 8, 8, 12])] + [draw([1, 2, 3]) for _ in range(draw([1, 1, 2, 5]))]
    return Request(request_id, prompt, params, draw([-1, 0, 0, 1]), None, EOS, draw(["", "", "", "tenant"]))


def disturb(checked, draw, request_id):
    """Something happens while a batch is being computed."""
    batch = checked.schedule()
    what = draw(["abort", "abort", "reset", "failure", "arrival"])
    if what == "abort" and checked.live:
        checked.abort(draw(sorted(checked.live)))
    elif what == "reset":
        checked.reset_prefix_cache(is_refit=True)
    elif what == "arrival":
        checked.add(make_request(draw, request_id))
    if what == "failure":
        checked.fail(batch)
    else:
        checked.update(batch, lambda: PLAIN)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(data=st.data())
    def start(self, data):
        self.num_added = 0
        self.checked = CheckedScheduler(data.draw(st.builds(make_config, choices)))
        self.traffic(data, num_requests=4, num_steps=0, tokens=[PLAIN])

    @rule(
        data=st.data(),
        num_requests=st.integers(0, 3),
        num_steps=st.integers(0, 12),
        tokens=st.lists(st.sampled_from([*[PLAIN] * 8, 2, 3, *EOS, STOP]), min_size=1, max_size=4),
    )
    def traffic(self, data, num_requests, num_steps, tokens):
        for _ in range(num_requests):
            self.num_added += 1
            self.checked.add(make_request(data.draw(choices), f"r{self.num_added}"))
        model = cycle(tokens)
        for _ in range(num_steps):
            self.checked.step(lambda: next(model))

    @precondition(lambda self: self.checked.live)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def abort(self, data, reason):
        self.checked.abort(data.draw(st.sampled_from(sorted(self.checked.live))), reason)

    @rule(is_refit=st.booleans())
    def reset_prefix_cache(self, is_refit):
        self.checked.reset_prefix_cache(is_refit=is_refit)

    @rule(data=st.data())
    def step_disturbed_in_flight(self, data):
        self.num_added += 1
        disturb(self.checked, data.draw(choices), f"r{self.num_added}")

    @invariant()
    def blocks_are_where_the_tables_say_and_hold_what_their_names_say(self):
        if hasattr(self, "checked"):
            self.checked.check_blocks()
            self.checked.check_cached_content()

    def teardown(self):
        if hasattr(self, "checked"):
            self.checked.run_out(lambda: PLAIN)


choices = st.randoms(use_true_random=False).map(lambda source: source.choice)

TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def soak(seed, num_rounds):
    """A long life of one scheduler under random traffic; returns it, what was seen, and every batch as plain data."""
    source = random.Random(seed)
    draw = source.choice
    checked, trace = CheckedScheduler(make_config(draw)), []
    for index in range(num_rounds):
        for _ in range(draw([0, 0, 1, 1, 2])):
            checked.add(make_request(draw, f"r{index}.{source.random()}"))
        if checked.live and source.random() < 0.05:
            checked.abort(draw(sorted(checked.live)))
        preempted = [name for name in checked.live if checked.live[name].status is RequestStatus.PREEMPTED]
        if preempted and source.random() < 0.05:
            checked.abort(draw(preempted))
        if source.random() < 0.01:
            checked.reset_prefix_cache(is_refit=draw([True, False]))
        if source.random() < 0.05:
            disturb(checked, draw, f"d{index}")
        batch = checked.schedule()
        trace.append(
            [(s.request.request_id, *s[1:], [list(table) for table in s.request.block_tables]) for s in batch.sequences]
        )
        checked.update(batch, lambda: draw([*[PLAIN] * 12, 2, 3, *EOS, STOP]))
        checked.check_blocks()
        checked.check_cached_content()
    checked.run_out(lambda: PLAIN)
    return checked, trace


@pytest.mark.parametrize("num_lives", [160, pytest.param(1000, marks=pytest.mark.full)])
def test_long_random_traffic_meets_every_case_and_breaks_no_promise(num_lives):
    seen = Counter()
    for seed in range(num_lives):
        seen += soak(seed, num_rounds=60)[0].seen
    for case in (
        "refused",
        "prefix hit",
        "prefix hit at resume",
        "preempted in prefill",
        "preempted with outputs",
        "finished by stop",
        "finished by length",
        "abort while waiting, otherwise",
        "abort while running, in prefill",
        "abort while running, otherwise",
        "abort while preempted, otherwise",
    ):
        assert seen[case] >= 5, f"{case!r} was hardly tested: {seen}"


@pytest.mark.parametrize("seed", [3, 5])
def test_equal_traffic_gives_equal_batches_and_block_tables(seed):
    assert soak(seed, num_rounds=40)[1] == soak(seed, num_rounds=40)[1]
