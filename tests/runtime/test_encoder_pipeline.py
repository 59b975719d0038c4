"""How many batches of an encoder are on their way, and that one which fails takes no other with it."""

from typing import Any

import pytest

from tritium.runtime.encoder_pipeline import EncoderPipeline


class FakeRunner:
    """Batches are lists of numbers, of which the negative ones cannot be launched and 13 cannot be collected."""

    def __init__(self, num_in_flight: int) -> None:
        self.num_in_flight = num_in_flight
        self.said: list[tuple[str, list[int]]] = []

    def launch(self, batch: list[int]) -> list[int]:
        self.said.append(("launch", batch))
        if min(batch) < 0:
            raise MemoryError(f"{min(batch)} cannot be launched")
        return batch

    def collect(self, batch: list[int]) -> list[int]:
        self.said.append(("collect", batch))
        if 13 in batch:
            raise ValueError("13 cannot be collected")
        return [10 * number for number in batch]


def pipeline_of(num_in_flight: int) -> tuple[Any, FakeRunner]:
    runner = FakeRunner(num_in_flight)
    pipeline: Any = EncoderPipeline(runner)  # type: ignore[arg-type]
    return pipeline, runner


def test_on_a_cpu_a_batch_is_over_before_the_next_one_begins() -> None:
    pipeline, runner = pipeline_of(1)
    assert pipeline.step([(1, "a"), (2, "b")]) == [("a", 10), ("b", 20)]
    assert pipeline.step([(3, "c")]) == [("c", 30)] and not pipeline
    assert [what for what, _ in runner.said] == ["launch", "collect", "launch", "collect"]


def test_on_a_gpu_the_next_batch_is_launched_before_the_last_one_is_waited_for() -> None:
    pipeline, runner = pipeline_of(2)
    assert pipeline.step([(1, "a"), (2, "b")]) == [] and len(pipeline) == 2
    assert pipeline.step([(3, "c")]) == [("a", 10), ("b", 20)] and len(pipeline) == 1
    assert pipeline.step([]) == [("c", 30)] and not pipeline
    assert pipeline.step([]) == []
    assert runner.said == [
        ("launch", [1, 2]),
        ("launch", [3]),
        ("collect", [1, 2]),
        ("collect", [3]),
    ]


@pytest.mark.parametrize(("bad", "message"), [(-4, "-4 cannot be launched"), (13, "13 cannot be collected")])
def test_a_batch_that_fails_ends_with_its_error_in_its_turn_and_no_other_does(bad: int, message: str) -> None:
    pipeline, _ = pipeline_of(2)
    pipeline.step([(1, "a")])
    assert pipeline.step([(bad, "b"), (5, "c")]) == [("a", 10)]
    (first, error), (second, same) = pipeline.step([(6, "d")])
    assert (first, second) == ("b", "c") and error is same and str(error) == message
    assert pipeline.step([]) == [("d", 60)]
