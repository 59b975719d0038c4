"""How long each step of an engine's plan takes here, in its place among the others.

The steps run in order, as a batch runs them, and each call is timed: its inputs are as warm as its neighbours leave
them, and its weights as cold, since all other weights are read between two rounds. The clock costs 0.1 µs a step.
"""

import statistics
import time
from collections.abc import Sequence

from tritium.config import RuntimeConfig, check_int
from tritium.engine.engine import Engine
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.executor import Executor
from tritium.runtime.request import Request, SampledToken
from tritium.sampling_params import SamplingParams

WARM_UP_ROUNDS = 2


class StepTimer:
    """Times batches of one engine. tactics: in place of the engine's own."""

    def __init__(self, engine: Engine, *, num_threads: int | None = None, tactics: Tactics | None = None) -> None:
        if engine.manifest.kind != "decoder":
            raise EngineError(f"{engine.path} is a stateless module: only the steps of decoders are timed")
        self._engine, self._num_threads, self._tactics = engine, num_threads, tactics

    def prefill(self, num_tokens: int, repeats: int = 5) -> list[float]:
        """Seconds of each step, in the plan's order, for one prompt of `num_tokens`: the median of `repeats` rounds."""
        return self._times([num_tokens], repeats, is_decode=False)

    def decode(self, num_sequences: int, context_len: int, repeats: int = 9) -> list[float]:
        """The same for a batch in which `num_sequences` sequences of `context_len` tokens decode one each."""
        return self._times([context_len] * num_sequences, repeats, is_decode=True)

    def _times(self, prompt_lens: Sequence[int], repeats: int, *, is_decode: bool) -> list[float]:
        engine = self._engine
        check_int("repeats", repeats, 1, 10_000)
        for length in prompt_lens:
            check_int("the number of tokens", length, 1, engine.manifest.max_model_len - 2)
        config = RuntimeConfig(
            max_num_seqs=len(prompt_lens),
            max_num_batched_tokens=sum(prompt_lens),
            max_model_len=max(prompt_lens) + 2,
            enable_prefix_caching=False,
            num_threads=self._num_threads,
        )
        executor = Executor(engine, config, tactics=self._tactics)
        scheduler = make_scheduler(engine, config, executor)
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        for number, length in enumerate(prompt_lens):
            ids = [(number * 7919 + i * 104_729) % engine.plan.vocab_size for i in range(length)]
            scheduler.add(Request(f"{number}", ids, params))
        executor.fill_cache()
        batch = scheduler.schedule()
        if is_decode:  # what a prompt's keys and values are is no matter: nobody computes them
            scheduler.update(batch, [SampledToken(0)] * batch.num_sampled)
            batch = scheduler.schedule()
        thunks = executor.thunks(executor.prepare(batch))
        rounds = []
        for _ in range(WARM_UP_ROUNDS + repeats):
            seconds = []
            for thunk in thunks:
                start = time.perf_counter()
                thunk()
                seconds.append(time.perf_counter() - start)
            rounds.append(seconds)
        return [statistics.median(column) for column in zip(*rounds[WARM_UP_ROUNDS:], strict=True)]
