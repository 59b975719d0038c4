"""Runs an engine's plan on scheduled batches.

    prepare   write the batch into the plan's input tensors
    launch    call the thunks of its bucket: first over the tokens, then over the sampled rows
    sample    choose a token for every sampled row

Everything is made once: one arena, persistent inputs, thunks bound when a bucket is first met and kept. Launching
allocates nothing of ours. All calls belong on one thread, the engine thread.
"""

import ctypes
import logging
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tritium.config import RuntimeConfig, available_memory, available_threads
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.engine.plan import Sizes
from tritium.engine.tactics import Tactics
from tritium.errors import EngineError, OutOfMemory
from tritium.kernels.communicator import Communicator
from tritium.kernels.kernel import LaunchContext, Thunk
from tritium.runtime.batch import BatchBuilder
from tritium.runtime.binding import Binder, bind_tuned
from tritium.runtime.bound_steps import BoundSteps
from tritium.runtime.buckets import bucket
from tritium.runtime.footprint import footprint
from tritium.runtime.kernel_choice import choose_kernels, usable_tactics
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loaded_weights import LoadedWeights, bytes_in_use
from tritium.runtime.memory import shared
from tritium.runtime.prepared_step import PreparedStep
from tritium.runtime.prompt_logprobs import PromptScorer, scored_parts
from tritium.runtime.request import RowError, SampledToken, ScheduledBatch
from tritium.runtime.sampler import Sampler
from tritium.runtime.slots import RequestSlots
from tritium.runtime.staged_weights import StagedWeights
from tritium.weights.source import WeightSource

logger = logging.getLogger("tritium")


