"""One text, or pair of texts, on its way through an encoder, and what may be asked of it. Loads no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from tritium.errors import RequestError, RequestTooLarge

Task = Literal["embed", "token_embed", "classify", "token_classify"]
Pooling = Literal["cls", "mean", "last", "pooler"]
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "last", "pooler")


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """token_ids, token_types: one each per token. pooling, is_normalized: what "embed" makes of the tokens."""

    token_ids: Sequence[int]
    token_types: Sequence[int]
    task: Task
    pooling: Pooling = "cls"
    is_normalized: bool = True

    @cached_property
    def ids(self) -> np.ndarray:
        """token_ids as an array, made once: a GPU computes a text about as fast as Python's numbers are converted."""
        return np.fromiter(self.token_ids, np.int64, len(self.token_ids))

    @cached_property
    def types(self) -> np.ndarray:
        """token_types, likewise."""
        return np.fromiter(self.token_types, np.int64, len(self.token_types))

    def check(self, *, max_model_len: int, vocab_size: int, num_token_types: int) -> None:
        """Raises `RequestError` for what the model has no rows for, `RequestTooLarge` with the numbers."""
        if not self.token_ids:
            raise RequestError("the prompt has no tokens: an encoder needs at least one")
        if len(self.token_ids) > max_model_len:
            raise RequestTooLarge(
                f"the prompt has {len(self.token_ids)} tokens, the model takes {max_model_len}: shorten it, or allow "
                "that by truncate_prompt_tokens=-1"
            )
        for name, ids, numbers, end in (
            ("token id", self.token_ids, lambda: self.ids, vocab_size),
            ("token type", self.token_types, lambda: self.types, num_token_types),
        ):
            if set(map(type, ids)) == {int} and _are_below(end, numbers):
                continue
            for value in ids:  # which one it is
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
                    raise RequestError(f"{value!r} is no {name} of this model: expected an integer from 0 to {end - 1}")
        if len(self.token_types) != len(self.token_ids):
            raise RequestError(f"{len(self.token_ids)} token ids need as many token types, not {len(self.token_types)}")


def _are_below(end: int, numbers: Callable[[], np.ndarray]) -> bool:
    """Whether all of them are from 0 to end - 1."""
    try:
        array = numbers()
    except OverflowError:
        return False
    return bool(array.min() >= 0 and array.max() < end)
