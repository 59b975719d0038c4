"""Log-probabilities of prompt tokens: the steps over sampled rows are run over a prefill chunk's rows, piece by piece.

The logits of 8,192 tokens with a vocabulary of 128 k would be 4.2 GB; so the rows go through in pieces of as many as
the plan has room for. What the first of these steps read of the chunk stays in the arena until the plan ends.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from tritium.kernels.sampling import SamplerKernel, SamplingTable
from tritium.runtime.request import Request, SampledToken, ScheduledBatch
from tritium.runtime.sampler import plain_tokens


class ScoredPart(NamedTuple):
    """Rows `[first_row, first_row + len(targets))` of the batch's tokens; each should predict its target."""

    request: Request
    first_row: int
    targets: list[int]


def scored_parts(batch: ScheduledBatch) -> list[ScoredPart]:
    """What is to be scored in this batch: prompt tokens that are wanted and were not scored before a preemption."""
    parts = []
    row = 0
    for request, start, num_tokens, _ in batch.sequences:
        if request.prompt_logprobs and len(request.prompt_logprobs) != request.num_prompt_tokens:
            first = max(start, len(request.prompt_logprobs) - 1)
            targets = request.token_ids[first + 1 : min(start + num_tokens + 1, request.num_prompt_tokens)]
            if targets:
                parts.append(ScoredPart(request, row + first - start, targets))
        row += num_tokens
    return parts


class PromptScorer:
    """max_rows: rows that the plan computes logits of at once."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        self._kernel = SamplerKernel(vocab_size, max_rows)
        self._table = SamplingTable(max_rows)
        self._vocab_size, self._max_rows = vocab_size, max_rows

    def score(self, parts: list[ScoredPart], compute: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Append to each request's `prompt_logprobs`. compute: from rows of the batch to logits [len(rows), V]."""
        rows = np.concatenate([np.arange(p.first_row, p.first_row + len(p.targets)) for p in parts])
        targets = np.array(list(chain.from_iterable(p.targets for p in parts)), np.int32)
        wanted = [min(p.request.params.prompt_logprobs or 0, self._vocab_size) for p in parts]
        num_top = np.repeat(np.array(wanted, np.int32), [len(p.targets) for p in parts])
        tokens: list[SampledToken] = []
        for start in range(0, len(rows), self._max_rows):
            piece = slice(start, start + self._max_rows)
            tokens += self._score_rows(compute(rows[piece]), targets[piece], num_top[piece])
        done = 0
        for part in parts:
            part.request.prompt_logprobs += tokens[done : done + len(part.targets)]
            done += len(part.targets)

    def _score_rows(self, logits_RV: torch.Tensor, targets: np.ndarray, num_top: np.ndarray) -> list[SampledToken]:
        table, count = self._table, len(targets)
        table.forced[:count], table.num_logprobs[:count], table.num_top = targets, num_top, int(num_top.max())
        scored = plain_tokens(self._kernel.run(logits_RV, table), num_top)
        return [token._replace(token_id=target) for token, target in zip(scored, targets.tolist(), strict=True)]
