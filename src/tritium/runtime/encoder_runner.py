"""Runs an encoder's plan on packed batches: no padding between sequences, each of which sees itself alone."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.engine.plan import Sizes
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError
from tritium.kernels.kernel import Thunk
from tritium.runtime.buckets import bucket, common_multiple
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.kernel_choice import choose_kernels, usable_tactics
from tritium.runtime.plan_runner import PlanRunner


class EncoderRunner:
    """Owns weights, arena and inputs of one encoder. All calls belong on the thread that made it.

    max_model_len: the longest sequence. max_tokens: of a batch, at least one such sequence. max_requests: of a batch.
    """

    def __init__(self, engine: Engine, config: RuntimeConfig, *, tactics: Tactics | None = None) -> None:
        """Load and lay out everything. tactics: in place of the engine's own, which count only on a machine like that
        on which they were measured. Raises `EngineError`, `KernelError` or `OutOfMemory`."""
        info = engine.manifest.encoder
        if engine.manifest.kind != "encoder" or info is None:
            raise EngineError(f"{engine.path} holds a {engine.manifest.kind}, not an encoder")
        self.info, self.outputs = info, frozenset(engine.plan.outputs)
        self.vocab_size = engine.plan.vocab_size
        self.max_model_len = min(config.max_model_len or engine.manifest.max_model_len, engine.manifest.max_model_len)
        self.max_tokens = max(config.max_num_batched_tokens, self.max_model_len)
        self.max_requests = config.max_num_seqs
        tuned = tactics or usable_tactics(engine, environment(config.num_threads))
        kernels = choose_kernels(engine.plan, tuned=tuned.kernels if tuned else None)
        multiple = common_multiple(kernel.row_multiple for kernel in kernels)
        most = common_multiple((16, multiple))  # torch's kernels are given more rows than a small batch has
        rows = bucket(self.max_requests, most)
        self._largest = largest = Sizes(tokens=bucket(self.max_tokens, most), sequences=self.max_requests, rows=rows)
        tensors = {
            "input_ids": torch.zeros(largest.tokens, dtype=torch.int64),
            "positions": torch.zeros(largest.tokens, dtype=torch.int64),
            "token_types": torch.zeros(largest.tokens, dtype=torch.int64),
            "sampled_rows": torch.zeros(largest.rows, dtype=torch.int64),
            "cu_seqlens_q": torch.zeros(self.max_requests + 1, dtype=torch.int32),
            "batch_counts": torch.zeros(4, dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._by_row = {o for o, name in engine.plan.outputs.items() if engine.plan.value(name).shape[0] == "R"}
        self._runner = PlanRunner(engine, largest, tensors, config.num_threads, tuned)
        self._multiple = multiple if engine.manifest.invariance == "bitwise" else 1

    def compute(self, batch: Sequence[EncoderRequest]) -> list[torch.Tensor]:
        """What each request asked for, in float32: [D] "embed", [T, D] "token_embed", [C] or [T, C] probabilities."""
        starts = [0, *itertools.accumulate(len(request.token_ids) for request in batch)]
        tokens, rows = self._write(batch, starts)
        self._runner.run("tokens", tokens)
        if any(self._source(request) in self._by_row for request in batch):
            self._runner.run("rows", rows)
        found = {name: self._runner.output(name, rows if name in self._by_row else tokens) for name in self.outputs}
        return [self._result(request, found, i, starts[i], starts[i + 1]) for i, request in enumerate(batch)]

    def close(self) -> None:
        """Give back all memory: nothing may be computed after it."""
        self._runner.close()

    def thunks(self, batch: Sequence[EncoderRequest]) -> list[Thunk]:
        """The batch written into the inputs, and the calls of all steps of the plan for it, to be timed."""
        starts = [0, *itertools.accumulate(len(request.token_ids) for request in batch)]
        tokens, rows = self._write(batch, starts)
        bound = (*self._runner.bound("tokens", tokens), *self._runner.bound("rows", rows))
        return [thunk for _, thunk in bound]

    def _source(self, request: EncoderRequest) -> str:
        """The output that a request's answer is made of."""
        if request.task in ("classify", "token_classify"):
            return "scores"
        return "pooled" if request.task == "embed" and request.pooling == "pooler" else "hidden"

    def _write(self, batch: Sequence[EncoderRequest], starts: Sequence[int]) -> tuple[Sizes, Sizes]:
        """The batch into the inputs, and the sizes of its two phases.

        Rows of padding read token 0 at position 0 and belong to no sequence.
        """
        arrays, num_tokens = self._arrays, starts[-1]
        tokens, rows = bucket(num_tokens, self._multiple), bucket(len(batch), self._multiple)
        arrays["input_ids"][:num_tokens] = np.fromiter(itertools.chain(*(r.token_ids for r in batch)), np.int64)
        arrays["token_types"][:num_tokens] = np.fromiter(itertools.chain(*(r.token_types for r in batch)), np.int64)
        for start, end in itertools.pairwise(starts):
            arrays["positions"][start:end] = np.arange(end - start)
        for name in ("input_ids", "positions", "token_types"):
            arrays[name][num_tokens:tokens] = 0
        arrays["sampled_rows"][:rows] = 0
        arrays["sampled_rows"][: len(batch)] = starts[:-1]
        arrays["cu_seqlens_q"][: len(starts)] = starts
        arrays["batch_counts"][:] = (len(batch), num_tokens, len(batch), 0)
        return (
            Sizes(tokens=tokens, sequences=self.max_requests, rows=self._largest.rows),
            Sizes(tokens=self._largest.tokens, sequences=self.max_requests, rows=rows),
        )

    def _result(
        self, request: EncoderRequest, found: dict[str, torch.Tensor], index: int, start: int, end: int
    ) -> torch.Tensor:
        source = self._source(request)
        value = found[source][index if source in self._by_row else slice(start, end)].to(torch.float32, copy=True)
        if request.task in ("classify", "token_classify"):
            return self._probabilities(value)
        if request.task == "embed" and request.pooling != "pooler":
            value = value.mean(0) if request.pooling == "mean" else value[0 if request.pooling == "cls" else -1].clone()
        return F.normalize(value, dim=-1) if request.is_normalized else value

    def _probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        if self.info.score_activation == "identity":
            return scores
        return scores.sigmoid() if self.info.score_activation == "sigmoid" else scores.softmax(-1)
