"""What an encoder's runners share, on a CPU and on a GPU: what fits in a batch, and the batch in the plan's inputs."""

from collections.abc import Sequence

import numpy as np
import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.plan import Sizes
from tritium.errors import EngineError
from tritium.kernels.kernel import Kernel
from tritium.runtime.buckets import bucket, common_multiple
from tritium.runtime.encoder_request import EncoderRequest

BY_TOKEN = ("input_ids", "positions", "token_types")  # inputs with a number for each token


class EncoderLimits:
    """max_model_len: the longest sequence. max_tokens, max_requests: of a batch, which has room for one such sequence.

    info: what the engine's outputs mean. outputs: their names. by_row: those with a row for each sequence.
    """

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Raises `EngineError` for an engine that holds no encoder."""
        info = engine.manifest.encoder
        if engine.manifest.kind != "encoder" or info is None:
            raise EngineError(f"{engine.path} holds a {engine.manifest.kind}, not an encoder")
        self.info, self.outputs = info, frozenset(engine.plan.outputs)
        self.by_row = {o for o, name in engine.plan.outputs.items() if engine.plan.value(name).shape[0] == "R"}
        self.vocab_size = engine.plan.vocab_size
        self.max_model_len = min(config.max_model_len or engine.manifest.max_model_len, engine.manifest.max_model_len)
        self.max_tokens = max(config.max_num_batched_tokens, self.max_model_len)
        self.max_requests = config.max_num_seqs

    def source(self, request: EncoderRequest) -> str:
        """The output that a request's answer is made of."""
        if request.task in ("classify", "token_classify"):
            return "scores"
        return "pooled" if request.task == "embed" and request.pooling == "pooler" else "hidden"

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Of each label, [..., C], from its scores."""
        if self.info.score_activation == "identity":
            return scores
        return scores.sigmoid() if self.info.score_activation == "sigmoid" else scores.softmax(-1)


def largest_gpu_batch(config: RuntimeConfig, engine_max_model_len: int) -> Sizes:
    """What memory is laid out for: so many tokens and texts, or one text of the longest."""
    longest = min(config.max_model_len or engine_max_model_len, engine_max_model_len)
    tokens = max(config.max_num_batched_tokens, longest)
    return Sizes(tokens=tokens, sequences=config.max_num_seqs, rows=config.max_num_seqs)


def largest_cpu_batch(kernels: Sequence[Kernel], config: RuntimeConfig, engine_max_model_len: int) -> Sizes:
    """The same, rounded up: torch's kernels are given more rows than a small batch has."""
    multiple = common_multiple((16, *(kernel.row_multiple for kernel in kernels)))
    exact = largest_gpu_batch(config, engine_max_model_len)
    rows = bucket(exact.rows, multiple)
    return Sizes(tokens=bucket(exact.tokens, multiple), sequences=exact.sequences, rows=rows)


class PackedInputs:
    """The inputs of a plan on the host, for the largest batch; `tensors` by name."""

    def __init__(self, largest: Sizes) -> None:
        self.tensors = {
            **{name: torch.zeros(largest.tokens, dtype=torch.int64) for name in BY_TOKEN},
            "sampled_rows": torch.zeros(largest.rows, dtype=torch.int64),
            "cu_seqlens_q": torch.zeros(largest.sequences + 1, dtype=torch.int32),
            "batch_counts": torch.zeros(4, dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}

    def write(self, batch: Sequence[EncoderRequest], starts: Sequence[int], *, tokens: int, rows: int) -> None:
        """A batch, whose sequences begin and end at `starts`, padded to so many tokens and rows.

        Rows of padding read token 0 at position 0 and belong to no sequence.
        """
        arrays, num_tokens = self._arrays, starts[-1]
        np.concatenate([request.ids for request in batch], out=arrays["input_ids"][:num_tokens])
        np.concatenate([request.types for request in batch], out=arrays["token_types"][:num_tokens])
        begins = np.array(starts)
        arrays["positions"][:num_tokens] = np.arange(num_tokens) - np.repeat(begins[:-1], np.diff(begins))
        for name in BY_TOKEN:
            arrays[name][num_tokens:tokens] = 0
        arrays["sampled_rows"][:rows] = 0
        arrays["sampled_rows"][: len(batch)] = starts[:-1]
        arrays["cu_seqlens_q"][: len(starts)] = starts
        arrays["cu_seqlens_q"][len(starts) :] = num_tokens
        arrays["batch_counts"][:] = (len(batch), num_tokens, len(batch), 0)
