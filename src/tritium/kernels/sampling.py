"""Sampling, one token per row of logits. This is the torch version, for no compiler: correct, not fast."""

import numpy as np
import torch

_GAMMA = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea, Flood 2014)
_MASK = (1 << 64) - 1


class SamplingTable:
    """One row's parameters per entry; whoever runs the sampler fills the first R of them."""

    def __init__(self, max_rows: int) -> None:
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.seed = np.zeros(max_rows, np.uint64)
        self.counter = np.zeros(max_rows, np.uint64)
        self.num_top = 0


class SamplerKernel:
    """Chooses tokens. A row's result depends on its logits and parameters only."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        self.vocab_size = vocab_size
        self.max_rows = max_rows

    def run(
        self, logits_RV: torch.Tensor, rows: SamplingTable
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Token ids int64 [R] (-1: not finite), their logprobs [R], the likeliest ids and logprobs [R, n]."""
        logprobs = torch.log_softmax(logits_RV.float(), -1)
        is_bad = ~torch.isfinite(logprobs.amax(-1))
        ids = logprobs.argmax(-1)
        for row in np.flatnonzero(rows.temperature[: len(ids)] > 0).tolist():
            if not is_bad[row]:
                ids[row] = _draw(logits_RV[row].float(), rows, row)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        ids[is_bad] = -1
        top = logprobs.topk(rows.num_top, -1)
        return ids.numpy(), chosen.numpy(), top.indices.numpy(), top.values.numpy()


def _draw(logits_V: torch.Tensor, rows: SamplingTable, row: int) -> int:
    scaled, order = (logits_V / float(rows.temperature[row])).sort(descending=True, stable=True)
    if rows.top_k[row]:
        scaled = scaled[: int(rows.top_k[row])]
    p = torch.softmax(scaled.double(), -1)
    before = p.cumsum(0) - p
    keep = (before < float(rows.top_p[row])) & (p >= float(rows.min_p[row]) * p[0])
    keep[0] = True
    p = (p * keep).cumsum(0)
    u = _uniform(int(rows.seed[row]), int(rows.counter[row])) * float(p[-1])
    return int(order[min(int(torch.searchsorted(p, u, right=True)), int(keep.nonzero()[-1]))])


def _uniform(seed: int, counter: int) -> float:
    x = (seed + (counter + 1) * _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53
