"""The overlapped loop with a fake model that is one step ahead: the same outputs as without, whatever ends when."""

from collections import defaultdict

import pytest

from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.overlap_loop import OverlapLoop
from tritium.runtime.request import PENDING, Request, RowError, SampledToken, ScheduledBatch
from tritium.runtime.slots import RequestSlots
from tritium.runtime.weight_updates import WeightUpdate, WeightUpdates
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler, next_token

PROMPTS = [[1], [2, 3, 4], list(range(5, 50)), [7, 7, 7, 7, 7], list(range(100, 140)), [9, 8]]


class LaunchedFake:
    """What the fake device has computed, known to the host when it collects."""

    def __init__(self, tokens: list[SampledToken | RowError], *, is_sampled_on_device: bool) -> None:
        self.tokens = tokens
        self.is_sampled_on_device = is_sampled_on_device


class FakeDevice(FakeExecutor):
    """Keeps each request's tokens itself, and fills in those that the host does not know. host_only: not so."""

    def __init__(self) -> None:
        super().__init__()
        self.host_only: set[str] = set()
        self.num_pending_inputs = 0
        self._last: dict[str, int] = {}
        self._slots = RequestSlots(8)

    def launch(self, batch: ScheduledBatch) -> LaunchedFake:
        self.num_steps += 1
        self._slots.admit(batch)
        tokens: list[SampledToken | RowError] = []
        for request, _, _, is_sampled in batch.sequences:
            if request.request_id in self.fails_on:
                raise ArithmeticError(f"kernel failed for {request.request_id}")
            known = list(request.token_ids)
            if known[-1] == PENDING:
                self.num_pending_inputs += 1
                known[-1] = self._last[request.request_id]
            assert PENDING not in known
            if is_sampled:
                self._last[request.request_id] = next_token(known)
                is_nan = request.request_id in self.nan_for
                tokens.append(RowError("not finite") if is_nan else SampledToken(next_token(known)))
        on_device = not self.host_only & {s.request.request_id for s in batch.sequences}
        return LaunchedFake(tokens, is_sampled_on_device=on_device)

    def collect(self, step: LaunchedFake) -> list[SampledToken | RowError]:
        return step.tokens


class Harness:
    def __init__(self, **limits: int) -> None:
        self.device = FakeDevice()
        self.loop = OverlapLoop(make_scheduler(**limits), self.device, seed=1)
        self.heard: dict[str, list[StepOutput]] = defaultdict(list)

    def submit(self, request_id: str, prompt: list[int], **params: object) -> None:
        is_streaming = bool(params.pop("is_streaming", False))
        request = Request(request_id, prompt, SamplingParams(**{"max_tokens": 6, **params}))
        self.loop.submit(request, self.heard[request_id].append, is_streaming=is_streaming)

    def run(self) -> None:
        for _ in range(1000):
            if not self.loop.has_work:
                assert self.loop.scheduler.stats.num_blocks_used == 0
                return
            self.loop.step()
        raise AssertionError("the loop never ended")

    def tokens(self, request_id: str) -> list[int]:
        return [t for output in self.heard[request_id] for t in output.token_ids]


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 21}, {"max_num_batched_tokens": 9, "max_num_seqs": 3}], ids=str)
@pytest.mark.parametrize("is_streaming", [False, True])
def test_every_request_gets_its_own_tokens(limits: dict[str, int], is_streaming: bool) -> None:
    harness = Harness(**limits)
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt, is_streaming=is_streaming, max_tokens=20)
    harness.run()
    for i, prompt in enumerate(PROMPTS):
        assert harness.tokens(str(i)) == expected_tokens(prompt, 20)
        assert harness.heard[str(i)][-1].finish_reason == "length"
    assert harness.device.num_pending_inputs > 10, "nothing overlapped: the test tests nothing"
    assert ("num_blocks" in limits) == (harness.loop.scheduler.stats.num_preemptions > 0)


