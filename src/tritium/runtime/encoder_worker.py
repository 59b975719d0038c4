"""The work of an engine process that embeds texts: calls in, batches of their texts computed side by side."""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError, RequestError
from tritium.runtime.encoder_queue import EncoderQueue
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.engine_loop import error_text
from tritium.wire import Abort, Command, Encode, Output

logger = logging.getLogger("tritium")


class _Place(NamedTuple):
    """Where a text belongs: a sample of a request."""

    request_id: str
    sample_index: int


class EncoderWorker:
    """Each text of a request is one sample of it and has one output. All calls belong on one thread."""

    is_stalled = False  # every text fits a batch by itself

    def __init__(self, runner: EncoderRunner, embedding_size: int) -> None:
        self._runner = runner
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
        return cls(EncoderRunner(engine, config), size)

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
        """Texts that wait; between two batches none is being computed."""
        return {"num_running": 0, "num_waiting": sum(self._num_left.values())}

    @property
    def has_work(self) -> bool:
        """True while texts wait, be it to be passed over because their request was aborted."""
        return bool(self._queue)

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
        """Compute one batch; False when all that waited was aborted."""
        batch = [(one, place) for one, place in self._queue.next_batch() if place.request_id in self._num_left]
        if not batch:
            return False
        try:
            embeddings: Sequence[torch.Tensor | None] = self._runner.compute([one for one, _ in batch])
            error = None
        except Exception as raised:  # one batch must not end the process
            logger.exception("a batch of the encoder failed")
            embeddings, error = [None] * len(batch), error_text(raised)
        for (_, place), embedding in zip(batch, embeddings, strict=True):
            self._finish(place, embedding, error)
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

    def _finish(self, place: _Place, embedding: torch.Tensor | None, error: str | None) -> None:
        self._outputs.append(
            Output(
                place.request_id,
                "",
                [],
                finish_reason="stop" if embedding is not None else "error",
                error=error,
                arrival=self._arrivals[place.request_id],
                finished=time.monotonic(),
                sample_index=place.sample_index,
                embedding=embedding.numpy().astype("<f4").tobytes() if embedding is not None else b"",
            )
        )
        self._num_left[place.request_id] -= 1
        if not self._num_left[place.request_id]:
            self._forget(place.request_id)

    def _forget(self, request_id: str) -> None:
        """What of it still waits in the queue is passed over."""
        self._num_left.pop(request_id, None)
        self._arrivals.pop(request_id, None)
