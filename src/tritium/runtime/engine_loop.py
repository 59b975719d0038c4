"""The loop that serves requests: schedule, execute, take the tokens, tell the listeners. One thread owns all of it.

A step that raises ends only the requests that were in it; NaN logits end only their own request. Both end with
finish_reason "error", their blocks return to the pool, and the loop goes on.
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import FinishReason, Request, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.text.detokenizer import IncrementalDetokenizer, TextDelta
from tritium.text.tokenizer import Tokenizer

logger = logging.getLogger("tritium")

Listener = Callable[[StepOutput], None]


class StepExecutor(Protocol):
    """What the loop needs of an executor. `None` in place of a token: the row's logits were not numbers."""

    def execute(self, batch: ScheduledBatch) -> Sequence[SampledToken | None]:
        """Run the batch; one entry per sampled sequence, in their order."""
        ...


class EngineLoop:
    """Not thread-safe: `EngineThread` gives it a thread of its own and a safe door."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        tokenizer: Tokenizer | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        """seed: gives requests without one theirs, in order of submission; None: the system's randomness does."""
        self.scheduler = scheduler
        self._seeds = random.Random(seed)
        self._executor = executor
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}
        self.is_stalled = False  # the last step found nothing that could run

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished, or finished and not yet reported."""
        return bool(self._streams)

    def submit(self, request: Request, listener: Listener, *, is_streaming: bool = False) -> None:
        """Take a request; `listener` gets its outputs, each step when streaming, else once at the end.

        Raises `RequestError` when the request is invalid or could never fit; the listener is then never called.
        """
        if request.params.seed is None:
            request.params = dataclasses.replace(request.params, seed=self._seeds.getrandbits(64))
        self.scheduler.add(request)
        self._streams[request.request_id] = _Stream(request, listener, self._tokenizer, is_streaming)

    def abort(self, request_id: str) -> None:
        """End the request now with finish_reason "abort"; unknown and finished ones are ignored."""
        if request_id in self._streams:
            self._end(request_id, "abort")

    def step(self) -> list[StepOutput]:
        """Compute one batch. Returns what was sent to listeners."""
        batch = self.scheduler.schedule()
        self.is_stalled = not batch.sequences
        ended = [out for r in batch.finished for out in self._end(r.request_id, r.finish_reason or "abort")]
        if not batch.sequences:
            self.scheduler.update(batch, [])
            return ended
        try:
            tokens = self._executor.execute(batch)
            if len(tokens) != batch.num_sampled:
                raise RuntimeError(f"the executor returned {len(tokens)} tokens for {batch.num_sampled} sequences")
        except Exception as error:  # whatever a step raises must not end the loop
            logger.exception("a step failed; its %d requests end with an error", len(batch.sequences))
            failed = self.scheduler.fail(batch)
            return ended + [out for r in failed for out in self._end(r.request_id, "error", error=_text(error))]
        self._take(batch, tokens)
        return ended + self._report(batch)

    def close(self) -> None:
        """End every request with finish_reason "abort"."""
        for request_id in list(self._streams):
            self._end(request_id, "abort")

    def fail_all(self, error: BaseException) -> list[StepOutput]:
        """End every request with an error: the last resort when the scheduler itself cannot go on."""
        return [out for request_id in list(self._streams) for out in self._end(request_id, "error", error=_text(error))]

    def _take(self, batch: ScheduledBatch, tokens: Sequence[SampledToken | None]) -> None:
        """Give the sampled tokens to the scheduler; requests whose logits were not numbers end first."""
        if any(token is None for token in tokens):
            sampled = [s.request.request_id for s in batch.sequences if s.is_sampled]
            for request_id, token in zip(sampled, tokens, strict=True):
                if token is None:
                    self._end(request_id, "error", error="the model's logits were not finite numbers")
        self.scheduler.update(batch, [token if token is not None else SampledToken(0) for token in tokens])

    def _report(self, batch: ScheduledBatch) -> list[StepOutput]:
        """Detokenise where someone waits for text, honour stop strings, tell the listeners."""
        outputs: list[StepOutput] = []
        for sequence in batch.sequences:
            stream = self._streams.get(sequence.request.request_id)
            if stream is None or not sequence.is_sampled:
                continue
            request = stream.request
            stop = stream.push() if stream.is_text_wanted else None
            if request.is_finished or stop is not None:
                outputs += self._end(request.request_id, request.finish_reason or "stop", stop_reason=stop)
            elif stream.is_streaming:
                outputs += self._send(stream, stream.output())
        return outputs

    def _end(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> list[StepOutput]:
        """Finish the request in the scheduler (if it is not), send its last output, forget it."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return []
        if not stream.request.is_finished:
            self.scheduler.abort(request_id, reason=reason, stop_reason=stop_reason)
        stream.finish()
        return self._send(stream, stream.output(error=error))

    def _send(self, stream: "_Stream", output: StepOutput) -> list[StepOutput]:
        try:
            stream.listener(output)
        except Exception:  # a caller's listener must not end the loop
            logger.exception("the listener of request %r failed; the request ends", stream.request.request_id)
            if self._streams.pop(stream.request.request_id, None) is not None:
                self.scheduler.abort(stream.request.request_id)
        return [output]


class _Stream:
    """One request's way out: its listener, its text so far, how many tokens were sent."""

    def __init__(self, request: Request, listener: Listener, tokenizer: Tokenizer | None, is_streaming: bool) -> None:
        self.request = request
        self.listener = listener
        self.is_streaming = is_streaming
        # Without a stop string and without a waiting reader the text is made once, at the end.
        self.is_text_wanted = tokenizer is not None and (is_streaming or bool(request.params.stop))
        self._stop: str | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.params) if tokenizer is not None else None
        self._text = ""
        self._num_pushed = 0
        self._num_sent = 0

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

    def output(self, *, error: str | None = None) -> StepOutput:
        """What is new since the last call."""
        request = self.request
        text, self._text = self._text, ""
        first, self._num_sent = self._num_sent, request.num_output_tokens
        is_stopped = self._stop is not None and request.finish_reason in ("stop", "length")
        return StepOutput(
            request_id=request.request_id,
            text=text,
            token_ids=tuple(request.output_token_ids[first:]),
            logprobs=tuple(request.output_logprobs[first:]),
            finish_reason="stop" if is_stopped else request.finish_reason,
            stop_reason=self._stop if is_stopped else request.stop_reason,
            error=error,
            num_cached_tokens=request.num_cached_tokens,
            timings=request.timings,
        )

    def _take(self, delta: TextDelta) -> None:
        self._text += delta.text
        self._stop = self._stop or delta.stop


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
