"""The loop with a fake model: outputs, aborts, failures that stay where they belong."""

from collections import defaultdict

import pytest

from tritium.errors import RequestError, RequestTooLarge
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request
from tritium.runtime.stream import ListenerGone
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler

PROMPTS = [[1], [2, 3, 4], list(range(5, 50)), [7, 7, 7, 7, 7], list(range(100, 140)), [9, 8]]


class Harness:
    """A loop, its fake model, and what its listeners heard."""

    def __init__(self, **limits):
        self.executor = FakeExecutor()
        self.loop = EngineLoop(make_scheduler(**limits), self.executor, seed=1)
        self.heard: dict[str, list[StepOutput]] = defaultdict(list)

    def submit(self, request_id, prompt, *, is_streaming=False, **params):
        request = Request(request_id, prompt, SamplingParams(**{"max_tokens": 6, **params}))
        self.loop.submit(request, self.heard[request_id].append, is_streaming=is_streaming)
        return request

    def run(self):
        for _ in range(1000):
            if not self.loop.has_work:
                return
            self.loop.step()
        raise AssertionError("the loop never ended")

    def tokens(self, request_id):
        return [t for output in self.heard[request_id] for t in output.token_ids]

    def assert_pool_is_full(self):
        assert self.loop.scheduler.stats.num_blocks_used == 0
        assert not self.loop.scheduler.has_work


@pytest.fixture
def harness():
    return Harness()


def test_every_request_gets_its_own_tokens_whoever_else_runs(harness):
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt)
    harness.run()
    for i, prompt in enumerate(PROMPTS):
        assert harness.tokens(str(i)) == expected_tokens(prompt, 6)
        assert harness.heard[str(i)][-1].finish_reason == "length"
    harness.assert_pool_is_full()


def test_the_executor_hears_of_every_end_also_when_nothing_else_was_running(harness):
    told = []
    harness.executor.before_step = lambda batch: told.extend(request.request_id for request in batch.finished)
    harness.submit("left", [1, 2], max_tokens=20)
    harness.loop.step()
    harness.loop.abort("left")
    harness.loop.step()  # as the engine thread does after every message, with nothing to compute
    harness.submit("next", [3], max_tokens=2)
    harness.run()
    assert told == ["left"]


def test_tokens_survive_preemption():
    harness = Harness(num_blocks=20)
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt, max_tokens=20)
    harness.run()
    assert harness.loop.scheduler.stats.num_preemptions > 0
    for i, prompt in enumerate(PROMPTS):
        assert harness.tokens(str(i)) == expected_tokens(prompt, 20)
    harness.assert_pool_is_full()


def test_a_streaming_listener_hears_every_step_and_others_only_the_end(harness):
    harness.submit("stream", [1, 2], is_streaming=True)
    harness.submit("whole", [1, 2])
    harness.run()
    assert [len(output.token_ids) for output in harness.heard["stream"]] == [1] * 6
    assert [output.finish_reason for output in harness.heard["stream"]] == [None] * 5 + ["length"]
    assert [len(output.token_ids) for output in harness.heard["whole"]] == [6]


def test_a_failing_step_ends_only_the_requests_that_were_in_it():
    harness = Harness(max_num_seqs=1)
    harness.executor.fails_on = {"bad"}
    harness.submit("before", [1])
    harness.submit("bad", [2])
    harness.submit("after", [3])
    harness.run()
    last = harness.heard["bad"][-1]
    assert last.finish_reason == "error"
    assert last.error == "ArithmeticError: kernel failed for bad"
    assert harness.tokens("before") == expected_tokens([1], 6)
    assert harness.tokens("after") == expected_tokens([3], 6)
    harness.assert_pool_is_full()


def test_a_step_that_fails_midway_keeps_the_tokens_made_before_it(harness):
    harness.executor.before_step = lambda batch: (
        harness.executor.fails_on.add("r") if harness.executor.num_steps == 4 else None
    )
    harness.submit("r", [5, 6])
    harness.run()
    assert harness.tokens("r") == expected_tokens([5, 6], 3)
    assert harness.heard["r"][-1].finish_reason == "error"
    harness.assert_pool_is_full()


def test_logits_that_are_not_numbers_end_only_their_own_request(harness):
    harness.executor.nan_for = {"nan"}
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt)
    harness.submit("nan", [4, 4, 4])
    harness.run()
    assert harness.heard["nan"][-1].finish_reason == "error"
    assert "not finite" in harness.heard["nan"][-1].error
    assert harness.tokens("nan") == []
    for i, prompt in enumerate(PROMPTS):
        assert harness.tokens(str(i)) == expected_tokens(prompt, 6)
    harness.assert_pool_is_full()


