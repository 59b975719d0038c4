"""What the first rank's loop says to the others, beside a fake model: everything, in order, before the step."""

from typing import Any

import pytest

from tritium.errors import EngineError, RequestError
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks.loop import RanksLoop
from tritium.runtime.ranks.messages import Drop, Renew, Take, Turn
from tritium.runtime.request import Request
from tritium.runtime.weight_updates import WeightUpdate, WeightUpdates
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler


class Updatable(FakeExecutor):
    """Has no room for other weights."""

    def stage(self, source: Any) -> Any:
        raise MemoryError("there is no room")

    def swap(self, staged: Any) -> None:
        raise AssertionError("nothing was staged")


class Others:
    """The other ranks, which only listen."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.failure: EngineError | None = None

    def send(self, turn: Turn) -> None:
        self.turns.append(turn)

    def fail(self, error: EngineError) -> None:
        self.failure = error


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def loop(others: Others) -> RanksLoop:
    executor, scheduler = Updatable(), make_scheduler()
    inner = EngineLoop(scheduler, executor, seed=1, updates=WeightUpdates(scheduler, executor))
    return RanksLoop(inner, others, lambda: None)  # type: ignore[arg-type]


def test_requests_go_with_the_seed_that_was_drawn_and_aborts_behind_them(loop: RanksLoop, others: Others) -> None:
    heard: list[StepOutput] = []
    given = SamplingParams(temperature=0.5, max_tokens=3, logit_bias={7: 1.5}, stop_token_ids=[3])
    request = Request(
        "one", [1, 2, 3], given, priority=2, cache_salt="salt", bad_word_ids=((5, 6),), eos_token_ids=(4,)
    )
    loop.submit(request, heard.append, is_streaming=True)
    loop.submit(Request("two", [4], SamplingParams(max_tokens=9)), lambda output: None)
    loop.abort("two")
    loop.step()
    loop.step()
    first, second = others.turns
    assert [type(command) for command in first.commands] == [Take, Take, Drop] and second.commands == []
    take = first.commands[0]
    assert isinstance(take, Take) and take.is_streaming
    again = take.request()
    assert again.params == request.params and again.params.seed is not None
    for name in ("request_id", "prompt_token_ids", "priority", "cache_salt", "bad_word_ids", "stop_ids"):
        assert getattr(again, name) == getattr(request, name)
    loop.step()
    assert [token for output in heard for token in output.token_ids] == expected_tokens([1, 2, 3], 3)


def test_new_weights_that_one_rank_cannot_take_are_the_end_of_all(loop: RanksLoop, others: Others, tmp_path) -> None:
    heard: list[StepOutput] = []
    loop.submit(Request("one", [1, 2, 3], SamplingParams(max_tokens=9)), heard.append)
    update = WeightUpdate("weights", "continue", path=tmp_path)
    loop.update_weights(update)
    loop.step()
    assert others.turns[0].commands[1] == Renew(str(tmp_path), "continue")
    assert isinstance(update.done.exception(), MemoryError)
    reason = "rank 0 could not take new weights: MemoryError: there is no room"
    assert str(loop.failure) == reason
    assert [(end.finish_reason, end.error) for end in heard] == [("error", f"EngineError: {reason}")]
    with pytest.raises(EngineError, match="there is no room"):
        loop.submit(Request("two", [4], SamplingParams()), heard.append)
    with pytest.raises(EngineError, match="there is no room"):
        loop.update_weights(update)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"request_id": "\ud800"}, "request_id"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"params": SamplingParams(stop=["\ud800"])}, "stop"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_any_rank_takes_it(
    given: dict[str, Any], name: str, loop: RanksLoop, others: Others
) -> None:
    request = Request(**{"request_id": "one", "prompt_token_ids": [1, 2, 3], "params": SamplingParams()} | given)
    with pytest.raises(
        RequestError, match=rf"{name} is .*ud800.*, which cannot be sent to the other ranks: give plain"
    ):
        loop.submit(request, lambda output: None)
    loop.abort(request.request_id)  # as whoever waits for it does
    loop.step()
    assert others.turns == [Turn([])] and not loop.has_work


@pytest.mark.parametrize("how", ["raised in a step", "told from outside"])
def test_what_a_step_cannot_survive_ends_every_rank_and_every_request(
    how: str, loop: RanksLoop, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[StepOutput] = []
    loop.submit(Request("one", [1, 2, 3], SamplingParams(max_tokens=9)), heard.append)
    if how == "raised in a step":
        monkeypatch.setattr(loop.scheduler, "schedule", lambda: 1 // 0)
        loop.step()
    else:
        loop.fail_all(ZeroDivisionError("division by zero"))
    assert str(others.failure).startswith("rank 0 failed: ZeroDivisionError: ")
    assert [end.finish_reason for end in heard] == ["error"] and not loop.has_work
    assert "ZeroDivisionError" in (heard[0].error or "")


def test_a_listener_that_fails_at_its_last_output_ends_no_later_request_of_that_name(loop: RanksLoop) -> None:
    def fail(output: StepOutput) -> None:
        raise ArithmeticError("nobody hears this")

    heard: list[StepOutput] = []
    loop.submit(Request("one", [1, 2, 3], SamplingParams(max_tokens=1)), fail)
    while loop.has_work:
        loop.step()
    loop.submit(Request("one", [1, 2, 3], SamplingParams(max_tokens=4)), heard.append)
    while loop.has_work:
        loop.step()
    assert [list(end.token_ids) for end in heard] == [expected_tokens([1, 2, 3], 4)]


def test_closing_while_a_step_hangs_ends_the_other_ranks(loop: RanksLoop, others: Others) -> None:
    loop.let_go()
    assert "the engine was closed, and a step of its ranks did not end" in str(others.failure)
