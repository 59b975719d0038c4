"""An engine's logits at every position of a text, by the kernels that serve requests.

Of an engine for a GPU, where there is none, by the ops' references: that judges its weights, scales and graph, not the
kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.kernels.kernel import resolve
from tritium.runtime.executor import Executor
from tritium.runtime.kv_cache import block_bytes
from tritium.runtime.request import Request, ScheduledBatch, ScheduledSequence
from tritium.sampling_params import SamplingParams


class EngineLogits:
    """Holds an executor for windows of up to `window_len` tokens."""

    def __init__(self, engine: Engine, window_len: int, num_threads: int | None = None) -> None:
        self._block_size, self._num_groups = RuntimeConfig().block_size, len(engine.plan.kv_groups)
        num_blocks = self._num_groups * -(-(window_len + 1) // self._block_size) + 2
        config = RuntimeConfig(
            max_num_seqs=window_len,
            max_num_batched_tokens=window_len,
            max_model_len=window_len + 1,
            kv_cache_memory=num_blocks * block_bytes(engine.plan.kv_groups, self._block_size),
            enable_prefix_caching=False,
            num_threads=num_threads,
        )
        self.is_by_reference = engine.manifest.backend == "cuda" and not torch.cuda.is_available()
        if engine.manifest.backend == "cuda" and not self.is_by_reference:  # which loads Triton
            self._executor = resolve("tritium.runtime.gpu.executor:GpuExecutor")(engine, config, has_graphs=False)
        else:
            self._executor = Executor(engine, config)
        self._num_windows = 0
        self._last: tuple[Request, ...] = ()

    def logits(self, window: Sequence[int]) -> Tensor:
        """fp32 [len, V]: one step in which each position is a sequence of its own, all over the same blocks.

        The step stores every key and value before attention reads any, so that a position sees all before it.
        """
        per_group = -(-len(window) // self._block_size)
        tables = [list(range(1 + group * per_group, 1 + (group + 1) * per_group)) for group in range(self._num_groups)]
        self._num_windows += 1
        sequences = []
        for position in range(len(window)):
            name = f"{self._num_windows}.{position}"
            request = Request(name, list(window), SamplingParams(temperature=0, max_tokens=1))
            request.block_tables = tables
            sequences.append(ScheduledSequence(request, position, 1, True))
        batch = ScheduledBatch(tuple(sequences), (), self._last, len(window), len(window))
        self._last = tuple(sequence.request for sequence in sequences)
        if not isinstance(self._executor, Executor):
            return self._executor.logits(self._executor.launch(batch)).float().cpu()
        step = self._executor.prepare(batch)
        self._executor.launch(step)
        return self._executor.logits(step).float().cpu()
