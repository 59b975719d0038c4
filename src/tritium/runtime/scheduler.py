"""Decides, step by step, which tokens of which requests are computed next. Pure Python; knows no tensors.

Each step has one budget of tokens. Running requests that decode come first (one token each), then prefill chunks of the
running ones and of waiting requests that are admitted, strictly in order of (priority, arrival): nobody overtakes the
first in line, so nobody starves within a priority. Under `max_utilization` a request is admitted when its known tokens
fit, and when blocks run out the last in that order gives its own up and is recomputed later; under
`guaranteed_no_evict` it is admitted when it fits up to its last possible token, and nobody is ever preempted.

A step always makes progress: the first running request in order can take the blocks of all others, alone it fits
(checked by `add`), and with nothing running the first waiting request is admitted.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from operator import attrgetter

from tritium.errors import RequestError
from tritium.runtime.batch_draft import BatchDraft
from tritium.runtime.kv_manager import KVManager
from tritium.runtime.refusals import most_total_tokens, refuse_unless_fitting, refuse_unless_runnable
from tritium.runtime.request import (
    FinishReason,
    Request,
    RequestStatus,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
)
from tritium.runtime.scheduler_config import SchedulerConfig, SchedulerStats

RUNNING = RequestStatus.RUNNING
queue_key = attrgetter("queue_key")


class Scheduler:
    """Alternate `schedule()` and `update()` (or `fail()`); `add` and `abort` may come at any moment, on one thread.

    clock: seconds; only differences matter.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._kv = KVManager(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            windows=config.windows,
            fingerprint=f"{config.fingerprint}, weights {config.weights_generation}",
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._is_reserving = config.policy == "guaranteed_no_evict"
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # both sorted by queue_key
        self._running: list[Request] = []
        self._in_flight: ScheduledBatch | None = None
        self._ended: list[Request] = []
        self._displaced: list[Request] = []  # preempted between two steps; the next batch says so
        self.weights_generation = config.weights_generation
        self.is_holding = False  # only requests that have run before are started
        self._num_added = self._num_steps = self._num_preemptions = 0
        self._num_hit_tokens = self._num_query_tokens = 0

    # -- requests come and go ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a request in line, or raise `RequestError`; `RequestTooLarge` if it could never run, with the numbers."""
        if request.request_id in self._requests:
            raise RequestError(f"request {request.request_id!r}: another unfinished request has this request_id")
        refuse_unless_runnable(request, self.config)
        request.max_total_tokens = most_total_tokens(request, self.config)
        refuse_unless_fitting(request, self._kv)
        if request.timings.arrival is None:
            request.timings.arrival = self._clock()
        request.weights_generation = self.weights_generation
        self._num_added += 1
        request.queue_key = (request.priority, self._num_added)
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=queue_key)

    def abort(
        self, request_id: str, *, reason: FinishReason = "abort", stop_reason: str | None = None
    ) -> Request | None:
        """End a request now, whatever it is doing, and free its blocks. None if it is unknown or already finished.

        A token being computed for it is dropped. The loop ends a request at a stop string with `reason="stop"`,
        and with "error" when its numbers went wrong: then nothing it computed or used is shared from now on.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason, stop_reason, self._clock())
        return request

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._requests)

    @property
    def stats(self) -> SchedulerStats:
        """Counts as of now."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks_used=self._kv.pool.num_used,
            num_blocks_total=self._kv.pool.num_usable,
            num_prefix_hit_tokens=self._num_hit_tokens,
            num_prefix_query_tokens=self._num_query_tokens,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
        )

    def reset_prefix_cache(self, fingerprint: str | None = None) -> None:
        """Forget every cached prefix; later ones belong to `fingerprint` (after new weights: a new one), if given.

        What requests in flight have computed, and go on to compute until they are preempted, is never shared.
        """
        self._kv.forget_all(fingerprint)
        for request in self._requests.values():
            request.block_digests = []
            request.can_publish = False

    def begin_generation(self, generation: int) -> None:
        """New weights are in use: outputs from now on are theirs, and prefixes of other generations are never hit."""
        self.weights_generation = generation
        self.reset_prefix_cache(f"{self.config.fingerprint}, weights {generation}")

    def preempt_all(self) -> None:
        """Take every running request's blocks: prompt and outputs so far are computed anew, under either policy."""
        while self._running:
            self._displaced.append(self._preempt())

    @property
    def has_started(self) -> bool:
        """True while a request is unfinished that has run, be it preempted since."""
        return any(request.timings.first_scheduled is not None for request in self._requests.values())

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """The next batch; every position in it has its slot in the block tables. Empty only if there is no work."""
        if self._in_flight is not None:
            raise RuntimeError("schedule() was called again before update() or fail() of the batch before")
        draft = BatchDraft(self.config.max_num_batched_tokens)
        prefills = self._continue_decodes(draft)
        for request in prefills:
            self._admit_waiting(draft, ahead_of=request)
            self._continue_prefill(request, draft)
        self._admit_waiting(draft)
        batch = draft.seal(self._ended, displaced=self._displaced)
        self._ended, self._displaced = [], []
        self._in_flight = batch
        return batch

    def update(self, batch: ScheduledBatch, tokens: Sequence[SampledToken]) -> list[Request]:
        """Take the step's results, one token per sampled sequence, in order. Returns the requests finished by it."""
        if len(tokens) != batch.num_sampled:
            raise RuntimeError(f"{len(tokens)} tokens came back for {batch.num_sampled} sampled sequences")
        self._close_step(batch)
        now = self._clock()
        finished = []
        next_token = iter(tokens)
        for request, start, num_tokens, is_sampled in batch.sequences:
            token = next(next_token) if is_sampled else None
            if request.status is not RUNNING:  # aborted since
                continue
            request.num_computed_tokens = start + num_tokens
            self._kv.publish(request)
            if token is not None and self._take_output(request, token, now):
                finished.append(request)
        self._kv.pool.check()
        return finished

    def resolve(self, request: Request, token: SampledToken) -> None:
        """`update` was given PENDING for this request; this is the token. It may end the request, now or again."""
        now = self._clock()
        request.resolve_pending(token)
        if request.timings.first_token is None:
            request.timings.first_token = now
        if request.is_finished:  # by its length, in update
            request.timings.finished = now
            if self._is_stopped(request):
                request.finish_reason, request.stop_reason = "stop", self._stop_reason(request)
        elif self._is_stopped(request):
            self._finish(request, "stop", self._stop_reason(request), now)

    def fail(self, batch: ScheduledBatch) -> list[Request]:
        """The step raised: end its requests with "error". Nothing they computed or used is shared from now on."""
        self._close_step(batch)
        now = self._clock()
        failed = [sequence.request for sequence in batch.sequences if sequence.request.status is RUNNING]
        for request in failed:
            self._finish(request, "error", None, now)
        return failed

    # -- schedule(), in order ------------------------------------------------------------------------------------------

    def _continue_decodes(self, draft: BatchDraft) -> list[Request]:
        """One token for each running request that has only one to compute; returns the others, still to prefill."""
        prefills = []
        for request in tuple(self._running):
            if request.status is not RUNNING:  # preempted by one before it
                continue
            start = request.num_computed_tokens
            if start + 1 < len(request.token_ids):
                prefills.append(request)
            elif start < request.num_slots or self._make_room(request, start + 1, draft) > start:
                draft.add(ScheduledSequence(request, start, 1, True))
        return prefills

    def _continue_prefill(self, request: Request, draft: BatchDraft) -> None:
        """As many of its tokens as budget and blocks allow, if it is still running."""
        start = request.num_computed_tokens
        if request.status is not RUNNING or not draft.budget:
            return
        end = self._make_room(request, min(request.num_tokens, start + draft.budget), draft)
        if end > start:
            draft.add(ScheduledSequence(request, start, end - start, end == request.num_tokens))

    def _make_room(self, request: Request, end: int, draft: BatchDraft) -> int:
        """Slots up to token `end`, or as far as free blocks reach. If that is nowhere, those after it are preempted.

        Returns how far it came: `num_computed_tokens` when it is itself the last in order and has to wait a step.
        """
        kv = self._kv
        kv.trim(request)
        while (reached := min(end, kv.reach(request, kv.pool.num_free))) <= request.num_computed_tokens:
            if self._running[-1] is request:
                return request.num_computed_tokens
            draft.drop(self._preempt())
        kv.grow(request, reached)
        return reached

    def _preempt(self) -> Request:
        """Take the last running request's blocks and put it back in line, before all that never ran at its priority."""
        request = self._running.pop()
        self._kv.close(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        insort(self._waiting, request, key=queue_key)
        return request

    def _admit_waiting(self, draft: BatchDraft, ahead_of: Request | None = None) -> None:
        """Start waiting requests, in order, while there are seats, budget and blocks that are not spoken for.

        ahead_of: only those of a better priority than this running one, which has not had its turn.
        """
        if draft.preempted or not self._waiting:
            return
        available = self._unreserved_blocks()
        while draft.budget and available > 0 and len(self._running) < self.config.max_num_seqs:
            request = self._first_waiting()
            if request is None:
                return
            if ahead_of is not None and request.queue_key > ahead_of.queue_key:
                return
            hit = self._kv.lookup(request)
            request.num_reserved_blocks = self._blocks_to_reserve(request)
            cost = request.num_reserved_blocks - (0 if self._is_reserving else self._kv.num_shared(hit))
            if cost > available:
                return
            available -= cost
            self._waiting.remove(request)
            insort(self._running, request, key=queue_key)
            self._kv.open(request, hit)
            self._note_start(request)
            self._continue_prefill(request, draft)

    def _first_waiting(self) -> Request | None:
        """The next in line; while the scheduler is holding, the next that has run before."""
        if not self.is_holding:
            return self._waiting[0] if self._waiting else None
        return next((r for r in self._waiting if r.timings.first_scheduled is not None), None)

    def _blocks_to_reserve(self, request: Request) -> int:
        """What must be free to start it: blocks for all it may ever have, or for what it has and one block more."""
        most = request.max_total_tokens - 1  # the last output is never computed
        num_tokens = most if self._is_reserving else min(most, request.num_tokens + self.config.block_size)
        peak = self._kv.peak_blocks(num_tokens, self.config.max_num_batched_tokens)
        return min(peak, self._kv.pool.num_usable)  # alone it may use smaller chunks

    def _unreserved_blocks(self) -> int:
        """What may be reserved for new ones.

        max_utilization keeps one block per group for each running request, lest the newcomer is preempted at once.
        guaranteed_no_evict counts a shared block for each of its users: behind a window they part.
        """
        pool = self._kv.pool
        if self._is_reserving:
            return pool.num_usable - sum(request.num_reserved_blocks for request in self._running)
        return pool.num_free - len(self._running) * len(self.config.windows)

    def _note_start(self, request: Request) -> None:
        request.status = RUNNING
        if request.timings.first_scheduled is None:
            request.timings.first_scheduled = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
            self._num_hit_tokens += request.num_cached_tokens
            self._num_query_tokens += request.num_tokens

    # -- update(), in order --------------------------------------------------------------------------------------------

    def _close_step(self, batch: ScheduledBatch) -> None:
        if batch is not self._in_flight:
            raise RuntimeError("update() or fail() needs the batch that schedule() returned last, once")
        self._in_flight = None
        self._num_steps += 1

    def _take_output(self, request: Request, token: SampledToken, now: float) -> bool:
        """Append the token; True if the request is finished by it. A stop is honoured from `min_tokens` outputs on."""
        request.append_output(token)
        request.weights_generation = self.weights_generation
        if request.timings.first_token is None and not request.has_pending:
            request.timings.first_token = now
        if self._is_stopped(request):
            self._finish(request, "stop", self._stop_reason(request), now)
        elif len(request.token_ids) >= request.max_total_tokens:
            self._finish(request, "length", None, now)
        return request.status is not RUNNING

    def _is_stopped(self, request: Request) -> bool:
        is_stop = request.output_token_ids[-1] in request.stop_ids
        return is_stop and len(request.output_token_ids) >= request.params.min_tokens

    def _stop_reason(self, request: Request) -> int | None:
        token_id = request.output_token_ids[-1]
        return None if token_id in request.eos_token_ids and not request.params.ignore_eos else token_id

    def _finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None, now: float) -> None:
        if reason != "length":  # the token at that length is still to come
            request.drop_pending()
        queue = self._running if request.status is RUNNING else self._waiting
        del queue[bisect_left(queue, request.queue_key, key=queue_key)]
        del self._requests[request.request_id]
        if reason == "error":
            self._kv.distrust(request)
        self._kv.close(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.timings.finished = now
        self._ended.append(request)
