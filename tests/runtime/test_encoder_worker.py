"""An encoder's worker, with a fake runner: texts of one request are samples of it, batches hold those of many."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tritium.engine.manifest import EncoderInfo
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_worker import EncoderWorker
from tritium.wire import Abort, Encode, Output, Submit, Text


class FakeRunner:
    """An embedding is [first token id, number of tokens]. It fails on token 13."""

    info = EncoderInfo(num_token_types=2)
    vocab_size, max_model_len, max_tokens, max_requests = 100, 8, 8, 3

    def __init__(self, num_in_flight: int) -> None:
        self.num_in_flight = num_in_flight
        self.batches: list[int] = []

    def collect(self, launched: list[torch.Tensor]) -> list[torch.Tensor]:
        return launched

    def launch(self, batch: Sequence[EncoderRequest]) -> list[torch.Tensor]:
        self.batches.append(len(batch))
        if any(13 in request.token_ids for request in batch):
            raise ArithmeticError("13")
        return [torch.tensor([float(one.token_ids[0]), float(len(one.token_ids))]) for one in batch]


@pytest.fixture(params=[1, 2], ids=["as on a CPU", "as on a GPU"])
def worker(request: pytest.FixtureRequest) -> EncoderWorker:
    return EncoderWorker(FakeRunner(request.param), embedding_size=2)  # type: ignore[arg-type]


def outputs(worker: EncoderWorker) -> list[Output]:
    """All there are when nothing waits any more."""
    while worker.has_work:
        worker.step()
    return worker.take_outputs()


def texts(*ids: list[int]) -> list[Text]:
    return [Text(one) for one in ids]


def test_each_text_has_one_output_in_its_place_and_requests_share_batches(worker: EncoderWorker) -> None:
    worker.apply(Encode("a", texts([1, 2, 3], [4], [5, 6])))
    worker.apply(Encode("b", [Text([7, 8], [0, 1])]))
    assert worker.stats == {"num_running": 0, "num_waiting": 4}
    found = outputs(worker)
    assert worker._runner.batches == [3, 1]  # type: ignore[attr-defined]
    assert {(one.request_id, one.sample_index): list(np.frombuffer(one.embedding, "<f4")) for one in found} == {
        ("a", 0): [1, 3],
        ("a", 1): [4, 1],
        ("a", 2): [5, 2],
        ("b", 0): [7, 2],
    }
    assert all(one.finish_reason == "stop" and one.arrival <= one.finished for one in found)
    assert worker.stats["num_waiting"] == 0 and worker.take_outputs() == []


def test_what_is_aborted_is_passed_over_and_forgotten(worker: EncoderWorker) -> None:
    worker.apply(Encode("a", texts(*[[1]] * 7)))
    worker.step()
    over = (
        [] if worker.stats["num_running"] else [("a", 0), ("a", 1), ("a", 2)]
    )  # what is on its way is passed over too
    worker.apply(Abort("a"))
    worker.apply(Abort("nobody"))
    assert worker.stats["num_waiting"] == 0
    worker.apply(Encode("b", texts([2])))
    assert [(one.request_id, one.sample_index) for one in outputs(worker)] == [*over, ("b", 0)]


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        (Encode("x", texts([1], [])), "RequestError", "the prompt has no tokens"),
        (Encode("x", texts([1] * 9)), "RequestTooLarge", "the prompt has 9 tokens, the model takes 8"),
        (Encode("x", texts([100])), "RequestError", "100 is no token id of this model"),
        (Encode("x", [Text([1], [2])]), "RequestError", "2 is no token type"),
        (Submit("x", [1], {}, True), "RequestError", "this engine is an encoder and generates no text"),
    ],
)
def test_a_wrong_request_is_refused_as_a_whole_and_its_neighbour_is_not(
    worker: EncoderWorker, command: Encode | Submit, kind: str, message: str
) -> None:
    worker.apply(command)
    worker.apply(Encode("good", texts([1])))
    refused, good = outputs(worker)
    assert (refused.request_id, refused.refusal, refused.finish_reason) == ("x", kind, "error")
    assert message in (refused.error or "")
    assert (good.request_id, good.finish_reason) == ("good", "stop")


def test_a_batch_that_fails_ends_its_texts_with_an_error_and_the_next_one_runs(worker: EncoderWorker) -> None:
    worker.apply(Encode("a", texts([13])))
    worker.step()
    worker.apply(Encode("b", texts([1])))
    failed, good = outputs(worker)
    assert (failed.finish_reason, failed.error, failed.embedding) == ("error", "ArithmeticError: 13", b"")
    assert (good.request_id, good.finish_reason) == ("b", "stop")
