"""Sampling: one token per row of logits, compiled where there is a compiler, else in torch.

The rule is the same in both, and stated in `cpu/csrc/sampling.cpp`: order tokens by logit (equal ones by id), keep the
first top_k, then the shortest front part that reaches top_p, then what is at least min_p times as likely as the first;
draw at u(seed, counter) in the order of ids. Sums are rounded differently, so a draw that falls within about 1e-7 of a
boundary may differ between the two.
"""

import numpy as np
import torch

from tritium.kernels.cpu import library
from tritium.kernels.cpu import sampling as compiled
from tritium.kernels.eager import sampling as eager
from tritium.kernels.sampling_table import Sampled, SamplingTable

__all__ = ["Sampled", "SamplerKernel", "SamplingTable"]


class SamplerKernel:
    """Chooses tokens. A row's result depends on its own logits and parameters only.

    is_compiled: False takes torch even where there is a compiler.
    """

    def __init__(self, vocab_size: int, max_rows: int, *, is_compiled: bool = True) -> None:
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        is_compiled = is_compiled and library.available()
        self._sample = compiled.Sampling(vocab_size) if is_compiled else eager.sample
        self._token_ids = np.empty(max_rows, np.int64)
        self._logprobs = np.empty(max_rows, np.float32)
        self._top_ids = np.empty(0, np.int64)
        self._top_logprobs = np.empty(0, np.float32)
        self._results: dict[tuple[int, int], Sampled] = {}

    def run(self, logits_RV: torch.Tensor, rows: SamplingTable) -> Sampled:
        """Logits in fp32, bf16 or fp16, their last dimension dense; R at most max_rows. They are not changed."""
        size = (logits_RV.shape[0], rows.num_top)
        sampled = self._results.get(size) or self._make_results(*size)
        self._sample(logits_RV, rows, sampled)
        return sampled

    def _make_results(self, num_rows: int, width: int) -> Sampled:
        if len(self._top_ids) < self.max_rows * width:
            self._top_ids = np.empty(self.max_rows * width, np.int64)
            self._top_logprobs = np.empty(self.max_rows * width, np.float32)
            self._results.clear()
        sampled = Sampled(
            self._token_ids[:num_rows],
            self._logprobs[:num_rows],
            self._top_ids[: num_rows * width].reshape(num_rows, width),
            self._top_logprobs[: num_rows * width].reshape(num_rows, width),
        )
        self._results[num_rows, width] = sampled
        return sampled
