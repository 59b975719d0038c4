"""The work of an engine process that embeds texts: calls in, batches of their texts computed side by side."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError, RequestError
from tritium.runtime.assemble import make_encoder_runner
from tritium.runtime.encoder_pipeline import EncoderPipeline
from tritium.runtime.encoder_queue import EncoderQueue
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.engine_loop import error_text
from tritium.wire import Abort, Command, Encode, Output

if TYPE_CHECKING:
    from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner


class _Place(NamedTuple):
    """Where a text belongs: a sample of a request."""

    request_id: str
    sample_index: int


class EncoderWorker:
    """Each text of a request is one sample of it and has one output. All calls belong on one thread."""

    is_stalled = False  # every text fits a batch by itself

    def __init__(self, runner: "EncoderRunner | GpuEncoderRunner", embedding_size: int) -> None:
        self._runner = runner
        self._pipeline: EncoderPipeline[_Place] = EncoderPipeline(runner)
        self._embedding_size = embedding_size
        self._queue: EncoderQueue[_Place] = EncoderQueue(runner.max_tokens, runner.max_requests)
        self._arrivals: dict[str, float] = {}  # by id, of requests that have texts waiting
        self._num_left: dict[str, int] = {}
        self._outputs: list[Output] = []

    @classmethod
    def load(cls, engine: Engine, config: RuntimeConfig) -> "EncoderWorker":
        """Raises `EngineError` for an encoder without embeddings; what its memory or kernels raise."""
        if "hidden" not in engine.plan.outputs:
            raise EngineError(
                f"{engine.path} ({engine.manifest.model.get('architecture', '')}) scores texts and has no embeddings, "
                "which is what the server serves: use LLM.classify or LLM.score"
            )
        size = engine.plan.value(engine.plan.outputs["hidden"]).shape[-1]
        assert isinstance(size, int)
        return cls(make_encoder_runner(engine, config), size)

    @property
    def limits(self) -> dict[str, Any]:
        """max_model_len: of a text, in tokens. max_num_batched_tokens, max_num_seqs: of a batch. embedding_size: D."""
        return {
            "max_model_len": self._runner.max_model_len,
            "max_num_batched_tokens": self._runner.max_tokens,
            "max_num_seqs": self._runner.max_requests,
            "embedding_size": self._embedding_size,
        }

    @property
    def stats(self) -> dict[str, int]:
        """Texts that are being computed, on a GPU, and texts that wait."""
        num_running = len(self._pipeline)
        return {"num_running": num_running, "num_waiting": max(0, sum(self._num_left.values()) - num_running)}

    @property
    def has_work(self) -> bool:
        """True while texts are computed or wait, be it to be passed over because their request was aborted."""
        return bool(self._queue or self._pipeline)

    def apply(self, command: Command) -> None:
        """Take a request, or forget one. A request that cannot be taken has a refusal as its only output."""
        if isinstance(command, Abort):
            self._forget(command.request_id)
            return
        try:
            if not isinstance(command, Encode):
                raise RequestError("this engine is an encoder and generates no text")
            requests = [self._request(text.token_ids, text.token_types) for text in command.texts]
        except RequestError as error:
            self._outputs.append(
                Output(
                    command.request_id, "", [], finish_reason="error", error=str(error), refusal=type(error).__name__
                )
            )
            return
        self._arrivals[command.request_id] = time.monotonic()
        self._num_left[command.request_id] = len(requests)
        self._queue.add([(one, _Place(command.request_id, i)) for i, one in enumerate(requests)])

    def step(self) -> bool:
        """Launch a batch, if one waits, and finish what is over; False when all that waited was aborted."""
        batch = [(one, place) for one, place in self._queue.next_batch() if place.request_id in self._num_left]
        if not (batch or self._pipeline):
            return False
        for place, found in self._pipeline.step(batch):
            if place.request_id in self._num_left:  # not aborted meanwhile
                self._finish(place, found)
        return True

    def take_outputs(self) -> list[Output]:
        """What there is since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _request(self, token_ids: Sequence[int], token_types: Sequence[int]) -> EncoderRequest:
        info = self._runner.info
        request = EncoderRequest(
            token_ids=token_ids,
            token_types=token_types or [0] * len(token_ids),
            task="embed",
            pooling=info.pooling,
            is_normalized=info.is_normalized,
        )
        request.check(
            max_model_len=self._runner.max_model_len,
            vocab_size=self._runner.vocab_size,
            num_token_types=info.num_token_types,
        )
        return request

    def _finish(self, place: _Place, found: torch.Tensor | Exception) -> None:
        self._outputs.append(
            Output(
                place.request_id,
                "",
                [],
                finish_reason="error" if isinstance(found, Exception) else "stop",
                error=error_text(found) if isinstance(found, Exception) else None,
                arrival=self._arrivals[place.request_id],
                finished=time.monotonic(),
                sample_index=place.sample_index,
                embedding=found.numpy().astype("<f4").tobytes() if isinstance(found, torch.Tensor) else b"",
            )
        )
        self._num_left[place.request_id] -= 1
        if not self._num_left[place.request_id]:
            self._forget(place.request_id)

    def _forget(self, request_id: str) -> None:
        """What of it still waits in the queue is passed over."""
        self._num_left.pop(request_id, None)
        self._arrivals.pop(request_id, None)
