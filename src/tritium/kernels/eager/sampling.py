"""sampling in torch, for no compiler: the rule of `cpu/csrc/sampling.cpp`, row by row and by sorting."""

import numpy as np
import torch

from tritium.kernels.logit_edits import LogitEdits
from tritium.kernels.sampling_table import Sampled, SamplingTable

GREEDY_TEMPERATURE = 1e-5
_MASK = 0xFFFFFFFF


def sample(logits_RV: torch.Tensor, rows: SamplingTable, out: Sampled) -> None:
    """Fill `out` from the first R entries of `rows`."""
    out.token_ids[:], out.logprobs[:] = -1, float("nan")
    out.top_ids[:], out.top_logprobs[:] = -1, float("-inf")
    for row, logits in enumerate(logits_RV):
        x_V = logits.to(torch.float32, copy=True)
        if not bool(x_V.amax() < float("inf")) or bool(x_V.amax() == float("-inf")):  # NaN is not below either
            continue
        num_logprobs = int(rows.num_logprobs[row])
        logprobs_V = torch.log_softmax(x_V, -1) if num_logprobs >= 0 else x_V
        if num_logprobs > 0:
            order = x_V.sort(descending=True, stable=True).indices[: min(num_logprobs, rows.num_top)]
            order = order[x_V[order] > float("-inf")]
            out.top_ids[row, : len(order)], out.top_logprobs[row, : len(order)] = order, logprobs_V[order]
        forced, edits = int(rows.forced[row]), rows.edits[row]
        if forced < 0 and edits is not None:
            x_V = edited(x_V, edits)
            if not bool(x_V.amax() < float("inf")) or bool(x_V.amax() == float("-inf")):
                continue
        token = forced if forced >= 0 else _choose(x_V, rows, row)
        out.token_ids[row] = token
        if num_logprobs >= 0:
            out.logprobs[row] = float(logprobs_V[token])


def edited(x_V: torch.Tensor, edits: LogitEdits) -> torch.Tensor:
    """The row as its request wants it: the order and the rounding of `cpu/csrc/logit_edits.h`."""
    if edits.processed is not None:
        x_V = torch.from_numpy(edits.processed.copy())
    size = len(x_V)
    ids = _known(edits.bias_ids, size)
    x_V[ids] = _rounded(x_V[ids].double() + _values(edits.bias_values, edits.bias_ids, size))
    seen_ids, counts = edits.seen_ids[: edits.num_seen], edits.seen_counts[: edits.num_seen]
    ids, counts_of = _known(seen_ids, size), _values(counts, seen_ids, size)
    x = x_V[ids].double()
    x = torch.where(x > 0, x / float(edits.repetition), x * float(edits.repetition))
    lost = float(edits.frequency) * counts_of + float(edits.presence)
    x_V[ids] = _rounded(torch.where(counts_of > 0, x - lost, x))
    if edits.allowed_ids is not None:
        ids = _known(edits.allowed_ids, size)
        x_V = torch.full_like(x_V, float("-inf")).index_copy(0, ids, x_V[ids])
    x_V[_known(edits.banned_ids, size)] = float("-inf")
    return x_V


def _known(ids: np.ndarray, size: int) -> torch.Tensor:
    """Those in the vocabulary, as an index."""
    return torch.from_numpy(ids[(ids >= 0) & (ids < size)].astype(np.int64))


def _values(values: np.ndarray, ids: np.ndarray, size: int) -> torch.Tensor:
    return torch.from_numpy(values[(ids >= 0) & (ids < size)].astype(np.float64))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """float32; what is finite stays finite."""
    largest = torch.finfo(torch.float32).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).float()


def _choose(x_V: torch.Tensor, rows: SamplingTable, row: int) -> int:
    return _draw(x_V, rows, row) if rows.temperature[row] >= GREEDY_TEMPERATURE else int(x_V.argmax())


def _draw(x_V: torch.Tensor, rows: SamplingTable, row: int) -> int:
    inverse = torch.tensor(1.0) / float(rows.temperature[row])
    weights_V = ((x_V - x_V.amax()) * inverse).exp().to(torch.float64)
    top_k, top_p, min_p = int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row])
    is_kept_V = weights_V >= min_p
    if top_k or top_p < 1.0:
        order = x_V.sort(descending=True, stable=True).indices[: top_k or None]
        reached = weights_V[order].cumsum(0)
        num_kept = int((reached < top_p * reached[-1]).sum()) + 1 if top_p < 1.0 else len(order)
        is_kept_V &= torch.zeros_like(is_kept_V).index_fill(0, order[:num_kept], True)
    reached_V = (weights_V * is_kept_V).cumsum(0)
    u = uniform(int(rows.seed[row]), int(rows.counter[row]))
    last = int((weights_V * is_kept_V).nonzero()[-1])
    return min(int(torch.searchsorted(reached_V, u * float(reached_V[-1]), right=True)), last)


def uniform(seed: int, counter: int) -> float:
    """In [0, 1), 53 bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c = [counter & _MASK, counter >> 32, 0, 0]
    k = [seed & _MASK, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK]
        k = [(k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK]
    return ((c[0] << 32 | c[1]) >> 11) * 2.0**-53
