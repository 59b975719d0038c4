"""Embeddings, classes and scores of texts: what `LLM` does with an encoder's engine.

One thread computes (runtime/encoder_thread.py); this side only tokenises, waits and shapes the answers as vLLM does.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, RequestError
from tritium.progress import progress_bar
from tritium.prompts import Prompt, as_prompts
from tritium.runtime.assemble import make_encoder_runner
from tritium.runtime.encoder_request import POOLINGS, EncoderRequest, Pooling, Task
from tritium.runtime.encoder_thread import EncoderThread
from tritium.text.tokenizer import Tokenizer
from tritium.text.tokenizer_files import ADD_TOKENIZER

TASKS: dict[str, tuple[Task, ...]] = {  # by output of the engine
    "hidden": ("embed", "token_embed"),
    "row scores": ("classify",),
    "token scores": ("token_classify",),
}
P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class PoolingOutput:
    """data: float32 [D] or [C], or one row a token."""

    data: torch.Tensor


@dataclasses.dataclass(frozen=True)
class EmbeddingOutput:
    """embedding: D numbers."""

    embedding: list[float]


@dataclasses.dataclass(frozen=True)
class ClassificationOutput:
    """probs: one number a label, in the order of `labels`."""

    probs: list[float]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ScoringOutput:
    """score: how well the two texts belong together."""

    score: float


@dataclasses.dataclass(frozen=True)
class PoolingRequestOutput(Generic[P]):
    """The answer to one prompt."""

    request_id: str
    outputs: P
    prompt_token_ids: list[int]
    finished: Literal[True] = True


class TextEncoder:
    """An encoder's engine, running. Threads may share one: what they ask for is computed in common batches."""

    def __init__(self, engine: Engine, config: RuntimeConfig, tokenizer: Tokenizer | None) -> None:
        """Raises `EngineError`, `KernelError` or `OutOfMemory`."""
        self._engine, self._tokenizer = engine, tokenizer
        self._ids = map("request-{}".format, itertools.count())
        self._thread = EncoderThread(partial(make_encoder_runner, engine, config))
        self._info = self._thread.runner.info
        weakref.finalize(self, self._thread.close)

    @property
    def max_model_len(self) -> int:
        """The longest prompt, in tokens."""
        return self._thread.runner.max_model_len

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the model can be asked for, the usual one first."""
        outputs = self._engine.plan.outputs
        if "hidden" in outputs:
            return TASKS["hidden"]
        by_row = self._engine.plan.value(outputs["scores"]).shape[0] == "R"
        return TASKS["row scores" if by_row else "token scores"]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_progress: bool | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """Score pairs of texts; see `LLM.score`."""
        first, second = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            counts = f"{len(first)} and {len(second)}"
            raise RequestError(f"data_1 must be one text, or as many as data_2: there are {counts}")
        if "embed" in self.tasks:
            texts = list(dict.fromkeys([*first, *second]))
            found = self.encode([self.tokens(t, truncate_prompt_tokens) for t in texts], is_normalized=True)
            vectors = dict(zip(texts, found, strict=True))
            return [
                self._output(
                    ScoringOutput(float(vectors[a].outputs.data @ vectors[b].outputs.data)),
                    [*vectors[a].prompt_token_ids, *vectors[b].prompt_token_ids],
                )
                for a, b in zip(first, second, strict=True)
            ]
        if self.tasks != ("classify",) or len(self._info.labels) != 1:
            raise RequestError(
                f"score needs an encoder for embeddings, or one that classifies pairs by one label: "
                f"{self._engine.path} has {len(self._info.labels)} labels for {self.tasks[0]}"
            )
        pairs = [self._pair(a, b, truncate_prompt_tokens) for a, b in zip(first, second, strict=True)]
        scored = self.encode(pairs, use_progress=use_progress)
        return [_with(o, ScoringOutput(float(o.outputs.data[0]))) for o in scored]

    def close(self) -> None:
        """End the thread; what waits ends with an `EngineError`. May be called again."""
        self._thread.close()

    def encode(
        self,
        tokens: Sequence[tuple[list[int], list[int]]],
        task: Task | None = None,
        *,
        pooling: Pooling | None = None,
        is_normalized: bool | None = None,
        use_progress: bool | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """One answer for each of `tokens`, ids and types; the rest as in `LLM.encode`."""
        task = self._task(task)
        if is_normalized is None:
            is_normalized = self._info.is_normalized and task == "embed"
        requests = [
            EncoderRequest(
                token_ids=ids,
                token_types=types,
                task=task,
                pooling=self._pooling(pooling),
                is_normalized=is_normalized,
            )
            for ids, types in tokens
        ]
        answers = self._thread.submit(requests)
        try:
            with progress_bar(len(requests), use_progress) as bar:
                for request, answer in zip(requests, answers, strict=True):
                    answer.result()
                    bar.finish_one(len(request.token_ids))
        finally:
            for answer in answers:  # an exception here (Ctrl-C, a failed batch) takes back what is not computed yet
                answer.cancel()
        return [
            self._output(PoolingOutput(answer.result()), list(request.token_ids))
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _output(self, outputs: P, token_ids: list[int]) -> PoolingRequestOutput[P]:
        return PoolingRequestOutput(next(self._ids), outputs, token_ids)

    def _task(self, task: Task | None) -> Task:
        if task is None:
            return self.tasks[0]
        if task not in self.tasks:
            raise RequestError(
                f"pooling_task={task!r}: {self._engine.path} ({self._engine.manifest.model['architecture']}) can "
                f"{' or '.join(self.tasks)}"
            )
        return task

    def _pooling(self, pooling: Pooling | None) -> Pooling:
        chosen = pooling or self._info.pooling
        if chosen not in POOLINGS:
            raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}, not {chosen!r}")
        if chosen == "pooler" and "pooled" not in self._engine.plan.outputs:
            raise RequestError(f"pooling='pooler': {self._engine.path} has no pooler; use cls, mean or last")
        return chosen

    def tokens(self, prompt: Prompt, limit: int | None) -> tuple[list[int], list[int]]:
        """Token ids and types of one prompt, cut to `limit` tokens if that is given."""
        length = self._limit(limit)
        if isinstance(prompt, str):
            return self._with_types(*self._need_tokenizer().encode_pair(prompt, max_len=length))
        ids = list(prompt)[:length]
        return ids, [0] * len(ids)

    def _pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        return self._with_types(*self._need_tokenizer().encode_pair(first, second, max_len=self._limit(limit)))

    def _with_types(self, ids: list[int], types: list[int]) -> tuple[list[int], list[int]]:
        return ids, types if self._info.num_token_types > 1 else [0] * len(ids)

    def _limit(self, limit: int | None) -> int | None:
        """truncate_prompt_tokens as a number of tokens; -1 is the longest prompt."""
        if limit is None:
            return None
        is_number = isinstance(limit, int) and not isinstance(limit, bool)
        if not is_number or not (limit == -1 or 1 <= limit <= self.max_model_len):
            raise RequestError(f"truncate_prompt_tokens must be -1 or from 1 to {self.max_model_len}, not {limit!r}")
        return self.max_model_len if limit == -1 else limit

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                f"text needs a tokenizer; pass token ids: {self._engine.path} has no tokenizer.json; {ADD_TOKENIZER}"
            )
        return self._tokenizer


class EncoderMethods:
    """The part of `LLM` that encodes. An engine is an encoder's or it generates; what it is not is a `ConfigError`."""

    engine: Engine
    _encoder: TextEncoder | None = None

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_task: Task | None = None,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        use_progress: bool | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Encode one prompt or many (text or token ids); the outputs, `.outputs.data`, are in the order of the prompts.

        pooling_task: "embed" one embedding [D], "token_embed" [T, D], "classify" probabilities [C], "token_classify"
            [T, C]; None: what the model is for.
        pooling: the embedding is that of the first token ("cls") or the last, their mean, or the model's own "pooler";
            normalize: to length 1. None: as the sentence-transformers files say, else "cls" and normalised.
        truncate_prompt_tokens: longer prompts are cut to so many tokens, -1 to the longest possible; None: refused.

        Raises `RequestError` for the first prompt that is invalid or too long; then none of them is answered.
        """
        encoder = self._need_encoder("encode")
        tokens = [encoder.tokens(prompt, truncate_prompt_tokens) for prompt in as_prompts(prompts)]
        return encoder.encode(tokens, pooling_task, pooling=pooling, is_normalized=normalize, use_progress=use_progress)

    def embed(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """`encode` for one embedding a prompt, as lists of numbers, `.outputs.embedding`; the same options."""
        self._need_encoder("embed")
        found = self.encode(prompts, pooling_task="embed", **options)
        return [_with(o, EmbeddingOutput(o.outputs.data.tolist())) for o in found]

    def classify(
        self, prompts: Prompt | Sequence[Prompt], **options: Any
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """`encode` for the probability of each label, `.outputs.probs`; the same options."""
        self._need_encoder("classify")
        found = self.encode(prompts, pooling_task="classify", **options)
        labels = self.engine.manifest.encoder.labels if self.engine.manifest.encoder else ()
        return [_with(o, ClassificationOutput(o.outputs.data.tolist(), labels)) for o in found]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_progress: bool | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well texts belong together, `.outputs.score`: one with each of many, or many with as many.

        A cross-encoder (a classifier with one label) reads both texts at once; an encoder for embeddings gives the
        cosine of their angle. truncate_prompt_tokens: of a pair, the longer text is cut first. Raises as `encode` does.
        """
        return self._need_encoder("score").score(
            data_1, data_2, truncate_prompt_tokens=truncate_prompt_tokens, use_progress=use_progress
        )

    def _need_encoder(self, method: str) -> TextEncoder:
        if self._encoder is None:
            raise ConfigError(
                f"{method}: {self.engine.path} ({self.engine.manifest.model['architecture']}) generates text and is no "
                "encoder; use generate or chat"
            )
        return self._encoder


def _with(output: PoolingRequestOutput[Any], outputs: P) -> PoolingRequestOutput[P]:
    return PoolingRequestOutput(output.request_id, outputs, output.prompt_token_ids)
