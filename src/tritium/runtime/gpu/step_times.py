"""How long each step of an engine's plan takes on the GPU that is here, in its place among the others.

The steps of a batch are launched in order behind a wait that the GPU does first, so that none of them waits for the
host, with an event between any two. Weights are as cold as the other layers' leave them. A kernel cannot start beside
the one before it, as it may in real steps: what it gains by that is not in its time.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from triton.runtime.errors import OutOfResources

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.tactics import Tactics
from tritium.errors import OutOfMemory
from tritium.kernels.kernel import Thunk
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner
from tritium.runtime.gpu.executor import GpuExecutor
from tritium.runtime.kv_cache import block_bytes
from tritium.runtime.request import Request, SampledToken, ScheduledBatch
from tritium.runtime.step_times import WARM_UP_ROUNDS, medians, timed_ids
from tritium.sampling_params import SamplingParams

MOST_KEYS = 65_536  # that the sequences of a decoding batch have behind them together
LONGEST_CONTEXT = 1024
LONGEST_TEXT = 256  # tokens of one text of an encoder's batch
_MOST_NEW = 64  # tokens that a sequence may decode until the last one has its prompt
_FEWEST_TOKENS = 4096  # a step; with MOST_KEYS few enough steps for _MOST_NEW
_CYCLES_A_SECOND = 2_000_000_000  # at most, of any GPU's clock
_LONGEST_WAIT = 0.1  # seconds


class GpuStepTimer:
    """Times batches of one decoder, by any tactics; its weights are loaded once."""

    def __init__(
        self,
        engine: Engine,
        counts: Sequence[int],
        *,
        largest_decode: int,
        block_size: int = RuntimeConfig.block_size,
    ) -> None:
        """counts: sizes of the batches to be timed, of which those up to `largest_decode` are decoding sequences."""
        self._engine, self._largest_decode = engine, largest_decode
        num_decodes = max((count for count in counts if count <= largest_decode), default=1)
        config = RuntimeConfig(
            max_num_seqs=num_decodes,
            max_num_batched_tokens=max(_FEWEST_TOKENS, *counts),
            max_model_len=min(engine.manifest.max_model_len, max(LONGEST_CONTEXT, *counts) + _MOST_NEW),
            enable_prefix_caching=False,
            block_size=block_size,
        )
        if 2 * (needed := _cache_bytes(engine, config)) < torch.cuda.mem_get_info()[0]:
            config = replace(config, kv_cache_memory=needed)  # and not all that is free
        self._config = config
        self._executor = GpuExecutor(engine, config, has_graphs=False, tactics=no_tactics())
        self._executor.fill_cache()
        self._longest = self._executor.memory.max_model_len
        self._scheduler = make_scheduler(engine, config, self._executor)
        self._running: tuple[ScheduledBatch, list[str]] | None = None
        self._num_requests = 0

    def times(self, count: int, tactics: Tactics, repeats: int) -> list[float]:
        """Seconds of each step, in the plan's order, by these tactics: the median of `repeats` rounds after warm-up.

        inf: the step's kernel wants more of something than this GPU has.
        """
        self._executor.use(tactics)
        return _times(self._executor.thunks(self._executor.prepare(self._batch(count))), repeats)

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._executor.close()

    def _batch(self, count: int) -> ScheduledBatch:
        """`count` decoding sequences, or one prompt of so many tokens; nobody computes what is before it."""
        self._end_running()
        is_decode = count <= self._largest_decode
        length = self._context(count) if is_decode else min(count, self._longest - 2)
        ids = self._add_requests(count if is_decode else 1, length, max_tokens=_MOST_NEW if is_decode else 2)
        batch = self._scheduler.schedule()
        while is_decode and not (batch.is_decode and batch.num_sampled == count):
            if not batch.sequences:
                raise OutOfMemory(
                    f"the KV cache has no room for {count} sequences of {length} tokens, which are to be timed: free "
                    "more of the GPU's memory"
                )
            self._executor.prepare(batch)
            self._scheduler.update(batch, [SampledToken(0)] * batch.num_sampled)
            batch = self._scheduler.schedule()
        self._running = batch, ids
        return batch

    def _end_running(self) -> None:
        """Of the batch before."""
        if self._running is None:
            return
        batch, ids = self._running
        self._scheduler.update(batch, [SampledToken(0)] * batch.num_sampled)
        for request_id in ids:
            self._scheduler.abort(request_id)
        self._running = None

    def _add_requests(self, num_requests: int, length: int, *, max_tokens: int) -> list[str]:
        """Prompts of so many tokens, none like another; their ids."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        ids = [f"{self._num_requests + number}" for number in range(num_requests)]
        self._num_requests += num_requests
        for number, request_id in enumerate(ids):
            prompt = timed_ids(number, length, self._engine.plan.vocab_size)
            self._scheduler.add(Request(request_id, prompt, params))
        return ids

    def _context(self, count: int) -> int:
        """Tokens that each of so many decoding sequences has behind it: what the cache holds, and a place to go on."""
        tokens = self._executor.memory.num_blocks * self._config.block_size // max(1, len(self._engine.plan.kv_groups))
        room = tokens * 3 // (4 * count) - _MOST_NEW - self._config.block_size
        return max(1, min(LONGEST_CONTEXT, MOST_KEYS // count, self._longest - _MOST_NEW - 1, room))


def _cache_bytes(engine: Engine, config: RuntimeConfig) -> int:
    """Of keys and values of the largest decoding batch, and half as much again."""
    tokens = MOST_KEYS + config.max_num_seqs * (_MOST_NEW + config.block_size) + config.max_num_batched_tokens
    groups = engine.plan.kv_groups
    return max(1, tokens * 3 // 2 // config.block_size * len(groups) * block_bytes(groups, config.block_size))


def no_tactics() -> Tactics:
    """Every step by its default."""
    return Tactics(environment={}, effort="none")


class GpuEncoderStepTimer:
    """Times batches of texts of one encoder, by any tactics; its weights are loaded once."""

    def __init__(self, engine: Engine, counts: Sequence[int], *, largest_decode: int) -> None:
        """counts: tokens of the batches to be timed. largest_decode: of no meaning for an encoder."""
        self._vocab_size = engine.plan.vocab_size
        self._longest = min(engine.manifest.max_model_len, LONGEST_TEXT)
        config = RuntimeConfig(
            max_num_seqs=-(-max(counts, default=1) // self._longest), max_num_batched_tokens=max(1, *counts)
        )
        self._runner = GpuEncoderRunner(engine, config, has_graphs=False, tactics=no_tactics())

    def times(self, count: int, tactics: Tactics, repeats: int) -> list[float]:
        """As `GpuStepTimer.times`, for `count` tokens in texts of up to `LONGEST_TEXT`."""
        self._runner.use(tactics)
        lengths = [min(self._longest, count - start) for start in range(0, count, self._longest)]
        batch = [
            EncoderRequest(
                token_ids=timed_ids(number, length, self._vocab_size), token_types=[0] * length, task="embed"
            )
            for number, length in enumerate(lengths)
        ]
        return _times(self._runner.thunks(batch), repeats)

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._runner.close()


def _times(thunks: Sequence[Thunk], repeats: int) -> list[float]:
    """Seconds of each step: the median of `repeats` rounds after warm-up; inf for one that cannot run."""
    refused = {number for number, thunk in enumerate(thunks) if not _can_run(thunk)}
    kept = [_nothing if number in refused else thunk for number, thunk in enumerate(thunks)]
    wait, rounds = _LONGEST_WAIT, []
    for _ in range(WARM_UP_ROUNDS + repeats):
        seconds, launching = _round(kept, wait)
        wait = min(_LONGEST_WAIT, 1.5 * launching)
        rounds.append(seconds)
    seconds = medians(rounds[WARM_UP_ROUNDS:])
    return [math.inf if number in refused else one for number, one in enumerate(seconds)]


def _can_run(thunk: Thunk) -> bool:
    try:
        thunk()
    except OutOfResources:
        return False
    return True


def _nothing() -> None:
    """In the place of a step that cannot run."""


def _round(thunks: Sequence[Callable[[], object]], wait: float) -> tuple[list[float], float]:
    """Run all steps once, behind a wait of so many seconds: those of each, and those that the host took to launch all.

    A host that falls behind the GPU would be what is measured: with less, the last steps took up to four times as long.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(thunks) + 1)]
    torch.cuda._sleep(int(_CYCLES_A_SECOND * wait))
    start = time.perf_counter()
    events[0].record()
    for thunk, event in zip(thunks, events[1:], strict=True):
        thunk()
        event.record()
    launching = time.perf_counter() - start
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)], launching
