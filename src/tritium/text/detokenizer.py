"""Turns one request's output tokens into text as they arrive."""

from collections.abc import Sequence
from typing import NamedTuple

from tritium.sampling_params import SamplingParams
from tritium.text.stop_strings import StopStringMatcher
from tritium.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """New text of an output, and the stop string that has just ended it (None: go on)."""

    text: str
    stop: str | None


class IncrementalDetokenizer:
    """Text of one output, each token's work constant on average.

    The deltas of all `push` calls and of `finish`, joined, are exactly `tokenizer.decode(all tokens)`, cut where a stop
    string ended it. No delta ends within a character, and text that may be the start of a stop string is held back
    until it is known not to be. A stop string completed before token number `params.min_tokens` is ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._stages = tokenizer.decoding_stages()
        self._skipped = tokenizer.special_token_ids if params.skip_special_tokens else frozenset()
        self._min_tokens = params.min_tokens
        self._includes_stop = params.include_stop_str_in_output
        self._matcher = StopStringMatcher(params.stop) if params.stop else None
        self._held = ""
        self._num_tokens = 0
        self._is_ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next output tokens. After a stop string, further tokens give no text."""
        settled = ""
        for token_id in token_ids:
            if self._is_ended:
                break
            self._num_tokens += 1
            token = None if token_id in self._skipped else self._tokenizer.token(token_id)
            pieces = [token] if token is not None else []
            for stage in self._stages:
                if not pieces:
                    break
                pieces = stage.push(pieces)
            text, stop = self._settle("".join(pieces))
            settled += text
            if stop is not None:
                return TextDelta(settled, stop)
        return TextDelta(settled, None)

    def finish(self) -> TextDelta:
        """The text still held back, at the end of the output. An incomplete character becomes U+FFFD."""
        if self._is_ended:
            return TextDelta("", None)
        pieces: list[str] = []
        for stage in self._stages:
            pieces = (stage.push(pieces) if pieces else []) + stage.finish()
        text, stop = self._settle("".join(pieces))
        self._is_ended = True
        held, self._held = self._held, ""
        return TextDelta(text + held, stop)

    def _settle(self, text: str) -> TextDelta:
        """`text` after what is held: what may be shown of both, and the stop string it completes."""
        if self._matcher is None or not text:
            return TextDelta(text, None)
        found = self._matcher.feed(text, is_honoured=self._num_tokens >= self._min_tokens)
        if found is None:
            whole = self._held + text
            cut = len(whole) - self._matcher.num_held
            self._held = whole[cut:]
            return TextDelta(whole[:cut], None)
        stop, end = found
        upto = self._held + text[:end]
        self._held, self._is_ended = "", True
        return TextDelta(upto if self._includes_stop else upto[: len(upto) - len(stop)], stop)
