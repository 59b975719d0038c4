"""Timing steps: batches take turns, rounds of one turn belong together; decoders and encoders are timed."""

import pytest

from tritium.compiler import build
from tritium.errors import ConfigError, EngineError
from tritium.runtime.step_times import WARM_UP_ROUNDS, StepTimer, TimedBatch, medians, rounds_in_turn
from tritium.testing.tiny_encoders import make_encoder


class Counted(TimedBatch):
    """Its nth round takes n seconds a step."""

    def __init__(self, name, calls):
        super().__init__([], None)
        self.name, self.calls, self.count = name, calls, 0

    def round(self, clock):
        self.calls.append(self.name)
        self.count += 1
        return [float(self.count), float(self.count)]


def test_batches_run_in_turn_and_every_second_turn_in_reverse():
    calls = []
    a, b = rounds_in_turn([Counted("a", calls), Counted("b", calls)], 3)
    assert calls == ["a", "b", "b", "a"] * ((WARM_UP_ROUNDS + 3) // 2) + ["a", "b"] * (WARM_UP_ROUNDS % 2 == 0)
    assert a == b == [[float(n)] * 2 for n in range(WARM_UP_ROUNDS + 1, WARM_UP_ROUNDS + 4)]
    assert medians(a) == [WARM_UP_ROUNDS + 2.0] * 2


def test_a_batch_calls_each_step_in_order():
    called = []
    seconds = TimedBatch([lambda: called.append("first"), lambda: called.append("second")], None).round()
    assert called == ["first", "second"] and len(seconds) == 2


def test_a_number_of_rounds_that_says_nothing_is_refused():
    with pytest.raises(ConfigError, match="repeats must be an integer from 1 to 10000, not 0"):
        rounds_in_turn([], 0)


def test_an_encoders_text_is_timed_and_it_decodes_nothing(tmp_path):
    path, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    engine = build(path, output_dir=tmp_path / "bert")
    timer = StepTimer(engine, num_threads=1)
    times = timer.prefill(20, 1)
    assert len(times) == len(engine.plan.steps) and min(times) > 0
    with pytest.raises(EngineError, match=r"bert is an encoder: it decodes nothing; time a text instead"):
        timer.decode(1, 8)
    with pytest.raises(ConfigError, match="the number of tokens must be an integer from 1 to 72, not 73"):
        timer.prefill(73)


def test_one_text_is_timed_with_torchs_kernels_which_take_more_rows_than_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr("tritium.runtime.kernel_choice.available_backends", lambda device="cpu": frozenset({"eager"}))
    path, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    engine = build(path, output_dir=tmp_path / "bert")
    assert {step.kernel.partition(".")[0] for step in engine.plan.steps} == {"eager"}
    assert len(StepTimer(engine, num_threads=1).prefill(20, 1)) == len(engine.plan.steps)
