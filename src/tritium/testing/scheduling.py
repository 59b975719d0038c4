"""Stepping a scheduler without a model: a clock that counts, tokens by a rule, and a KV cache that stores meaning.

`ShadowKV` is the oracle: where a real cache holds numbers, it holds which tokens they were computed from. Every key
that a step's queries see is compared with what it ought to be, so a block that was shared wrongly, freed too early or
handed out twice shows at once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tritium.runtime.request import Request, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.sampling_params import SamplingParams


class FakeClock:
    """Seconds that pass by one at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class ShadowKV:
    """generation: counts changes of the weights; raise it when the prefix cache is reset."""

    def __init__(self, block_size: int, windows: Sequence[int]) -> None:
        self.generation = 0
        self._block_size = block_size
        self._windows = tuple(windows)
        self._slots: dict[tuple[int, int], tuple[int, str, tuple[int, ...], int]] = {}
        self._started: dict[tuple[Request, int], int] = {}

    def execute(self, batch: ScheduledBatch) -> None:
        """Write every scheduled position, then check every key its queries see; an `AssertionError` names the first."""
        for request, start, num_tokens, _ in batch.sequences:
            self._started.setdefault((request, request.num_preemptions), self.generation)
            for group, table in enumerate(request.block_tables):
                for position in range(start, start + num_tokens):
                    slot = self._slot(table, position)
                    assert slot[0] != 0, f"{request.request_id}: position {position} would be written to the null block"
                    prefix = tuple(request.token_ids[: position + 1])
                    self._slots[slot] = (group, request.cache_salt, prefix, self.generation)
        for request, start, num_tokens, _ in batch.sequences:
            for group, window in enumerate(self._windows):
                first = max(0, start - window + 1) if window else 0
                for position in range(first, start + num_tokens):
                    self._check_key(request, group, position)

    def prefix_in(self, block: int) -> tuple[int, str, tuple[int, ...], int]:
        """(group, salt, all tokens up to its end, generation) of a block that has been written to its last slot."""
        return self._slots[block, self._block_size - 1]

    def _check_key(self, request: Request, group: int, position: int) -> None:
        slot = self._slot(request.block_tables[group], position)
        *found, generation = self._slots.get(slot, (None, None, None, -1))
        expected = [group, request.cache_salt, tuple(request.token_ids[: position + 1])]
        where = f"{request.request_id}, group {group}, position {position}, slot {slot}"
        assert found == expected, f"{where}: the cache holds {found}, not {expected}"
        started = self._started[request, request.num_preemptions]
        assert generation >= started, f"{where}: computed in generation {generation}, before {started}"

    def _slot(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self._block_size], position % self._block_size


def make_scheduler(**changes: Any) -> Scheduler:
    """4 seats, 8 tokens a step, 32 blocks of 4 tokens, contexts of 32; `changes` are fields of `SchedulerConfig`."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 32, "block_size": 4, "num_blocks": 33}
    return Scheduler(SchedulerConfig(**(sizes | changes)), FakeClock())


def make_request(
    request_id: str, prompt: Sequence[int], *, priority: int = 0, eos: tuple[int, ...] = (), **params: Any
) -> Request:
    """A request whose sampling parameters are keywords."""
    return Request(request_id, prompt, SamplingParams(**params), priority=priority, eos_token_ids=eos)


def ids(requests: Iterable[Request]) -> list[str]:
    """Their request ids."""
    return [request.request_id for request in requests]


def shape(batch: ScheduledBatch) -> list[tuple[str, int, int, bool]]:
    """(request id, start, number of tokens, whether sampled) of each sequence."""
    return [(s.request.request_id, s.start, s.num_tokens, s.is_sampled) for s in batch.sequences]


def always_one(request: Request) -> int:
    """A model that knows one token."""
    return 1


def run_step(
    scheduler: Scheduler, choose: Callable[[Request], int], kv: ShadowKV | None = None
) -> tuple[ScheduledBatch, list[Request]]:
    """One schedule() and update(), with `choose` as the model; returns the batch and what finished."""
    batch = scheduler.schedule()
    if kv is not None:
        kv.execute(batch)
    sampled = [sequence.request for sequence in batch.sequences if sequence.is_sampled]
    return batch, scheduler.update(batch, [SampledToken(choose(request)) for request in sampled])


def run_all(
    scheduler: Scheduler, choose: Callable[[Request], int], kv: ShadowKV | None = None, limit: int = 10_000
) -> int:
    """Step until there is no work; returns the number of steps. `AssertionError` after `limit` steps."""
    num_steps = 0
    while scheduler.has_work:
        assert num_steps < limit, f"still working after {limit} steps: {scheduler.stats}"
        run_step(scheduler, choose, kv)
        num_steps += 1
    return num_steps