def test_an_executor_that_returns_too_few_tokens_fails_the_step(harness):
    harness.executor.execute = lambda batch: []
    harness.submit("r", [1])
    harness.run()
    assert "0 tokens for 1 sequences" in harness.heard["r"][-1].error
    harness.assert_pool_is_full()


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_an_abort_ends_one_request_at_any_moment(harness, num_steps):
    harness.submit("gone", PROMPTS[2])
    harness.submit("stays", PROMPTS[1])
    for _ in range(num_steps):
        harness.loop.step()
    harness.loop.abort("gone")
    harness.loop.abort("gone")
    harness.loop.abort("nobody")
    harness.run()
    assert [output.finish_reason for output in harness.heard["gone"]] == ["abort"]
    assert harness.tokens("stays") == expected_tokens(PROMPTS[1], 6)
    harness.assert_pool_is_full()


@pytest.mark.parametrize(("error", "is_logged"), [(OSError("a bug"), True), (ListenerGone("closed"), False)])
def test_a_listener_that_raises_ends_its_own_request(harness, caplog, error, is_logged):
    def broken(output):
        raise error

    harness.loop.submit(Request("gone", [1], SamplingParams(max_tokens=50)), broken, is_streaming=True)
    harness.submit("stays", [2])
    harness.run()
    assert harness.tokens("stays") == expected_tokens([2], 6)
    assert harness.executor.num_steps == 6
    assert bool(caplog.records) == is_logged
    harness.assert_pool_is_full()


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], RequestError, "empty"),
        ([5, 1000], RequestError, "1000"),
        (list(range(128)), RequestTooLarge, "128"),
    ],
)
def test_an_invalid_request_is_refused_and_leaves_nothing_behind(harness, prompt, error, words):
    with pytest.raises(error, match=words):
        harness.submit("bad", prompt)
    assert not harness.loop.has_work
    harness.submit("good", [1])
    harness.run()
    assert harness.heard["bad"] == []
    assert harness.tokens("good") == expected_tokens([1], 6)


def test_requests_without_a_seed_get_one_that_the_engine_seed_repeats():
    seeds = []
    for _ in range(2):
        harness = Harness()
        seeds.append([harness.submit(str(i), [1]).params.seed for i in range(3)])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
    assert Harness().submit("own", [1], seed=5).params.seed == 5


def test_logprobs_reach_the_listener_when_asked_for(harness):
    harness.submit("with", [1], logprobs=2)
    harness.submit("without", [1])
    harness.run()
    assert [token.token_id for token in harness.heard["with"][-1].logprobs] == expected_tokens([1], 6)
    assert harness.heard["with"][-1].logprobs[0].top_logprobs == ((1, -0.5), (2, -1.5))
    assert harness.heard["without"][-1].logprobs == ()


def test_closing_ends_every_request_with_abort(harness):
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt)
    harness.loop.step()
    harness.loop.close()
    assert all(harness.heard[str(i)][-1].finish_reason == "abort" for i in range(len(PROMPTS)))
    harness.assert_pool_is_full()


class BrokenTokenizer:
    """Fails at one token."""

    special_token_ids = frozenset()

    def __init__(self, bad_token):
        self._bad_token = bad_token

    def decoding_stages(self):
        return []

    def token(self, token_id):
        if token_id == self._bad_token:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte")
        return "t"


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_output_that_cannot_be_decoded_ends_alone(is_streaming):
    harness = Harness()
    harness.loop = EngineLoop(harness.loop.scheduler, harness.executor, BrokenTokenizer(expected_tokens([1], 3)[2]))
    harness.submit("bad", [1], is_streaming=is_streaming)
    harness.submit("good", [2], is_streaming=is_streaming)
    harness.run()
    assert harness.heard["bad"][-1].finish_reason == "error"
    assert "UnicodeDecodeError" in harness.heard["bad"][-1].error
    assert harness.tokens("good") == expected_tokens([2], 6)
    assert "".join(output.text for output in harness.heard["good"]) == "tttttt"
    harness.assert_pool_is_full()


def test_an_id_may_be_used_again_as_soon_as_its_request_has_ended(harness):
    answers = []

    def again(output):
        answers.append((output.finish_reason, list(output.token_ids)))
        if len(answers) < 5:
            harness.loop.submit(Request("same", [len(answers)], SamplingParams(max_tokens=2)), again)

    harness.loop.submit(Request("same", [0], SamplingParams(max_tokens=2)), again)
    harness.submit("other", [9], max_tokens=20)
    harness.run()
    assert answers == [("length", expected_tokens([i], 2)) for i in range(5)]
    assert harness.tokens("other") == expected_tokens([9], 20)
    harness.assert_pool_is_full()
