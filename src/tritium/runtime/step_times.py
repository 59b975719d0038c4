"""How long each step of an engine's plan takes here, in its place among the others.

The steps run in order, as a batch runs them, and each call is timed: its inputs are as warm as its neighbours leave
them, and its weights as cold, since all other weights are read between two rounds. The clock costs 0.1 µs a step.
"""

import statistics
import time
from collections.abc import Sequence

from tritium.config import RuntimeConfig, check_int
from tritium.engine.engine import Engine
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.executor import Executor
from tritium.runtime.request import Request, SampledToken, ScheduledBatch
from tritium.sampling_params import SamplingParams

WARM_UP_ROUNDS = 2


def prefill_times(engine: Engine, num_tokens: int, *, repeats: int = 5, num_threads: int | None = None) -> list[float]:
    """Seconds of each step, in the plan's order, for one prompt of `num_tokens`: the median of `repeats` rounds."""
    return _times(engine, [num_tokens], repeats, num_threads, is_decode=False)


def decode_times(
    engine: Engine, num_sequences: int, context_len: int, *, repeats: int = 9, num_threads: int | None = None
) -> list[float]:
    """The same for a step in which each of `num_sequences` sequences with `context_len` tokens decodes one."""
    return _times(engine, [context_len] * num_sequences, repeats, num_threads, is_decode=True)


def _times(
    engine: Engine, prompt_lens: Sequence[int], repeats: int, num_threads: int | None, *, is_decode: bool
) -> list[float]:
    check_int("repeats", repeats, 1, 10_000)
    for length in prompt_lens:
        check_int("the number of tokens", length, 1, engine.manifest.max_model_len - 2)
    config = RuntimeConfig(
        max_num_seqs=len(prompt_lens),
        max_num_batched_tokens=max(prompt_lens),
        max_model_len=max(prompt_lens) + 2,
        enable_prefix_caching=False,
        num_threads=num_threads,
    )
    executor = Executor(engine, config)
    scheduler = make_scheduler(engine, config, executor)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for number, length in enumerate(prompt_lens):
        ids = [(number * 7919 + i * 104_729) % engine.plan.vocab_size for i in range(length)]
        scheduler.add(Request(f"{number}", ids, params))
    batch = scheduler.schedule()
    while is_decode and not _is_decoding(batch, len(prompt_lens)):
        scheduler.update(batch, [token for token in executor.execute(batch) if isinstance(token, SampledToken)])
        batch = scheduler.schedule()
    prepared = executor.prepare(batch)
    thunks = executor.thunks(prepared)
    rounds = []
    for _ in range(WARM_UP_ROUNDS + repeats):
        seconds = []
        for thunk in thunks:
            start = time.perf_counter()
            thunk()
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return [statistics.median(column) for column in zip(*rounds[WARM_UP_ROUNDS:], strict=True)]


def _is_decoding(batch: ScheduledBatch, num_sequences: int) -> bool:
    return len(batch.sequences) == num_sequences == batch.num_tokens