@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_stop_is_seen_one_step_late_and_the_surplus_is_dropped(position: int) -> None:
    harness, expected = Harness(), expected_tokens(PROMPTS[1], 6)
    harness.submit("stops", PROMPTS[1], stop_token_ids=[expected[position]])
    harness.submit("other", PROMPTS[0], max_tokens=12)
    harness.run()
    assert harness.tokens("stops") == expected[: position + 1]
    last = harness.heard["stops"][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", expected[position])
    assert harness.tokens("other") == expected_tokens(PROMPTS[0], 12)


def test_the_same_with_and_without_overlap_when_prefixes_are_shared() -> None:
    for rounds in range(2):
        overlapped, plain = Harness(), EngineLoop(make_scheduler(), FakeExecutor(), seed=1)
        heard: dict[str, list[StepOutput]] = defaultdict(list)
        for i in range(6):
            prompt = [*range(30), i // 2]
            overlapped.submit(str(i), prompt, max_tokens=9 + i)
            request = Request(str(i), prompt, SamplingParams(max_tokens=9 + i))
            plain.submit(request, heard[str(i)].append)
            if i % 2:
                overlapped.run()
                while plain.has_work:
                    plain.step()
        for i in range(6):
            assert overlapped.tokens(str(i)) == list(heard[str(i)][-1].token_ids), rounds
        assert overlapped.loop.scheduler.stats.num_prefix_hit_tokens > 0


def test_what_only_the_host_can_sample_waits_and_disturbs_nobody() -> None:
    harness = Harness()
    harness.device.host_only.add("1")
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt, max_tokens=3 + i)
    harness.run()
    assert all(harness.tokens(str(i)) == expected_tokens(prompt, 3 + i) for i, prompt in enumerate(PROMPTS))


def test_the_host_samples_when_it_knows_every_token_before() -> None:
    class Strict(FakeDevice):
        def launch(self, batch: ScheduledBatch) -> LaunchedFake:
            self.running = [sequence.request for sequence in batch.sequences]
            return super().launch(batch)

        def collect(self, step: LaunchedFake) -> list[SampledToken | RowError]:
            if not step.is_sampled_on_device:
                assert not any(PENDING in request.token_ids for request in self.running)
            return super().collect(step)

    harness = Harness()
    harness.device = Strict()
    harness.loop = OverlapLoop(make_scheduler(), harness.device, seed=1)
    harness.device.host_only.add("1")
    for i, prompt in enumerate(PROMPTS):
        harness.submit(str(i), prompt, max_tokens=5 + i)
    harness.run()
    assert harness.device.num_pending_inputs > 0, "nothing overlapped: the test tests nothing"
    assert all(harness.tokens(str(i)) == expected_tokens(prompt, 5 + i) for i, prompt in enumerate(PROMPTS))
    assert all(output.error is None for outputs in harness.heard.values() for output in outputs)


def test_an_abort_in_flight_drops_the_pending_token() -> None:
    harness = Harness()
    harness.submit("a", PROMPTS[1], max_tokens=50)
    harness.submit("b", PROMPTS[0], max_tokens=8)
    for _ in range(4):
        harness.loop.step()
    harness.loop.abort("a")
    harness.run()
    assert harness.heard["a"][-1].finish_reason == "abort"
    assert harness.tokens("a") == expected_tokens(PROMPTS[1], 4)
    assert harness.tokens("b") == expected_tokens(PROMPTS[0], 8)


def test_a_row_without_numbers_and_a_step_that_raises_end_their_own() -> None:
    harness = Harness()
    harness.device.nan_for.add("nan")
    harness.submit("nan", PROMPTS[1])
    harness.submit("fine", PROMPTS[0])
    harness.run()
    assert harness.heard["nan"][-1].error == "not finite" and harness.tokens("nan") == []
    assert harness.tokens("fine") == expected_tokens(PROMPTS[0], 6)
    harness.submit("late", PROMPTS[3], max_tokens=40)
    for _ in range(3):
        harness.loop.step()
    harness.device.fails_on.add("late")
    harness.run()
    assert harness.heard["late"][-1].error == "ArithmeticError: kernel failed for late"
    assert harness.tokens("late") == expected_tokens(PROMPTS[3], 3)


class Piecewise:
    """New weights, bound in three pieces."""

    def __init__(self) -> None:
        self.left = 3

    def advance(self) -> bool:
        self.left -= 1
        return self.left >= 0


class UpdatableDevice(FakeDevice):
    """Notes at each exchange whether a request had a token that the host did not know."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: list[bool] = []
        self.requests: set[Request] = set()

    def launch(self, batch: ScheduledBatch) -> LaunchedFake:
        self.requests |= {sequence.request for sequence in batch.sequences}
        return super().launch(batch)

    def stage(self, source: object) -> Piecewise:
        return Piecewise()

    def swap(self, staged: Piecewise) -> None:
        assert staged.left < 0
        self.exchanges.append(any(request.has_pending for request in self.requests))


@pytest.mark.parametrize("on_inflight", ["recompute", "continue", "finish_first"])
def test_new_weights_come_when_no_token_is_pending_and_every_request_is_answered(on_inflight: str) -> None:
    device, scheduler = UpdatableDevice(), make_scheduler()
    loop = OverlapLoop(scheduler, device, seed=1, updates=WeightUpdates(scheduler, device))
    heard: dict[int, list[StepOutput]] = defaultdict(list)
    for i, prompt in enumerate(PROMPTS):
        loop.submit(Request(str(i), prompt, SamplingParams(max_tokens=20)), heard[i].append)
    for _ in range(4):
        loop.step()
    update = WeightUpdate("new", on_inflight)  # type: ignore[arg-type]
    loop.update_weights(update)
    assert device.num_pending_inputs > 0
    while loop.has_work:
        loop.step()
    assert update.done.result(0) == 1 and device.exchanges == [False]
    for i, prompt in enumerate(PROMPTS):
        assert list(heard[i][-1].token_ids) == expected_tokens(prompt, 20)


def test_slots_are_given_back_when_nothing_runs_for_a_while() -> None:
    harness = Harness()
    for i in range(20):
        harness.submit(str(i), [i], max_tokens=1 + i % 3)
        harness.run()
    assert all(len(harness.tokens(str(i))) == 1 + i % 3 for i in range(20))
