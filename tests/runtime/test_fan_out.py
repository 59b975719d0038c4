"""One request, several samples: ids, holding back, aborts and failures, with a fake model."""

from collections import defaultdict

import pytest

from tritium.errors import RequestError
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.fan_out import FanOut
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request, SampledToken
from tritium.runtime.stream import ListenerGone
from tritium.sampling_params import SamplingParams, child_seed
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler

PROMPT = list(range(20, 50))


class Scored(FakeExecutor):
    """The fake model, with logprobs that depend on the request's seed: higher seeds are likelier."""

    def _token(self, request):
        token = super()._token(request)
        return token._replace(logprob=request.params.seed / 2.0**64 - 1) if isinstance(token, SampledToken) else token


class Harness:
    def __init__(self, **limits):
        self.executor = Scored()
        self.loop = EngineLoop(make_scheduler(**limits), self.executor, seed=1)
        self.heard: dict[str, list[StepOutput]] = defaultdict(list)

    def submit(self, request_id, prompt=PROMPT, *, is_streaming=False, listener=None, **params):
        request = Request(request_id, prompt, SamplingParams(**{"max_tokens": 6, **params}))
        self.loop.submit(request, listener or self.heard[request_id].append, is_streaming=is_streaming)
        return request

    def run(self):
        while self.loop.has_work:
            self.loop.step()
        assert self.loop.scheduler.stats.num_blocks_used == 0
        assert not self.loop.scheduler.has_work and not self.loop._fan_outs

    def tokens(self, request_id, index):
        return [t for out in self.heard[request_id] if out.sample_index == index for t in out.token_ids]


@pytest.fixture
def harness():
    return Harness()


@pytest.mark.parametrize("is_streaming", [True, False])
def test_each_sample_is_a_whole_output_of_the_parent(harness, is_streaming):
    harness.submit("r", n=4, is_streaming=is_streaming)
    harness.submit("other", [1, 2, 3])
    harness.run()
    assert {out.request_id for out in harness.heard["r"]} == {"r"}
    for index in range(4):
        assert harness.tokens("r", index) == expected_tokens(PROMPT, 6)
    finals = [out for out in harness.heard["r"] if out.finish_reason]
    assert sorted(out.sample_index for out in finals) == [0, 1, 2, 3]
    assert len(harness.heard["r"]) == (24 if is_streaming else 4)
    assert harness.tokens("other", 0) == expected_tokens([1, 2, 3], 6)


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(harness):
    harness.submit("r", n=5)
    computed, used = 0, []

    def count(batch):
        nonlocal computed
        computed += batch.num_tokens
        used.append(harness.loop.scheduler.stats.num_blocks_used)

    harness.executor.before_step = count
    harness.run()
    assert computed == 30 + 4 * 2 + 5 * 5  # 28 of the 30 prompt tokens fill blocks of 4; outputs but the last
    assert max(used) == 7 + 5 * 2


def test_without_prefix_caching_each_sample_computes_the_prompt():
    harness = Harness()
    harness.loop.scheduler._kv._enable_prefix_caching = False
    harness.submit("r", n=3)
    harness.run()
    assert [harness.tokens("r", index) for index in range(3)] == [expected_tokens(PROMPT, 6)] * 3
    assert harness.loop.scheduler.stats.num_prefix_hit_tokens == 0


def test_best_of_returns_the_likeliest_in_order_and_tells_nothing_before(harness):
    harness.submit("r", n=2, best_of=5, seed=3, is_streaming=True)
    steps = 0
    while harness.loop.has_work:
        assert not harness.heard["r"]
        harness.loop.step()
        steps += 1
    seeds = sorted((child_seed(3, index) for index in range(5)), reverse=True)
    outputs = harness.heard["r"]
    assert [out.sample_index for out in outputs] == [0, 1] and steps > 6
    assert [out.cumulative_logprob for out in outputs] == pytest.approx([6 * (s / 2.0**64 - 1) for s in seeds[:2]])
    assert all(out.finish_reason == "length" and out.logprobs == () for out in outputs)


