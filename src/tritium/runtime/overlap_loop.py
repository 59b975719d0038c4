"""The loop for an executor that computes a step while the host prepares the next: one step ahead of its tokens.

    schedule k + 1     every request that was sampled in step k has a pending token (id -1) at its end
    launch k + 1       it reads the pending tokens where step k leaves them
    collect k          its tokens take the places of the pending ones; stops are seen here, one step late
    update k + 1       its tokens are pending in turn

A request that stopped in step k was computed once more in step k + 1 for nothing: that token is dropped, and no block
with a pending token in it is ever published. A batch that only the host can sample is collected at once, before any
of its tokens counts as pending: what is asked of its logits depends on the tokens before, all of them. While new
weights are on their way, each step is collected before a piece of that work: nothing is pending at the exchange.
"""

from typing import Any, NamedTuple, Protocol

from tritium.runtime.engine_loop import EngineLoop, error_text, log_failure
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import PENDING, RowError, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.weight_updates import WeightUpdates
from tritium.text.tokenizer import Tokenizer


class Launched(Protocol):
    """A step on its way."""

    @property
    def is_sampled_on_device(self) -> bool:
        """The next step can be launched before this one is collected."""
        ...


class OverlapExecutor(Protocol):
    """What the loop needs of an executor."""

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | RowError]:
        """`launch` and `collect`."""
        ...

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start the batch and return; pending input tokens are those that the step before it samples."""
        ...

    def collect(self, step: Any) -> list[SampledToken | RowError]:
        """Wait for a step that `launch` returned; one entry per sampled sequence, in their order."""
        ...

    def close(self) -> None:
        """Give back all memory: nothing is called after it."""
        ...


class _Pending(NamedTuple):
    batch: ScheduledBatch
    launched: Launched


class OverlapLoop(EngineLoop):
    """An `EngineLoop` with one step in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: OverlapExecutor,
        tokenizer: Tokenizer | None = None,
        *,
        seed: int | None = None,
        updates: WeightUpdates | None = None,
    ) -> None:
        super().__init__(scheduler, executor, tokenizer, seed=seed, updates=updates)
        self._overlapping = executor
        self._pending: _Pending | None = None

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or unreported, or a step is in flight."""
        return super().has_work or self._pending is not None

    def abort(self, request_id: str) -> None:
        """As `EngineLoop.abort`, once the step in flight has come back."""
        self._collect()
        super().abort(request_id)

    def step(self) -> list[StepOutput]:
        """Launch one batch and take the tokens of the one before. Returns what was sent to listeners."""
        for group in self._fan_outs.values():
            self._start_held(group)
        told: list[StepOutput] = []
        is_updating = False
        if self._updates is not None and self._updates.has_work:
            told = self._collect()
            is_updating = self._updates.advance()
        batch = self.scheduler.schedule()
        self.is_stalled = not batch.sequences and self._pending is None and not is_updating
        launched, failure = None, None
        try:
            self._untold += batch.finished
            if batch.sequences:
                ended, self._untold = self._untold, ()
                launched = self._overlapping.launch(batch._replace(finished=ended))
        except Exception as error:  # noqa: BLE001 - whatever a step raises must not end the loop
            log_failure(error, len(batch.sequences))
            failure = error
        outputs = told + self._collect()
        for request in filter(self._is_heard, batch.finished):
            outputs += self._end(request.request_id, request.finish_reason or "abort")
        if failure is not None:
            failed = self.scheduler.fail(batch)
            return outputs + [o for r in failed for o in self._end(r.request_id, "error", error=error_text(failure))]
        if launched is None:
            self.scheduler.update(batch, [])
            return outputs
        if not launched.is_sampled_on_device:
            outputs += self._take(batch, self._tokens(batch, launched))
            return outputs + self._report(batch)
        self.scheduler.update(batch, [SampledToken(PENDING)] * batch.num_sampled)
        self._pending = _Pending(batch, launched)
        return outputs

    def close(self) -> None:
        """As `EngineLoop.close`."""
        self._collect()
        super().close()

    def _collect(self) -> list[StepOutput]:
        """Wait for the step in flight, if there is one; its tokens take the places of the pending ones."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        outputs: list[StepOutput] = []
        sampled = [sequence.request for sequence in pending.batch.sequences if sequence.is_sampled]
        for request, token in zip(sampled, self._tokens(*pending), strict=True):
            if not request.has_pending:  # ended since
                continue
            if isinstance(token, RowError):
                request.drop_pending()
                outputs += self._end(request.request_id, "error", error=token.message)
            else:
                self.scheduler.resolve(request, token)
        return outputs + self._report(pending.batch)

    def _tokens(self, batch: ScheduledBatch, launched: Launched) -> list[SampledToken | RowError]:
        """Those of a launched step; when waiting for them fails, the reason for every row."""
        try:
            return self._overlapping.collect(launched)
        except Exception as error:  # noqa: BLE001 - the same
            log_failure(error, batch.num_sampled)
            return [RowError(error_text(error))] * batch.num_sampled
