"""Chooses tokens: gathers each sampled row's parameters, runs the sampling kernel, makes plain values of its results.

Parameters are kept per slot and written when a request receives its slot; a step gathers them in row order, and only
when the rows are others than a step before. A draw depends on the request's seed and the token's position alone.
"""

import numpy as np
import torch

from tritium.kernels.sampling import Sampled, SamplerKernel, SamplingTable
from tritium.kernels.sampling_table import NO_LOGPROBS
from tritium.runtime.batch import BatchLayout
from tritium.runtime.request import Request, SampledToken

FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "num_logprobs")


class Sampler:
    """Owns the parameters of every slot. is_null: no kernel runs and every token is 0, to time the host."""

    def __init__(self, vocab_size: int, max_rows: int, *, is_null: bool = False) -> None:
        self._kernel = SamplerKernel(vocab_size, max_rows)
        self._rows = SamplingTable(max_rows)
        self._slots = SamplingTable(max_rows)  # the same fields, by slot
        self._row_slots = np.empty(0, np.int64)
        self._stop_ids: list[list[int]] = [[]] * max_rows  # by slot
        self._first_stop = np.zeros(max_rows, np.int64)  # by slot: the first position at which a stop id may stand
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
        slots.num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else min(params.logprobs, self._vocab_size)
        self._stop_ids[slot] = sorted(request.stop_ids)
        self._first_stop[slot] = request.num_prompt_tokens + params.min_tokens - 1
        self._row_slots = np.empty(0, np.int64)

    def sample(self, logits_RV: torch.Tensor, layout: BatchLayout) -> list[SampledToken | None]:
        """One token per sampled row; None for a row whose logits are not finite. Rows past the batch's are ignored."""
        num_rows, rows = layout.num_rows, self._rows
        if not np.array_equal(layout.row_slots, self._row_slots):
            self._row_slots = layout.row_slots
            for name in FIELDS:
                getattr(rows, name)[:num_rows] = getattr(self._slots, name)[layout.row_slots]
            rows.num_top = max(0, int(rows.num_logprobs[:num_rows].max()))
        rows.counter[:num_rows] = layout.row_positions
        self._ban_early_stops(layout)
        results = self._null_results(num_rows) if self._is_null else self._kernel.run(logits_RV[:num_rows], rows)
        return _plain(results, rows.num_logprobs[:num_rows])

    def _ban_early_stops(self, layout: BatchLayout) -> None:
        """Stop ids cannot be chosen before `min_tokens`: the model goes on instead of past its own end."""
        self._rows.clear_bans()
        for row in np.flatnonzero(layout.row_positions < self._first_stop[layout.row_slots]).tolist():
            self._rows.ban(row, self._stop_ids[layout.row_slots[row]])

    def _null_results(self, num_rows: int) -> Sampled:
        shape = (num_rows, self._rows.num_top)
        ids, logprobs = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
        return Sampled(ids, logprobs, np.zeros(shape, np.int64), np.zeros(shape, np.float32))


def _plain(sampled: Sampled, num_logprobs: np.ndarray) -> list[SampledToken | None]:
    """Python values, with as many alternatives as each row wants."""
    ids, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
    tokens: list[SampledToken | None] = list(map(SampledToken, ids, logprobs))
    for row in np.flatnonzero(num_logprobs > 0).tolist():
        count = num_logprobs[row]
        top = zip(sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist(), strict=True)
        tokens[row] = SampledToken(ids[row], logprobs[row], tuple(top))
    for row in np.flatnonzero(sampled.token_ids < 0).tolist():
        tokens[row] = None
    return tokens
