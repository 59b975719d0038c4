"""One request's way out of the loop: its text as far as it is made, and what its listener has not heard yet."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import FinishReason, Request
from tritium.text.detokenizer import IncrementalDetokenizer, TextDelta
from tritium.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritium.runtime.fan_out import FanOut

Listener = Callable[[StepOutput], None]


class ListenerGone(Exception):
    """A listener raises it when nobody waits for its request any more: the request ends, quietly."""


class RequestStream:
    """Text and tokens of one request, from the last output sent on."""

    def __init__(
        self,
        request: Request,
        listener: Listener,
        tokenizer: Tokenizer | None,
        is_streaming: bool,
        group: "FanOut | None" = None,
    ) -> None:
        """group: the request that this one is a sample of."""
        self.request = request
        self.group = group
        self.listener = listener
        self.is_streaming = is_streaming
        # Without a stop string and without a waiting reader the text is made once, at the end.
        tokenizer = tokenizer if request.params.detokenize else None
        self.is_text_wanted = tokenizer is not None and (is_streaming or bool(request.params.stop))
        self._stop: str | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.params) if tokenizer is not None else None
        self._text = ""
        self._num_pushed = 0
        self._num_sent = 0
        self._is_prompt_due = request.params.prompt_logprobs is not None

    def push(self) -> str | None:
        """Detokenise what is new; returns the stop string that it completes, if any."""
        new = self.request.output_token_ids[self._num_pushed :]
        if self._detokenizer is not None and new:
            self._num_pushed += len(new)
            self._take(self._detokenizer.push(new))
        return self._stop

    def finish(self) -> None:
        """Detokenise the rest and let go of text held back. A stop string in the very last token counts."""
        self.push()
        if self._detokenizer is not None:
            self._take(self._detokenizer.finish())

    def output(self, *, reason: FinishReason | None = None, error: str | None = None) -> StepOutput:
        """What is new since the last call. reason: why it ended, where the request itself does not say."""
        request = self.request
        text, self._text = self._text, ""
        first, self._num_sent = self._num_sent, request.num_output_tokens
        prompt_logprobs = None
        if self._is_prompt_due and len(request.prompt_logprobs) == request.num_prompt_tokens:
            self._is_prompt_due, prompt_logprobs = False, tuple(request.prompt_logprobs)
        reason = "error" if error is not None else request.finish_reason or reason
        is_stopped = self._stop is not None and reason in ("stop", "length")
        return StepOutput(
            request_id=request.request_id,
            text=text,
            token_ids=tuple(request.output_token_ids[first:]),
            logprobs=tuple(request.output_logprobs[first:]),
            finish_reason="stop" if is_stopped else reason,
            stop_reason=self._stop if is_stopped else request.stop_reason,
            error=error,
            num_cached_tokens=request.num_cached_tokens,
            timings=request.timings,
            prompt_logprobs=prompt_logprobs,
            cumulative_logprob=request.cumulative_logprob if request.params.logprobs is not None else None,
            weights_generation=request.weights_generation,
        )

    def _take(self, delta: TextDelta) -> None:
        self._text += delta.text
        self._stop = self._stop or delta.stop
