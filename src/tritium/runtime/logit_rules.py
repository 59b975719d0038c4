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

    def banned_after(self, token_ids: Sequence[int]) -> list[int]:
        """What is banned next, beside `always`."""
        if not self._by_last or token_ids[-1] not in self._by_last:
            return []
        return [last for before, last in self._by_last[token_ids[-1]] if list(token_ids[-len(before) :]) == before]


class LogitRules:
    """Keeps `edits` in step with one request."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.edits = LogitEdits(
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            bias=params.logit_bias,
            allowed_ids=params.allowed_token_ids,
        )
        self._request = request
        self._bad_words = BadWords(request.bad_word_ids)
        self._always = np.array(self._bad_words.always, np.int32)
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

    def prepare(self, logits_V: torch.Tensor) -> RowError | None:
        """Edits for the next token; `logits_V` is the model's row, read only by custom processors."""
        request, edits = self._request, self.edits
        if request.params.has_penalties:
            outputs = request.output_token_ids
            for token_id in outputs[self._num_seen :] if self._num_seen < len(outputs) else ():
                edits.count(token_id)
            self._num_seen = len(outputs)
        edits.ban(self._banned())
        return self._process(logits_V) if request.params.logits_processors else None

    def _banned(self) -> np.ndarray:
        request = self._request
        ids = self._bad_words.banned_after(request.token_ids)
        if len(request.output_token_ids) < request.params.min_tokens:
            ids = [*ids, *request.stop_ids]
        return np.concatenate([self._always, np.array(ids, np.int32)]) if ids else self._always

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
