"""How long each step of an engine's plan takes here, in its place among the others.

The steps run in order, as a batch runs them, and each call is timed: its inputs are as warm as its neighbours leave
them, and its weights as cold, since all other weights are read between two rounds. The clock costs 0.1 µs a step.
"""

import statistics
import time
from collections.abc import Callable, Sequence

from tritium.config import RuntimeConfig, check_int
from tritium.engine.engine import Engine
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError
from tritium.kernels.kernel import Thunk
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.executor import Executor
from tritium.runtime.request import Request, SampledToken
from tritium.sampling_params import SamplingParams

WARM_UP_ROUNDS = 2
Clock = Callable[[], float]
Rounds = list[list[float]]  # seconds, by round and step


class TimedBatch:
    """A batch whose steps can be run again and again. owner: what holds their memory."""

    def __init__(self, thunks: Sequence[Thunk], owner: object) -> None:
        self._thunks, self._owner = thunks, owner

    def round(self, clock: Clock = time.perf_counter) -> list[float]:
        """Run all steps once: seconds of each, in the plan's order."""
        seconds = []
        for thunk in self._thunks:
            start = clock()
            thunk()
            seconds.append(clock() - start)
        return seconds


def rounds_in_turn(batches: Sequence[TimedBatch], repeats: int, clock: Clock = time.perf_counter) -> list[Rounds]:
    """`repeats` rounds of each batch after warm-up, one of each in turn, every second turn in reverse: what the machine
    does meanwhile meets all of them alike. Compare the rounds of one turn with each other.

    clock: `time.thread_time`, with one thread, counts the work alone, where other processes take the core away.
    """
    check_int("repeats", repeats, 1, 10_000)
    rounds: list[Rounds] = [[] for _ in batches]
    for turn in range(WARM_UP_ROUNDS + repeats):
        for number in range(len(batches)) if turn % 2 == 0 else reversed(range(len(batches))):
            rounds[number].append(batches[number].round(clock))
    return [of_one[WARM_UP_ROUNDS:] for of_one in rounds]


def medians(rounds: Rounds) -> list[float]:
    """Of each step over the rounds."""
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def timed_ids(number: int, length: int, vocab_size: int) -> list[int]:
    """The tokens of a batch's sequence of that number: all differ."""
    return [(number * 7919 + i * 104_729) % vocab_size for i in range(length)]


class StepTimer:
    """Times batches of one engine, a decoder's or an encoder's. tactics: in place of the engine's own."""

    def __init__(self, engine: Engine, *, num_threads: int | None = None, tactics: Tactics | None = None) -> None:
        if engine.manifest.kind not in ("decoder", "encoder"):
            raise EngineError(f"{engine.path} is a stateless module: only steps of decoders and encoders are timed")
        self._engine, self._num_threads, self._tactics = engine, num_threads, tactics

    def prefill(self, num_tokens: int, repeats: int = 5) -> list[float]:
        """Seconds of each step, in the plan's order, for one prompt (an encoder's text) of `num_tokens`: the median of
        `repeats` rounds."""
        return medians(rounds_in_turn([self.prefill_batch(num_tokens)], repeats)[0])

    def decode(self, num_sequences: int, context_len: int, repeats: int = 9) -> list[float]:
        """The same for a batch in which `num_sequences` sequences of `context_len` tokens decode one each."""
        return medians(rounds_in_turn([self.decode_batch(num_sequences, context_len)], repeats)[0])

    def prefill_batch(self, num_tokens: int) -> TimedBatch:
        """One prompt, or an encoder's text, of `num_tokens`."""
        if self._engine.manifest.kind == "encoder":
            return self._text(num_tokens)
        return self._batch([num_tokens], is_decode=False)

    def decode_batch(self, num_sequences: int, context_len: int) -> TimedBatch:
        """`num_sequences` sequences of `context_len` tokens that decode one each. Raises `EngineError` for encoders."""
        if self._engine.manifest.kind == "encoder":
            raise EngineError(f"{self._engine.path} is an encoder: it decodes nothing; time a text instead")
        return self._batch([context_len] * num_sequences, is_decode=True)

    def _text(self, num_tokens: int) -> TimedBatch:
        check_int("the number of tokens", num_tokens, 1, self._engine.manifest.max_model_len)
        config = RuntimeConfig(max_num_seqs=1, max_num_batched_tokens=num_tokens, num_threads=self._num_threads)
        runner = EncoderRunner(self._engine, config, tactics=self._tactics)
        ids = timed_ids(0, num_tokens, self._engine.plan.vocab_size)
        text = EncoderRequest(token_ids=ids, token_types=[0] * num_tokens, task="token_embed")
        return TimedBatch(runner.thunks([text]), runner)

    def _batch(self, prompt_lens: Sequence[int], *, is_decode: bool) -> TimedBatch:
        engine = self._engine
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
            ids = timed_ids(number, length, engine.plan.vocab_size)
            scheduler.add(Request(f"{number}", ids, params))
        executor.fill_cache()
        batch = scheduler.schedule()
        if is_decode:  # what a prompt's keys and values are is no matter: nobody computes them
            scheduler.update(batch, [SampledToken(0)] * batch.num_sampled)
            batch = scheduler.schedule()
        return TimedBatch(executor.thunks(executor.prepare(batch)), executor)
