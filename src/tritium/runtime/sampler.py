"""Chooses tokens: gathers each sampled row's parameters, runs the sampling kernel, makes plain values of its results.

Parameters are kept per slot and written when a request receives its slot; a step gathers them in row order, and only
when the rows are others than a step before. A draw depends on the request's seed and the token's position alone.

What an executor needs of a sampler is `admit` and `sample`; a sampler for another device offers the same two.
"""

import numpy as np
import torch

from tritium.kernels.sampling import Sampled, SamplerKernel, SamplingTable
from tritium.kernels.sampling_table import NO_LOGPROBS
from tritium.runtime.batch import BatchLayout
from tritium.runtime.logit_rules import LogitRules
from tritium.runtime.request import Request, RowError, SampledToken

FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "num_logprobs", "edits_at")


class Sampler:
    """Owns the parameters of every slot. is_null: no kernel runs and every token is 0, to time the host."""

    def __init__(self, vocab_size: int, max_rows: int, *, is_null: bool = False) -> None:
        self._kernel = SamplerKernel(vocab_size, max_rows)
        self._rows = SamplingTable(max_rows)
        self._slots = SamplingTable(max_rows)  # the same fields, by slot
        self._rules: list[LogitRules | None] = [None] * max_rows  # by slot
        self._row_slots = np.empty(0, np.int64)
        self._ruled_rows: list[tuple[int, LogitRules]] = []
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
        self._rules[slot] = rules = LogitRules.of(request)
        slots.edit(slot, rules.edits if rules is not None else None)
        self._row_slots = np.empty(0, np.int64)

    def sample(self, logits_RV: torch.Tensor, layout: BatchLayout) -> list[SampledToken | RowError]:
        """One token per sampled row, or why it has none. Rows past the batch's are ignored."""
        num_rows, rows = layout.num_rows, self._rows
        if not np.array_equal(layout.row_slots, self._row_slots):
            self._gather(layout)
        rows.counter[:num_rows] = layout.row_positions
        errors = {row: error for row, rules in self._ruled_rows if (error := rules.prepare(logits_RV, row)) is not None}
        results = self._null_results(layout) if self._is_null else self._kernel.run(logits_RV[:num_rows], rows)
        tokens: list[SampledToken | RowError] = [*plain_tokens(results, rows.num_logprobs[:num_rows])]
        for row in np.flatnonzero(results.token_ids < 0).tolist():
            tokens[row] = _why(logits_RV[row])
        for row, error in errors.items():
            tokens[row] = error
        return tokens

    def _gather(self, layout: BatchLayout) -> None:
        """Bring the slots' parameters into the order of the rows."""
        num_rows, rows = layout.num_rows, self._rows
        self._row_slots = layout.row_slots
        for name in FIELDS:
            getattr(rows, name)[:num_rows] = getattr(self._slots, name)[layout.row_slots]
        rows.num_top = max(0, int(rows.num_logprobs[:num_rows].max()))
        by_row = [self._rules[slot] for slot in layout.row_slots.tolist()]
        rows.edits[:num_rows] = [rules.edits if rules is not None else None for rules in by_row]
        self._ruled_rows = [(row, rules) for row, rules in enumerate(by_row) if rules is not None]

    def _null_results(self, layout: BatchLayout) -> Sampled:
        shape = (layout.num_rows, self._rows.num_top)
        ids, logprobs = np.zeros(layout.num_rows, np.int64), np.zeros(layout.num_rows, np.float32)
        return Sampled(ids, logprobs, np.zeros(shape, np.int64), np.zeros(shape, np.float32))


def plain_tokens(sampled: Sampled, num_logprobs: np.ndarray) -> list[SampledToken]:
    """Python values, with as many alternatives as each row wants."""
    ids, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
    tokens = list(map(SampledToken, ids, logprobs))
    for row in np.flatnonzero(num_logprobs > 0).tolist():
        count = num_logprobs[row]
        top = zip(sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist(), strict=True)
        tokens[row] = SampledToken(ids[row], logprobs[row], tuple(top))
    return tokens


def _why(logits_V: torch.Tensor) -> RowError:
    """Why a row has no token."""
    if bool(torch.isnan(logits_V).any() | torch.isposinf(logits_V).any() | torch.isneginf(logits_V).all()):
        return RowError("the model's logits were not finite numbers")
    return RowError(
        "no token is left to choose: allowed_token_ids, bad_words, min_tokens and logits_processors ban them all"
    )
