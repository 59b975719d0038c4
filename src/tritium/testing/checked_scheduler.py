"""A scheduler that checks everything it promises while it runs: the model behind the property tests.

`CheckedScheduler` keeps its own count of what is computed, decides by itself who may run and when a request ends, and
compares after every step: batch, finish reasons, reference counts, tables, cached content.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain

from tritium.errors import RequestTooLarge
from tritium.runtime.request import FinishReason, Request, RequestStatus, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.testing.scheduling import FakeClock, ShadowKV


class CheckedScheduler:
    """Every method is the scheduler's own, with an `AssertionError` if anything is not as promised.

    live: unfinished requests by id. seen: how often things happened that a test wants to have happened.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config, FakeClock())
        self.kv = ShadowKV(config.block_size, config.windows)
        self.live: dict[str, Request] = {}
        self.seen: Counter[str] = Counter()
        self._computed: dict[Request, int] = {}  # tokens in the cache; absent while it holds no blocks
        self._ended: list[Request] = []  # since the batch before

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Add it; it must be refused exactly if it could not run alone."""
        try:
            self.scheduler.add(request)
        except RequestTooLarge as error:
            assert not self._can_ever_run(request) and request.request_id in str(error)
            self.seen["refused"] += 1
        else:
            assert self._can_ever_run(request)
            self.live[request.request_id] = request

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """Abort a live request, then the same again, then one that never was."""
        request = self.live[request_id]
        phase = "in prefill" if request.num_computed_tokens and not request.output_token_ids else "otherwise"
        self.seen[f"abort while {request.status.value}, {phase}"] += 1
        assert self.scheduler.abort(request_id, reason=reason) is request
        assert self.scheduler.abort(request_id) is None
        assert self.scheduler.abort("nobody") is None
        assert (request.finish_reason, request.stop_reason) == (reason, None)
        self._note_end(request)

    def reset_prefix_cache(self, *, is_refit: bool) -> None:
        """From now on nothing computed so far may be hit."""
        self.kv.generation += 1
        self.scheduler.reset_prefix_cache(f"weights {self.kv.generation}" if is_refit else None)

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self, choose: Callable[[], int]) -> None:
        """One whole step, `choose` drawing each sampled token."""
        self.update(self.schedule(), choose)

    def schedule(self) -> ScheduledBatch:
        """The next batch, checked and written to the shadow cache."""
        decodes = {request for request, count in self._computed.items() if request.num_tokens == count + 1}
        batch = self.scheduler.schedule()
        assert list(batch.finished) == self._ended
        self._ended = []
        for request in batch.preempted:
            assert request.status is RequestStatus.PREEMPTED and request.block_tables == []
            assert request.token_ids == [*request.prompt_token_ids, *request.output_token_ids]
            del self._computed[request]
            self.seen["preempted with outputs" if request.num_output_tokens else "preempted in prefill"] += 1
        self._check_order(batch)
        self._check_batch(batch, decodes - set(batch.preempted))
        self.kv.execute(batch)
        return batch

    def update(self, batch: ScheduledBatch, choose: Callable[[], int]) -> None:
        """Exactly the expected requests finish, for the expected reasons; aborted ones get no token."""
        tokens = [SampledToken(choose(), -1.0) for sequence in batch.sequences if sequence.is_sampled]
        given, expected, outputs = iter(tokens), [], {}
        for request, _, num_tokens, is_sampled in batch.sequences:
            token = next(given) if is_sampled else None
            outputs[request] = list(request.output_token_ids)
            if request.is_finished:
                continue
            self._computed[request] += num_tokens
            if token is not None:
                outputs[request].append(token.token_id)
                if (end := self._expected_end(request, token.token_id)) is not None:
                    expected.append((request, *end))
        finished = self.scheduler.update(batch, tokens)
        assert [(r, r.finish_reason, r.stop_reason) for r in finished] == expected
        assert {request: request.output_token_ids for request in outputs} == outputs
        for request in finished:
            self.seen[f"finished by {request.finish_reason}"] += 1
            self._note_end(request)

    def fail(self, batch: ScheduledBatch) -> None:
        """The step's requests, and only they, end with "error"."""
        failed = self.scheduler.fail(batch)
        assert failed == [sequence.request for sequence in batch.sequences]
        assert all(request.finish_reason == "error" for request in failed)
        for request in failed:
            cached = self.scheduler._kv.cache.lookup(request.block_digests)
            assert cached.num_blocks == 0, "what a failed request used may be wrong"
            self._note_end(request)

    def run_out(self, choose: Callable[[], int]) -> None:
        """Everything ends in boundedly many steps, and the pool is full again."""
        limit = 10 + 10 * sum(request.max_total_tokens for request in self.live.values())
        while self.scheduler.has_work:
            assert limit, f"no end in sight: {self.scheduler.stats}"
            limit -= 1
            self.step(choose)
        assert not self.live and self.scheduler.stats.num_blocks_used == 0
        self.check_blocks()

    # -- what always holds ---------------------------------------------------------------------------------------------

    def check_blocks(self) -> None:
        """Reference counts equal the tables; each block is used, kept or blank, and only one of these."""
        pool = self.scheduler._kv.pool
        pool.check()
        tables = [[b for b in chain.from_iterable(request.block_tables) if b] for request in self.live.values()]
        owned = Counter(chain.from_iterable(tables))
        assert all(len(set(table)) == len(table) for table in tables)
        assert [len(table) for table in tables] == [request.num_held_blocks for request in self.live.values()]
        assert {block: count for block, count in enumerate(pool._references) if count} == owned
        places = [*owned, *pool._kept, *pool._blank]
        assert sorted(places) == list(range(1, self.config.num_blocks))
        stats = self.scheduler.stats
        assert stats.num_running + stats.num_waiting == len(self.live)
        assert (stats.num_blocks_used, stats.num_blocks_total) == (len(owned), self.config.num_blocks - 1)

    def check_cached_content(self) -> None:
        """What the shadow cache holds in a named block is what its digest stands for, under today's weights."""
        cache, pool = self.scheduler._kv.cache, self.scheduler._kv.pool
        assert {block for block in range(self.config.num_blocks) if pool._is_kept[block]} == set(cache._names)
        for block, (group, digest) in cache._names.items():
            found_group, salt, prefix, generation = self.kv.prefix_in(block)
            digests: list[bytes] = []
            cache.extend(digests, prefix, salt, len(prefix) // self.config.block_size)
            assert (found_group, digests[-1], generation) == (group, digest, self.kv.generation)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check_order(self, batch: ScheduledBatch) -> None:
        """Nobody starts before one that was ahead in line; the last in order are preempted, and only if allowed."""
        running = [r.queue_key for r in self.live.values() if r.status is RequestStatus.RUNNING]
        waiting = [r.queue_key for r in self.live.values() if r.status is not RequestStatus.RUNNING]
        started = [s.request.queue_key for s in batch.sequences if s.request not in self._computed]
        assert len(running) <= self.config.max_num_seqs
        assert not (started and waiting) or max(started) < min(waiting)
        if batch.preempted:
            assert self.config.policy == "max_utilization"
            assert max(running) < min(request.queue_key for request in batch.preempted)

    def _check_batch(self, batch: ScheduledBatch, decodes: set[Request]) -> None:
        requests = [sequence.request for sequence in batch.sequences]
        assert bool(requests) == bool(self.live), "a step must make progress while there is work"
        assert len(set(requests)) == len(requests)
        assert batch.num_tokens == sum(s.num_tokens for s in batch.sequences) <= self.config.max_num_batched_tokens
        assert batch.num_sampled == sum(s.is_sampled for s in batch.sequences)
        is_decode = [request in decodes for request in requests]
        assert is_decode == sorted(is_decode, reverse=True), "decodes come first"
        if self.config.policy == "guaranteed_no_evict":
            assert decodes <= set(requests), "nobody waits for a block"
        for request, start, num_tokens, is_sampled in batch.sequences:
            if request not in self._computed:
                self._computed[request] = self._checked_hit(request, start)
            assert request.status is RequestStatus.RUNNING and self.live[request.request_id] is request
            assert start == request.num_computed_tokens == self._computed[request]
            assert 1 <= num_tokens <= request.num_tokens - start
            assert is_sampled == (start + num_tokens == request.num_tokens)

    def _checked_hit(self, request: Request, start: int) -> int:
        assert start % self.config.block_size == 0 and start < request.num_tokens
        assert request.num_preemptions > 0 or request.num_cached_tokens == start
        assert start == 0 or self.config.enable_prefix_caching
        if start:
            self.seen["prefix hit at resume" if request.num_preemptions else "prefix hit"] += 1
        return start

    def _can_ever_run(self, request: Request) -> bool:
        """Alone, token by token, by counting the blocks that its visible keys touch."""
        size, longest = self.config.block_size, self.config.max_model_len
        if request.num_tokens >= longest:
            return False
        total = min(longest, request.num_tokens + (request.params.max_tokens or longest))
        return all(self._num_visible_blocks(last, size) < self.config.num_blocks for last in range(total - 1))

    def _num_visible_blocks(self, last: int, size: int) -> int:
        return sum(
            len({key // size for key in range(last + 1) if not window or key > last - window})
            for window in self.config.windows
        )

    def _expected_end(self, request: Request, token_id: int) -> tuple[FinishReason, int | None] | None:
        params, num_outputs = request.params, request.num_output_tokens + 1
        if num_outputs >= params.min_tokens:
            if token_id in request.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        if num_outputs == params.max_tokens or request.num_tokens + 1 == self.config.max_model_len:
            return "length", None
        return None

    def _note_end(self, request: Request) -> None:
        del self.live[request.request_id]
        self._computed.pop(request, None)
        self._ended.append(request)
        assert request.is_finished and request.block_tables == []
        assert request.token_ids == [*request.prompt_token_ids, *request.output_token_ids]
        reported = [] if request.params.logprobs is None else request.output_token_ids
        assert [token.token_id for token in request.output_logprobs] == reported
        times = request.timings
        seen = [t for t in (times.arrival, times.first_scheduled, times.first_token, times.finished) if t is not None]
        assert seen == sorted(seen) and times.finished is not None
        assert (times.first_token is not None) == bool(request.output_token_ids)
