"""From a prompt's token ids and parameters to the `Request` that an engine runs, with what its tokenizer must add."""

from collections.abc import Sequence

from tritium.errors import RequestError
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams
from tritium.text.bad_words import bad_word_ids
from tritium.text.tokenizer import Tokenizer
from tritium.text.tokenizer_files import ADD_TOKENIZER


class RequestMaker:
    """Makes requests for one engine.

    tokenizer: the engine's own, or None. eos_token_ids: the engine's word on what ends an output, beside the
    tokenizer's. engine: what to call the engine in an error.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], engine: object) -> None:
        self._tokenizer = tokenizer
        self._engine = engine
        own = tokenizer.eos_token_ids if tokenizer is not None else ()
        self._eos_token_ids = tuple({*own, *eos_token_ids})

    def make(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """A request not yet submitted. Raises `RequestError` when `params` needs text and there is no tokenizer."""
        if params.stop:
            self.need_tokenizer("stop strings need a tokenizer; use stop_token_ids")
        bad_words: tuple[tuple[int, ...], ...] = ()
        if params.bad_words:
            bad_words = bad_word_ids(params.bad_words, self.need_tokenizer("bad_words need a tokenizer"))
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            priority=priority,
            eos_token_ids=self._eos_token_ids,
            bad_word_ids=bad_words,
            cache_salt=cache_salt,
        )

    def need_tokenizer(self, why: str) -> Tokenizer:
        """The tokenizer. Raises `RequestError`, beginning with `why`, when the engine has none."""
        if self._tokenizer is None:
            raise RequestError(f"{why}: the engine {self._engine} has no tokenizer.json; {ADD_TOKENIZER}")
        return self._tokenizer
