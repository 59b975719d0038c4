"""New weights under traffic, with a fake model: when they are exchanged, and what becomes of requests in flight."""

from collections import defaultdict
from itertools import pairwise

import pytest

from tritium.errors import ConfigError, EngineError, OutOfMemory
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.request import Request
from tritium.runtime.weight_updates import WeightUpdate, WeightUpdates
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import FakeExecutor, make_scheduler

PROMPTS = [[1], [2, 3, 4], list(range(5, 50)), [7, 7, 7, 7, 7], list(range(100, 140)), [9, 8]]
NUM_PIECES = 3


class Staged:
    """Weights that are a number; bound in three pieces."""

    def __init__(self, value):
        self.value, self.left = value, NUM_PIECES

    def advance(self):
        self.left -= 1
        if self.value == "breaks" and self.left == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return self.left >= 0


class Executor(FakeExecutor):
    """Its answers are its weights; it remembers which weights computed each position of each request."""

    def __init__(self):
        super().__init__()
        self.weights, self.num_swaps = 500, 0
        self.computed = defaultdict(dict)

    def stage(self, source):
        return Staged(source)

    def swap(self, staged):
        assert staged.left < 0
        self.weights = staged.value
        self.num_swaps += 1

    def execute(self, batch):
        for request, start, count, _ in batch.sequences:
            self.computed[request.request_id] |= dict.fromkeys(range(start, start + count), self.weights)
        return super().execute(batch)

    def _token(self, request):
        return super()._token(request)._replace(token_id=self.weights)


class Harness:
    def __init__(self, **limits):
        self.executor = Executor()
        scheduler = make_scheduler(**limits)
        self.loop = EngineLoop(scheduler, self.executor, seed=1, updates=WeightUpdates(scheduler, self.executor))
        self.heard = defaultdict(list)

    def submit(self, name, prompt, max_tokens=12):
        self.loop.submit(Request(name, prompt, SamplingParams(max_tokens=max_tokens)), self.heard[name].append)

    def update(self, value, on_inflight="recompute"):
        update = WeightUpdate(value, on_inflight)
        self.loop.update_weights(update)
        return update.done

    def steps(self, count=1000):
        for _ in range(count):
            if not self.loop.has_work:
                return
            self.loop.step()
        assert count < 1000, "the loop never ended"

    def tokens(self, name):
        return [token for output in self.heard[name] for token in output.token_ids]

    def generation(self, name):
        return self.heard[name][-1].weights_generation


@pytest.fixture
def harness():
    return Harness()


def start_all(harness):
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt)
    harness.steps(7)


def changes(tokens):
    return sum(a != b for a, b in pairwise(tokens))


def test_recompute_computes_every_position_again_and_keeps_the_outputs_so_far(harness):
    start_all(harness)
    done = harness.update(600)
    harness.steps()
    assert done.result() == 1
    for i, prompt in enumerate(PROMPTS):
        tokens = harness.tokens(str(i))
        assert len(tokens) == 12 and set(tokens) == {500, 600} and changes(tokens) == 1
        assert harness.executor.computed[str(i)] == dict.fromkeys(range(len(prompt) + 11), 600)
        assert harness.generation(str(i)) == 1
    assert harness.loop.scheduler.stats.num_blocks_used == 0


def test_continue_goes_on_with_what_the_old_weights_computed(harness):
    start_all(harness)
    harness.update(600, "continue")
    harness.steps()
    for i, prompt in enumerate(PROMPTS):
        tokens = harness.tokens(str(i))
        assert set(tokens) == {500, 600} and changes(tokens) == 1
        assert harness.executor.computed[str(i)][len(prompt) - 1] == 500
        assert harness.executor.computed[str(i)][len(prompt) + 10] == 600
    assert harness.loop.scheduler.stats.num_preemptions == 0


def test_finish_first_ends_what_runs_with_the_old_weights_and_starts_the_rest_with_the_new():
    harness = Harness(max_num_seqs=3, num_blocks=30)  # few blocks: a preempted request has run, too
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt, max_tokens=30)
    harness.steps(10)
    done = harness.update(600, "finish_first")
    harness.submit("late", [1, 2])
    harness.steps()
    assert done.result() == 1
    seen = [set(harness.tokens(str(i))) for i in range(6)]
    assert seen[:3] == [{500}] * 3 and seen[5] == {600} and all(len(s) == 1 for s in seen)
    assert set(harness.tokens("late")) == {600}
    for i in range(6):
        assert len(set(harness.executor.computed[str(i)].values())) == 1
        assert harness.generation(str(i)) == (seen[i] == {600})


def test_requests_go_on_while_new_weights_are_staged(harness):
    start_all(harness)
    before = harness.loop.scheduler.stats.num_steps
    done = harness.update(600)
    harness.steps(NUM_PIECES + 1)
    assert not done.done() and harness.loop.scheduler.stats.num_steps == before + NUM_PIECES + 1
    harness.steps(1)
    assert done.done()


def test_an_idle_loop_takes_new_weights_too_and_several_in_order(harness):
    done = [harness.update(600), harness.update(700), harness.update(800, "finish_first")]
    harness.steps()
    assert [d.result() for d in done] == [1, 2, 3]
    harness.submit("r", [1])
    harness.steps()
    assert set(harness.tokens("r")) == {800} and harness.generation("r") == 3


def test_cached_prefixes_of_old_weights_are_never_hit(harness):
    prompt = list(range(40))
    harness.submit("first", prompt)
    harness.steps()
    harness.submit("again", prompt)
    harness.steps()
    assert harness.heard["again"][-1].num_cached_tokens == 36
    harness.update(600, "continue")
    harness.steps()
    harness.submit("new", prompt)
    harness.steps()
    assert harness.heard["new"][-1].num_cached_tokens == 0


@pytest.mark.parametrize("on_inflight", ["recompute", "finish_first", "continue"])
def test_an_update_that_breaks_changes_nothing(harness, on_inflight):
    start_all(harness)
    broken = harness.update("breaks", on_inflight)
    harness.steps()
    with pytest.raises(OutOfMemory, match=r"new weights do not fit beside the old ones: .*can't allocate memory"):
        broken.result()
    assert harness.executor.num_swaps == 0 and harness.loop.scheduler.stats.num_preemptions == 0
    assert all(set(harness.tokens(str(i))) == {500} for i in range(6))
    harness.submit("later", [3])
    harness.steps()
    assert set(harness.tokens("later")) == {500} and harness.generation("later") == 0


def test_closing_tells_whoever_waits_for_an_update(harness):
    done = harness.update(600)
    harness.loop.close()
    with pytest.raises(EngineError, match="closed before the new weights were in use"):
        done.result()


def test_a_loop_without_weights_and_an_unknown_choice_are_refused():
    loop = EngineLoop(make_scheduler(), FakeExecutor())
    with pytest.raises(EngineError, match="no weights to update"):
        loop.update_weights(WeightUpdate(1))
    with pytest.raises(ConfigError, match="on_inflight must be one of recompute, finish_first, continue, not 'stop'"):
        WeightUpdate(1, "stop")
