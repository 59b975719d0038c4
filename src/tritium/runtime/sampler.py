"""Chooses tokens: gathers each sampled row's parameters, runs the sampling kernel, makes plain values of its results.

Parameters are kept per slot and written when a request receives its slot; a step gathers them in row order, and only
when the rows are others than a step before. A draw depends on the request's seed and the token's position alone.
"""

import numpy as np
import torch

from tritium.kernels.sampling import SamplerKernel, SamplingTable
from tritium.runtime.batch import BatchLayout
from tritium.runtime.request import Request, SampledToken

FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed")
_NO_LOGPROBS = -1


class Sampler:
    """Owns the parameters of every slot. is_null: no kernel runs and every token is 0, to time the host."""

    def __init__(self, vocab_size: int, max_rows: int, *, is_null: bool = False) -> None:
        self._kernel = SamplerKernel(vocab_size, max_rows)
        self._table = SamplingTable(max_rows)
        self._slots = SamplingTable(max_rows)  # the same fields, by slot
        self._num_logprobs = np.full(max_rows, _NO_LOGPROBS, np.int32)  # by slot
        self._row_slots = np.empty(0, np.int64)
        self._wanted = self._num_logprobs[:0]
        self._vocab_size = vocab_size
        self._is_null = is_null

    def admit(self, slot: int, request: Request) -> None:
        """A request received this slot: note how it wants its tokens chosen."""
        params, slots = request.params, self._slots
        slots.temperature[slot] = 0.0 if params.is_greedy else params.temperature
        slots.top_k[slot] = min(params.top_k, self._vocab_size)
        slots.top_p[slot] = params.top_p
        slots.min_p[slot] = params.min_p
        slots.seed[slot] = params.seed or 0
        self._num_logprobs[slot] = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        self._row_slots = np.empty(0, np.int64)

    def sample(self, logits_RV: torch.Tensor, layout: BatchLayout) -> list[SampledToken | None]:
        """One token per sampled row; None for a row whose logits are not finite. Rows past the batch's are ignored."""
        num_rows, table = layout.num_rows, self._table
        if not np.array_equal(layout.row_slots, self._row_slots):
            self._row_slots = layout.row_slots
            for name in FIELDS:
                getattr(table, name)[:num_rows] = getattr(self._slots, name)[layout.row_slots]
            self._wanted = self._num_logprobs[layout.row_slots]
            table.num_top = max(0, int(self._wanted.max()))
        table.counter[:num_rows] = layout.row_positions
        if self._is_null:
            results = self._null_results(num_rows, table.num_top)
        else:
            results = self._kernel.run(logits_RV[:num_rows], table)
        return _plain(*results, wanted=self._wanted)

    def _null_results(self, num_rows: int, num_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ids, logprobs = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
        return ids, logprobs, np.zeros((num_rows, num_top), np.int64), np.zeros((num_rows, num_top), np.float32)


def _plain(
    ids: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray, *, wanted: np.ndarray
) -> list[SampledToken | None]:
    """Python values, with as many alternatives as each row wants."""
    tokens: list[SampledToken | None] = list(map(SampledToken, ids.tolist(), logprobs.tolist()))
    for row in np.flatnonzero(wanted > 0).tolist():
        count = wanted[row]
        top = tuple(zip(top_ids[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True))
        tokens[row] = SampledToken(int(ids[row]), float(logprobs[row]), top)
    for row in np.flatnonzero(ids < 0).tolist():
        tokens[row] = None
    return tokens
