"""The loop that serves requests: schedule, execute, take the tokens, tell the listeners. One thread owns all of it.

A step that raises ends only the requests that were in it; a row without a token ends only its own. Both end with
finish_reason "error", their blocks return to the pool, and the loop goes on.
"""

import dataclasses
import logging
import random
from collections.abc import Sequence
from typing import Protocol

from tritium.errors import EngineError, RequestError, TritiumError
from tritium.runtime.fan_out import FanOut
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import FinishReason, Request, RowError, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.stream import Listener, ListenerGone, RequestStream
from tritium.runtime.weight_updates import WeightUpdate, WeightUpdates
from tritium.text.tokenizer import Tokenizer

logger = logging.getLogger("tritium")


class StepExecutor(Protocol):
    """What the loop needs of an executor."""

    def execute(self, batch: ScheduledBatch) -> Sequence[SampledToken | RowError]:
        """Run the batch; one entry per sampled sequence, in their order."""
        ...

    def close(self) -> None:
        """Give back all memory: nothing is called after it."""
        ...


class EngineLoop:
    """Not thread-safe: `EngineThread` gives it a thread of its own and a safe door."""

    failure: EngineError | None = None  # it outlives whatever a step does

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        tokenizer: Tokenizer | None = None,
        *,
        seed: int | None = None,
        updates: WeightUpdates | None = None,
    ) -> None:
        """seed: gives requests without one theirs, in order of submission; None: the system's randomness does.

        updates: takes new weights between steps; None: the executor's weights cannot change.
        """
        self.scheduler = scheduler
        self._seeds = random.Random(seed)
        self.executor = executor
        self._updates = updates
        self._tokenizer = tokenizer
        self._streams: dict[str, RequestStream] = {}
        self._fan_outs: dict[str, FanOut] = {}  # by the parent's request_id, until its last child has ended
        self._untold: tuple[Request, ...] = ()  # ended, and no batch was run since: the executor does not know
        self.is_stalled = False  # the last step found nothing that could run

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished, or finished and not yet reported, or new weights are on their way."""
        return bool(self._streams) or (self._updates is not None and self._updates.has_work)

    def submit(self, request: Request, listener: Listener, *, is_streaming: bool = False) -> None:
        """Take a request; `listener` gets its outputs, each step when streaming, else once at the end.

        Raises `RequestError` when the request is invalid or could never fit; the listener is then never called.
        """
        if request.params.seed is None:
            request.params = dataclasses.replace(request.params, seed=self._seeds.getrandbits(64))
        group = FanOut(request, listener) if request.params.num_samples > 1 else None
        self._refuse_known_ids(group.children if group is not None else [request])
        if group is None:
            self.scheduler.add(request)
            self._streams[request.request_id] = RequestStream(request, listener, self._tokenizer, is_streaming)
            return
        self.scheduler.add(group.children[0])
        self._fan_outs[request.request_id] = group
        is_streaming = is_streaming and not group.is_ranked
        for index, child in enumerate(group.children):
            stream = RequestStream(child, group.listener_of(index), self._tokenizer, is_streaming, group)
            self._streams[child.request_id] = stream

    def knows(self, request_id: str) -> bool:
        """It is unfinished, or not all of its outputs are."""
        return request_id in self._streams or request_id in self._fan_outs

    def abort(self, request_id: str) -> None:
        """End the request, each output of it, with finish_reason "abort"; unknown and finished ones are ignored."""
        group = self._fan_outs.get(request_id)
        for request in group.children if group is not None else ():
            self._end(request.request_id, "abort")
        self._end(request_id, "abort")

    def update_weights(self, update: WeightUpdate) -> None:
        """Take new weights as soon as they are staged; `update.done` tells when. Raises `EngineError` if it cannot."""
        if self._updates is None:
            raise EngineError("this loop's executor has no weights to update")
        self._updates.add(update)

    def step(self) -> list[StepOutput]:
        """Compute one batch, after a piece of a weight update if there is one. Returns what was sent to listeners."""
        for group in self._fan_outs.values():
            self._start_held(group)
        is_updating = self._updates is not None and self._updates.advance()
        batch = self.scheduler.schedule()
        self.is_stalled = not batch.sequences and not is_updating
        ended = [
            out
            for r in batch.finished
            if self._is_heard(r)
            for out in self._end(r.request_id, r.finish_reason or "abort")
        ]
        self._untold += batch.finished
        if not batch.sequences:
            self.scheduler.update(batch, [])
            return ended
        try:
            told, self._untold = self._untold, ()
            tokens = self.executor.execute(batch._replace(finished=told))
            if len(tokens) != batch.num_sampled:
                raise RuntimeError(f"the executor returned {len(tokens)} tokens for {batch.num_sampled} sequences")
        except Exception as error:  # noqa: BLE001 - whatever a step raises must not end the loop
            log_failure(error, len(batch.sequences))
            failed = self.scheduler.fail(batch)
            return ended + [out for r in failed for out in self._end(r.request_id, "error", error=error_text(error))]
        ended += self._take(batch, tokens)
        return ended + self._report(batch)

    def close(self) -> None:
        """End every request with finish_reason "abort", every weight update with an error; give the memory back."""
        if self._updates is not None:
            self._updates.close()
        for request_id in list(self._streams):
            self._end(request_id, "abort")
        self.executor.close()

    def let_go(self) -> None:
        """See `Loop.let_go`: its steps wait for nobody."""

    def fail_all(self, error: BaseException) -> list[StepOutput]:
        """End every request with an error: the last resort when the scheduler itself cannot go on."""
        return [
            out for request_id in list(self._streams) for out in self._end(request_id, "error", error=error_text(error))
        ]

    def _refuse_known_ids(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.knows(request.request_id):
                raise RequestError(
                    f"request {request.request_id!r}: another unfinished request has this request_id; choose another"
                )

    def _start_held(self, group: FanOut) -> None:
        """Start the samples that wait for a prompt which has now been computed."""
        if group.held and group.is_prompt_ready:
            for child in group.held:
                if child.request_id in self._streams:
                    child.timings.arrival = group.children[0].timings.arrival
                    self.scheduler.add(child)
            group.held = []

    def _take(self, batch: ScheduledBatch, tokens: Sequence[SampledToken | RowError]) -> list[StepOutput]:
        """Give the sampled tokens to the scheduler; requests that have none end first."""
        ended: list[StepOutput] = []
        if any(isinstance(token, RowError) for token in tokens):
            sampled = [s.request.request_id for s in batch.sequences if s.is_sampled]
            for request_id, token in zip(sampled, tokens, strict=True):
                if isinstance(token, RowError):
                    ended += self._end(request_id, "error", error=token.message)
        self.scheduler.update(batch, [SampledToken(0) if isinstance(token, RowError) else token for token in tokens])
        return ended

    def _report(self, batch: ScheduledBatch) -> list[StepOutput]:
        """Detokenise where someone waits for text, honour stop strings, tell the listeners."""
        outputs: list[StepOutput] = []
        for sequence in batch.sequences:
            stream = self._streams.get(sequence.request.request_id)
            if stream is None or not sequence.is_sampled:
                continue
            request = stream.request
            try:
                stop = stream.push() if stream.is_text_wanted else None
            except Exception as error:  # one output that cannot be decoded must not end the others
                logger.exception("the text of request %r could not be made", request.request_id)
                outputs += self._end(request.request_id, "error", error=error_text(error))
                continue
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
        """Finish the request in the scheduler (if it is not), send its last output, forget it.

        The listener hears of the end whatever fails on the way: somebody may be waiting for it.
        """
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return []
        self._leave(stream)
        try:
            if not stream.request.is_finished:
                self.scheduler.abort(request_id, reason=reason, stop_reason=stop_reason)
            stream.finish()
        except Exception as failure:
            logger.exception("request %r could not be ended properly", request_id)
            reason, error = "error", error or error_text(failure)
        return self._send(stream, stream.output(reason=reason, error=error))

    def _send(self, stream: RequestStream, output: StepOutput) -> list[StepOutput]:
        try:
            stream.listener(output)
        except Exception as error:  # a caller's listener must not end the loop
            if not isinstance(error, ListenerGone):
                logger.exception("the listener of request %r failed; the request ends", stream.request.request_id)
            if self._streams.pop(stream.request.request_id, None) is not None:
                self._leave(stream)
                self.scheduler.abort(stream.request.request_id)
            if stream.group is not None:
                self.abort(stream.group.request.request_id)
        return [output]

    def _is_heard(self, request: Request) -> bool:
        """True while its listener waits. Another request may have its request_id by now."""
        stream = self._streams.get(request.request_id)
        return stream is not None and stream.request is request

    def _leave(self, stream: RequestStream) -> None:
        """The stream has been taken out: with the last of its group, the group goes."""
        group = stream.group
        if group is not None and not any(child.request_id in self._streams for child in group.children):
            self._fan_outs.pop(group.request.request_id, None)


def log_failure(error: Exception, num_requests: int) -> None:
    """A step has failed. An error of Tritium's own says what is wrong; of another, where it was raised tells more."""
    trace = None if isinstance(error, TritiumError) else error
    logger.error("a step failed; its %d requests end with an error: %s", num_requests, error, exc_info=trace)


def error_text(error: BaseException) -> str:
    """What a request is told of an exception."""
    return f"{type(error).__name__}: {error}"