def test_best_of_keeps_logprobs_that_were_asked_for_and_puts_failures_last(harness):
    harness.executor.nan_for = {"r", "r[2]"}
    harness.submit("r", n=3, best_of=4, logprobs=1)
    harness.run()
    outputs = harness.heard["r"]
    assert [out.finish_reason for out in outputs] == ["length", "length", "error"]
    assert [len(out.logprobs) for out in outputs] == [6, 6, 0]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("best_of", [None, 6])
def test_aborting_the_parent_aborts_every_child(harness, num_steps, best_of):
    harness.submit("gone", n=4, best_of=best_of)
    harness.submit("stays", [5, 6])
    for _ in range(num_steps):
        harness.loop.step()
    harness.loop.abort("gone")
    harness.loop.abort("gone")
    assert [out.finish_reason for out in harness.heard["gone"]] == ["abort"] * 4
    harness.run()
    assert harness.tokens("stays", 0) == expected_tokens([5, 6], 6)
    harness.submit("gone", [1])
    harness.run()
    assert harness.heard["gone"][-1].finish_reason == "length"


def test_one_sample_that_fails_leaves_the_others_alone(harness):
    harness.executor.nan_for = {"r[1]"}
    harness.submit("r", n=3)
    harness.run()
    reasons = {out.sample_index: out.finish_reason for out in harness.heard["r"]}
    assert reasons == {0: "length", 1: "error", 2: "length"}


def test_when_the_first_fails_in_the_prompt_the_others_compute_it_themselves(harness):
    harness.executor.nan_for = {"r"}
    harness.submit("r", n=3)
    harness.run()
    reasons = {out.sample_index: out.finish_reason for out in harness.heard["r"]}
    assert reasons == {0: "error", 1: "length", 2: "length"}
    assert harness.tokens("r", 2) == expected_tokens(PROMPT, 6)


@pytest.mark.parametrize(("error", "num_logged"), [(OSError("a bug"), 1), (ListenerGone("closed"), 0)])
def test_a_listener_that_raises_ends_all_samples(harness, caplog, error, num_logged):
    calls = []

    def broken(output):
        calls.append(output)
        raise error

    harness.submit("gone", n=8, max_tokens=50, is_streaming=True, listener=broken)
    harness.submit("stays", [2])
    harness.run()
    assert len(calls) == 1 and len(caplog.records) == num_logged
    assert harness.tokens("stays", 0) == expected_tokens([2], 6)
    assert harness.executor.num_steps == 6


def test_ids_of_running_samples_are_taken(harness):
    harness.submit("r", n=3, max_tokens=20)
    for taken in ("r", "r[2]"):
        with pytest.raises(RequestError, match="another unfinished request has this request_id"):
            harness.submit(taken, [1])
    harness.submit("s[1]", [1])
    with pytest.raises(RequestError, match=r"'s\[1\]'"):
        harness.submit("s", n=2)
    harness.run()
    assert harness.tokens("r", 2) == expected_tokens(PROMPT, 20)


def test_a_group_that_is_refused_leaves_nothing_behind(harness):
    with pytest.raises(RequestError, match="128"):
        harness.submit("r", list(range(128)), n=3)
    assert not harness.loop.has_work and not harness.loop._fan_outs


def test_samples_survive_preemption():
    harness = Harness(num_blocks=24)
    for name in "abc":
        harness.submit(name, [ord(name), *PROMPT[:10]], n=4, max_tokens=20)
    harness.run()
    assert harness.loop.scheduler.stats.num_preemptions > 0
    for name in "abc":
        for index in range(4):
            assert harness.tokens(name, index) == expected_tokens([ord(name), *PROMPT[:10]], 20)


def test_seeds_of_samples_differ_and_the_first_is_the_requests_own():
    request = Request("r", [1], SamplingParams(n=100, seed=2**64 - 1))
    seeds = [child.params.seed for child in FanOut(request, print).children]
    assert seeds[0] == 2**64 - 1 and len(set(seeds)) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    # SplitMix64's published first outputs for state 1234567 (Vigna, "splitmix64.c")
    assert [child_seed(1234567, i) for i in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
