"""What a running request asks of its logits, turned into `LogitEdits` one token after another.

Everything here follows from the request's tokens: a request that was preempted, or whose slot changed, gets new rules
that know the same. A step costs work only for tokens that are new.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from tritium.kernels.logit_edits import LogitEdits
from tritium.runtime.request import Request, RowError

logger = logging.getLogger("tritium")


class BadWords:
    """Token sequences that cannot come about: the last token of each is banned after those before it.

    The prompt counts as what came before (transformers' NoBadWordsLogitsProcessor).
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.always = sorted({sequence[0] for sequence in sequences if len(sequence) == 1})
        self._by_last: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for sequence in sequences:
            if len(sequence) > 1:
                *before, last = sequence
                self._by_last[before[-1]].append((before, last))

    @property
    def is_changing(self) -> bool:
        """True when what is banned depends on the tokens before."""
        return bool(self._by_last)

    def banned_after(self, token_ids: list[int]) -> list[int]:
        """What is banned next, beside `always`."""
        found = self._by_last.get(token_ids[-1], ())
        return [last for before, last in found if len(before) == 1 or token_ids[-len(before) :] == before]


class LogitRules:
    """Keeps `edits` in step with one request."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self._request = request
        self._bad_words = BadWords(request.bad_word_ids)
        self.edits = LogitEdits(
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            bias=params.logit_bias,
            allowed_ids=params.allowed_token_ids,
            banned_ids=self._bad_words.always,
        )
        self._has_penalties = params.has_penalties
        self._is_banning = self._bad_words.is_changing or params.min_tokens > 0
        self._num_seen = 0
        if params.repetition_penalty != 1.0:
            self.edits.see_prompt(request.prompt_token_ids)

    @staticmethod
    def of(request: Request) -> "LogitRules | None":
        """Rules for a request that asks for any."""
        params = request.params
        is_asked = (
            params.has_penalties
            or params.logit_bias
            or params.allowed_token_ids is not None
            or params.logits_processors
            or request.bad_word_ids
            or (params.min_tokens > 0 and request.stop_ids)
        )
        return LogitRules(request) if is_asked else None

    def prepare(self, logits_RV: torch.Tensor, row: int) -> RowError | None:
        """Edits for the next token; the model's row is read only by custom processors."""
        request = self._request
        if self._has_penalties:
            outputs = request.output_token_ids
            for token_id in outputs[self._num_seen :]:
                self.edits.count(token_id)
            self._num_seen = len(outputs)
        if self._is_banning:
            self.edits.ban(self._banned_now())
        return self._process(logits_RV[row]) if request.params.logits_processors else None

    def _banned_now(self) -> list[int]:
        request = self._request
        ids = self._bad_words.banned_after(request.token_ids)
        if len(request.output_token_ids) < request.params.min_tokens:
            return [*ids, *request.stop_ids]
        return ids

    def _process(self, logits_V: torch.Tensor) -> RowError | None:
        """Run the custom processors, each on what the one before returned."""
        request = self._request
        row_V = logits_V.to(torch.float32, copy=True).numpy()
        shape = row_V.shape
        self.edits.process(None)
        for processor in request.params.logits_processors:
            name = getattr(processor, "__qualname__", type(processor).__qualname__)
            try:
                returned = processor(request.prompt_token_ids, request.output_token_ids, row_V)
                row_V = row_V if returned is None else np.ascontiguousarray(returned, np.float32)
            except BaseException as error:  # a user's code: whatever it raises, sys.exit() too, ends its request alone
                logger.exception("the logits processor %s of request %r failed", name, request.request_id)
                return RowError(f"the logits processor {name} raised {type(error).__name__}: {error}")
            if row_V.shape != shape:
                return RowError(f"the logits processor {name} returned an array of shape {row_V.shape}, not {shape}")
            if np.isnan(row_V).any() or np.isposinf(row_V).any():
                return RowError(f"the logits processor {name} returned logits that are NaN or +inf")
        self.edits.process(row_V)
        return None