class Executor:
    """Owns weights, arena, KV cache, inputs and sampler of one engine.

    memory: the KV cache's size and the length a sequence may have; the scheduler must be configured with it.
    """

    def __init__(
        self,
        engine: Engine,
        config: RuntimeConfig,
        *,
        is_null: bool = False,
        tactics: Tactics | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Load and lay out everything. is_null: launch calls that do nothing in place of kernels, to time the host.

        tactics: in place of the engine's own, which count only on a machine like that on which they were measured.
        communicator: connects the ranks of an engine that is a part of a model. Every rank must be given the same
            requests in the same order: they run the same steps. The KV cache is as large as the smallest of theirs.

        Sets torch's thread count for this thread. Raises `EngineError`, `KernelError` or `OutOfMemory`.
        """
        torch.set_num_threads(config.num_threads or available_threads())
        num_ranks = check_ranks(engine, communicator)
        plan, groups = engine.plan, engine.plan.kv_groups
        self._engine = engine
        self._plan = plan
        self._is_null = is_null
        self._tactics = tactics or usable_tactics(engine, environment(config.num_threads))
        tuned = self._tactics.kernels if self._tactics else None
        self._kernels = choose_kernels(plan, engine.plugins, tuned=tuned)
        layout = footprint(
            plan,
            self._kernels,
            config,
            is_bitwise=engine.manifest.invariance == "bitwise",
            engine_max_model_len=engine.manifest.max_model_len,
            available_bytes=available_memory() // (num_ranks // config.num_nodes),  # they share a machine's
            num_ranks=num_ranks,
        )
        if communicator is not None:
            layout = replace(layout, memory=shared(layout.memory, groups, config.block_size, communicator.smallest))
        self.memory, self._largest, self._multiples = layout.memory, layout.largest, layout.multiples
        logger.info("%s", self.memory.describe())
        self._slots = RequestSlots(config.max_num_seqs)
        self._builder = BatchBuilder(
            max_tokens=self._largest.tokens,
            max_sequences=config.max_num_seqs,
            max_rows=self._largest.rows,
            max_model_len=self.memory.max_model_len,
            block_size=config.block_size,
            num_groups=len(groups),
        )
        binder = Binder(
            plan,
            offsets=layout.offsets,
            arena_bytes=layout.arena_bytes,
            inputs=self._builder.inputs.tensors,
            weights=LoadedWeights(engine),
            kv_cache=KVCache(groups, self.memory.num_blocks, config.block_size),
            context=LaunchContext(communicator=communicator),
        )
        self.steps = BoundSteps(
            plan,
            binder,
            _null_step if is_null else self._bind_step,
            largest=layout.largest,
            fewest_tokens=bucket(1, self._multiples["tokens"]),
            fewest_rows=bucket(1, self._multiples["rows"]),
        )
        self._sampler = Sampler(plan.vocab_size, config.max_num_seqs, is_null=is_null)
        self._scorer = PromptScorer(plan.vocab_size, config.max_num_seqs)

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | RowError]:
        """Run the batch; one entry per sampled sequence, in order: its token, or why it has none."""
        step = self.prepare(batch)
        self.launch(step)
        return self.sample(step)

    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """Write the batch into the plan's inputs."""
        for slot, request in self._slots.admit(batch):
            self._builder.admit(slot, request)
            self._sampler.admit(slot, request)
        token_bucket = bucket(batch.num_tokens, self._multiples["tokens"])
        row_bucket = bucket(batch.num_sampled, self._multiples["rows"])
        layout = self._builder.build(batch, self._slots.of(batch), padded_tokens=token_bucket, padded_rows=row_bucket)
        return PreparedStep(layout, token_bucket, row_bucket, scored_parts(batch))

    def launch(self, step: PreparedStep) -> None:
        """Run every step of the plan; those over sampled rows if there are any, for prompts to be scored too."""
        for thunk in self.steps.tokens(step.token_bucket):
            thunk()
        if step.scored and not self._is_null:
            self._score_prompts(step)
        if step.layout.num_rows:
            for thunk in self.steps.rows(step.row_bucket)[0]:
                thunk()

    def thunks(self, step: PreparedStep) -> list[Thunk]:
        """What `launch` calls, one per step of the plan, those over rows too."""
        return [*self.steps.tokens(step.token_bucket), *self.steps.rows(step.row_bucket)[0]]

    def _score_prompts(self, step: PreparedStep) -> None:
        sampled_rows = self._builder.inputs.arrays["sampled_rows"]
        sampled = sampled_rows[: step.row_bucket].copy()

        def compute(rows: np.ndarray) -> torch.Tensor:
            row_bucket = bucket(len(rows), self._multiples["rows"])
            sampled_rows[: len(rows)], sampled_rows[len(rows) : row_bucket] = rows, 0
            thunks, logits = self.steps.rows(row_bucket)
            for thunk in thunks:
                thunk()
            return logits[: len(rows)]

        self._scorer.score(step.scored, compute)
        sampled_rows[: step.row_bucket] = sampled

    def sample(self, step: PreparedStep) -> list[SampledToken | RowError]:
        """Choose the tokens of the batch just launched."""
        if not step.layout.num_rows:
            return []
        return self._sampler.sample(self.steps.rows(step.row_bucket)[1], step.layout)

    def logits(self, step: PreparedStep) -> torch.Tensor:
        """[sampled rows, V]: the logits of the batch just launched; valid until the next launch."""
        return self.steps.rows(step.row_bucket)[1][: step.layout.num_rows]

    def fill_cache(self) -> None:
        """Give the whole KV cache memory and numbers, for timing."""
        self.steps.binder.fill_cache()

    def stage(self, source: WeightSource) -> StagedWeights:
        """Begin to bind other weights, `source`'s, beside the ones in use; see `StagedWeights.advance`.

        Raises `OutOfMemory` when there is no room for both.
        """
        needed, available = bytes_in_use(self._plan, self._kernels), available_memory()
        if needed > available:
            raise OutOfMemory(
                f"new weights take {needed:,} bytes beside the old ones until they are exchanged, {available:,} are "
                "available: stop the engine, refit it on disk (tritium refit) and start it again"
            )
        return self.steps.stage(LoadedWeights(self._engine, source))

    def swap(self, staged: StagedWeights) -> None:
        """Run with the staged weights from the next launch on; the old ones are freed. Only when all are bound."""
        self.steps.swap(staged)

    def close(self) -> None:
        """Give back weights, arena and KV cache: nothing may be called after it."""
        self.steps.close()

    def _bind_step(self, binder: Binder, index: int, sizes: Sizes) -> Thunk:
        return bind_tuned(self._plan, self._kernels, self._tactics, binder, index, sizes)


def check_ranks(engine: Engine, communicator: Communicator | None) -> int:
    """How many there are. Raises `EngineError` unless the communicator connects this engine's rank with all others."""
    ranks = engine.manifest.mapping
    expected = (ranks.get("rank", 0), ranks.get("tensor_parallel", 1))
    if communicator is None and expected[1] > 1:
        raise EngineError(
            f"{engine.path} is rank {expected[0]} of {expected[1]}, a part of a model: run every rank's engine in a "
            "process of its own, each with a communicator, or build the model whole"
        )
    if communicator is not None and (communicator.rank, communicator.num_ranks) != expected:
        raise EngineError(
            f"{engine.path} is rank {expected[0]} of {expected[1]}, the communicator is rank {communicator.rank} of "
            f"{communicator.num_ranks}: give each process the engine of its rank"
        )
    return expected[1]


def _null_step(binder: Binder, index: int, sizes: Sizes) -> Thunk:
    """Costs what the launch of a compiled kernel costs: one ctypes call with one pointer."""
    function = ctypes.CDLL(None).labs
    function.restype = None
    return partial(function, ctypes.byref(ctypes.c_long()))
