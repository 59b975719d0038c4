"""Runs an engine's plan on a GPU: the same plan, scheduler and batches as on a CPU, one step ahead of the host.

    launch    write the batch into the inputs (one copy), call or replay its bucket's steps, sample, start the tokens'
              way back; returns at once
    collect   wait for the tokens of a step that was launched

A step of single tokens is replayed as a CUDA graph (`graphs.py`); other steps are called thunk by thunk, which is
hidden behind the GPU's own work. The input id of a token that was sampled by the step before and is not known to the
host yet is -1 - slot; the GPU puts in the slot's last token.
"""

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import gpu_environment
from tritium.engine.plan import Sizes
from tritium.engine.tactics import Tactics
from tritium.errors import OutOfMemory
from tritium.kernels.communicator import GpuCommunicator
from tritium.kernels.kernel import Kernel, LaunchContext, Thunk
from tritium.runtime.batch import BatchBuilder, BatchLayout
from tritium.runtime.binding import Binder, bind_tuned
from tritium.runtime.bound_steps import BoundSteps
from tritium.runtime.executor import check_ranks
from tritium.runtime.footprint import gpu_footprint
from tritium.runtime.gpu.buckets import gpu_bucket
from tritium.runtime.gpu.device import check_kernels, free_memory, gpu_for, out_of_memory
from tritium.runtime.gpu.graphs import StepGraphs
from tritium.runtime.gpu.inputs import DeviceInputs
from tritium.runtime.gpu.sampler import GpuSampler
from tritium.runtime.kernel_choice import choose_kernels, usable_tactics
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loaded_weights import LoadedWeights
from tritium.runtime.memory import megabytes, shared
from tritium.runtime.prepared_step import PreparedStep
from tritium.runtime.prompt_logprobs import PromptScorer, ScoredPart, scored_parts
from tritium.runtime.request import RowError, SampledToken, ScheduledBatch
from tritium.runtime.sampler import Sampler
from tritium.runtime.slots import RequestSlots
from tritium.runtime.staged_weights import StagedWeights
from tritium.weights.source import WeightSource

logger = logging.getLogger("tritium")

NO_NUMBERS = RowError("the model's logits were not finite numbers")
_NUM_RESULTS = 3  # steps whose tokens may be on their way


@dataclass(frozen=True)
class LaunchedStep:
    """A step on its way. logits: for the host's sampler, when the batch needs it; else tokens come through `event`.

    is_plain: by row, that the token is the device's all the same; None: for no row.
    """

    layout: BatchLayout
    event: torch.cuda.Event
    tokens: torch.Tensor
    logits: torch.Tensor | None
    is_plain: np.ndarray | None = None

    @property
    def is_sampled_on_device(self) -> bool:
        """The host may schedule the next step before it knows the tokens of this one."""
        return self.logits is None


class GpuExecutor:
    """Owns weights, arena, KV cache, inputs and samplers of one engine on one GPU.

    memory: the KV cache's size and the length a sequence may have; the scheduler must be configured with it.
    """

    def __init__(
        self,
        engine: Engine,
        config: RuntimeConfig,
        *,
        has_graphs: bool = True,
        tactics: Tactics | None = None,
        communicator: GpuCommunicator | None = None,
    ) -> None:
        """Load and lay out everything. Raises `EngineError` without a GPU, `KernelError`, or `OutOfMemory`.

        tactics: in place of the engine's own, which count only on a GPU like that on which they were measured.
        communicator: as for `Executor`.
        """
        num_ranks = check_ranks(engine, communicator)
        self.device = gpu_for(engine)
        self._engine = engine
        self._plan = plan = engine.plan
        self._is_bitwise = engine.manifest.invariance == "bitwise"
        self._tactics = tactics or usable_tactics(engine, gpu_environment(), block_size=config.block_size)
        self._kernels = self._choose_kernels()
        self._most_rows = config.max_num_seqs
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        self.footprint = gpu_footprint(
            plan,
            self._kernels,
            config,
            engine_max_model_len=engine.manifest.max_model_len,
            available_bytes=free_bytes,
            num_ranks=num_ranks,
            capability=torch.cuda.get_device_capability(self.device),
        )
        if communicator is not None:
            memory = shared(self.footprint.memory, plan.kv_groups, config.block_size, communicator.smallest)
            self.footprint = replace(self.footprint, memory=memory)
        self.memory, self._largest = self.footprint.memory, self.footprint.largest
        logger.info("%s", self.memory.describe())
        self._slots = RequestSlots(config.max_num_seqs)
        self._builder = BatchBuilder(
            max_tokens=self._largest.tokens,
            max_sequences=config.max_num_seqs,
            max_rows=config.max_num_seqs,
            max_model_len=self.memory.max_model_len,
            block_size=config.block_size,
            num_groups=len(plan.kv_groups),
        )
        self._sampler = GpuSampler(plan.vocab_size, config.max_num_seqs, config.max_num_seqs)
        self._host_sampler = Sampler(plan.vocab_size, config.max_num_seqs)
        self._scorer = PromptScorer(plan.vocab_size, config.max_num_seqs)
        self._context = LaunchContext(communicator=communicator)
        self._seconds_waited = 0.0
        self._turn = 0
        try:
            self._load(config.block_size)
        except (torch.cuda.OutOfMemoryError, OutOfMemory) as error:
            raise self._out_of_memory("loading the model") from error
        self._graphs = StepGraphs(self._run_decode) if has_graphs else None

    def _load(self, block_size: int) -> None:
        """Whatever takes memory of the GPU, and the tokens' places in pinned memory."""
        self._inputs = DeviceInputs({**self._builder.inputs.tensors, **self._sampler.host}, self.device)
        self._sampler.attach(self._inputs.tensors)
        binder = Binder(
            self._plan,
            offsets=self.footprint.offsets,
            arena_bytes=self.footprint.arena_bytes,
            inputs=self._inputs.tensors,
            weights=LoadedWeights(self._engine, device=self.device),
            kv_cache=KVCache(self._plan.kv_groups, self.memory.num_blocks, block_size, self.device),
            device=self.device,
            context=self._context,
        )
        self._results = [torch.zeros(self._most_rows, dtype=torch.int64).pin_memory() for _ in range(_NUM_RESULTS)]
        self._steps = BoundSteps(self._plan, binder, self._bind_step, largest=self._largest)

    @property
    def seconds_waited(self) -> float:
        """Of this thread, for the GPU, since the start: a step's time less its share of this is what the host does."""
        return self._seconds_waited + self._inputs.seconds_waited

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | RowError]:
        """Run the batch and wait; one entry per sampled sequence, in order: its token, or why it has none."""
        return self.collect(self.launch(batch))

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start the batch. Input tokens that the host does not know (id -1) are the last that their slots sampled.

        Raises `OutOfMemory` when a library finds no room for its workspace; the next batch may be launched after it.
        """
        try:
            step = self.prepare(batch)
            if self._graphs is not None and batch.is_decode:
                self._graphs.run(step.row_bucket)
            else:
                self._run_eagerly(step)
            return self._start_results(step)
        except torch.cuda.OutOfMemoryError as error:
            raise self._out_of_memory("running a step") from error

    def collect(self, step: LaunchedStep) -> list[SampledToken | RowError]:
        """The tokens of a launched step, when they are there."""
        if not step.layout.num_rows:
            return []
        if step.logits is not None:
            return self._sample_on_host(step, step.logits)
        start = time.perf_counter()
        step.event.synchronize()
        self._seconds_waited += time.perf_counter() - start
        return [_token(token) for token in step.tokens.tolist()]

    def logits(self, step: LaunchedStep) -> torch.Tensor:
        """[sampled rows, V] of the step launched last, on the device; valid until the next launch."""
        return self._steps.rows(gpu_bucket(step.layout.num_rows, self._most_rows))[1][: step.layout.num_rows]

    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """Bring a batch into the inputs."""
        for slot, request in self._slots.admit(batch):
            self._builder.admit(slot, request)
            self._sampler.admit(slot, request)
            self._host_sampler.admit(slot, request)
        rows = gpu_bucket(batch.num_sampled, self._most_rows)
        tokens = rows if batch.is_decode else gpu_bucket(batch.num_tokens, self._largest.tokens)
        layout = self._builder.build(batch, self._slots.of(batch), padded_tokens=tokens, padded_rows=rows)
        self._sampler.gather(layout)
        self._inputs.push(layout.num_sequences)
        self._sampler.resolve(self._inputs.tensors["input_ids"][: layout.num_tokens])
        return PreparedStep(layout, tokens, rows, [] if batch.is_decode else scored_parts(batch))

    def thunks(self, step: PreparedStep) -> list[Thunk]:
        """What `launch` calls for the step prepared last, one per step of the plan: until the next one is prepared they
        may be called again and again."""
        self._describe(step.layout)
        return [*self._steps.tokens(step.token_bucket), *self._steps.rows(step.row_bucket)[0]]

    def fill_cache(self) -> None:
        """Give the whole KV cache numbers, for timing."""
        self._steps.binder.fill_cache()

    def use(self, tactics: Tactics) -> None:
        """Run by these tactics and the kernels that they name from the next launch on; all steps are bound anew."""
        torch.cuda.synchronize(self.device)
        self._tactics = tactics
        self._kernels = self._choose_kernels()
        self._steps.forget()
        if self._graphs is not None:
            self._graphs.forget()

    def stage(self, source: WeightSource) -> StagedWeights:
        """Begin to bind other weights, `source`'s, beside the ones in use; see `StagedWeights.advance`.

        Raises `OutOfMemory` when there is no room for both.
        """
        needed = self.footprint.weights_bytes
        free_bytes = free_memory(self.device)
        if needed > free_bytes:
            raise OutOfMemory(
                f"new weights take {megabytes(needed)} beside the old ones until they are exchanged, "
                f"{megabytes(free_bytes)} of the GPU's memory are free: give less kv_cache_memory, or stop the engine, "
                "refit it on disk (tritium refit) and start it again"
            )
        return self._steps.stage(LoadedWeights(self._engine, source, device=self.device))

    def swap(self, staged: StagedWeights) -> None:
        """Run with the staged weights from the next launch on; the old ones are freed. Only when all are bound.

        Graphs hold the addresses of the old weights: they are captured anew as their sizes are met.
        """
        torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.forget()
        self._steps.swap(staged)

    def close(self) -> None:
        """Give the GPU's memory back, to other programs too: nothing may be called after it."""
        torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.forget()
        self._steps.close()
        self._inputs.close()
        self._sampler.close()
        self._context.scratch.clear()
        torch.cuda.empty_cache()

    def _choose_kernels(self) -> list[Kernel]:
        tuned = self._tactics.kernels if self._tactics else None
        kernels = choose_kernels(self._plan, self._engine.plugins, "cuda", tuned=tuned, is_bitwise=self._is_bitwise)
        check_kernels(kernels)
        return kernels

    def _bind_step(self, binder: Binder, index: int, sizes: Sizes) -> Thunk:
        return bind_tuned(self._plan, self._kernels, self._tactics, binder, index, sizes)

    def _run_decode(self, size: int) -> None:
        """Call a step of so many single tokens, for a graph: which says nothing of any one batch."""
        self._context.num_decodes, self._context.num_prefills, self._context.num_prefill_tokens = size, 0, 0
        self._run(tokens=size, rows=size)

    def _run_eagerly(self, step: PreparedStep) -> None:
        self._describe(step.layout)
        self._run(tokens=step.token_bucket)
        if step.scored:
            self._score_prompts(step.scored)
        self._run(rows=step.row_bucket if step.layout.num_rows else 0)

    def _describe(self, layout: BatchLayout) -> None:
        """Tell the kernels of the batch's shape."""
        context = self._context
        context.num_decodes = layout.num_decodes
        context.num_prefills = layout.num_sequences - layout.num_decodes
        context.num_prefill_tokens = layout.num_tokens - layout.num_decodes
        lengths = self._builder.inputs.arrays["context_lens"][layout.num_decodes : layout.num_sequences]
        context.num_prefill_keys, context.longest_prefill = int(lengths.sum()), int(lengths.max(initial=0))

    def _run(self, *, tokens: int = 0, rows: int = 0) -> None:
        """The steps over tokens, then those over rows; 0: not these."""
        for thunk in self._steps.tokens(tokens) if tokens else ():
            thunk()
        for thunk in self._steps.rows(rows)[0] if rows else ():
            thunk()

    def _score_prompts(self, scored: list[ScoredPart]) -> None:
        """Run the steps over rows for prompt logprobs, piece by piece; each piece's logits come to the host."""
        device_rows = self._inputs.tensors["sampled_rows"]
        sampled = device_rows.clone()

        def compute(rows: np.ndarray) -> torch.Tensor:
            padded = np.zeros(gpu_bucket(len(rows), self._most_rows), np.int64)
            padded[: len(rows)] = rows
            device_rows[: len(padded)] = torch.from_numpy(padded).to(self.device)
            self._run(rows=len(padded))
            return self._steps.rows(len(padded))[1][: len(rows)].cpu()

        self._scorer.score(scored, compute)
        device_rows.copy_(sampled)

    def _start_results(self, step: PreparedStep) -> LaunchedStep:
        """Sample what the device can, and start the tokens' way back."""
        layout, event, logits, is_plain = step.layout, torch.cuda.Event(), None, None
        self._turn = (self._turn + 1) % _NUM_RESULTS
        result = self._results[self._turn][: layout.num_rows]
        if layout.num_rows:
            logits = self._steps.rows(step.row_bucket)[1][: layout.num_rows]
            can_sample = self._sampler.can_sample(layout)
            if can_sample or self._is_bitwise:
                self._sampler.sample(logits, layout, result)
            if can_sample:
                logits = None
            elif self._is_bitwise:  # who samples a row must not depend on its neighbours: the two draw differently
                is_plain = self._sampler.plain_rows(layout)
        event.record()
        return LaunchedStep(layout, event, result, logits, is_plain)

    def _sample_on_host(self, step: LaunchedStep, logits: torch.Tensor) -> list[SampledToken | RowError]:
        """All rows by the host's sampler, but for those whose token is the device's; the device is told the tokens."""
        tokens = self._host_sampler.sample(logits.cpu(), step.layout)
        if step.is_plain is not None:
            step.event.synchronize()
            for row in np.flatnonzero(step.is_plain).tolist():
                tokens[row] = _token(int(step.tokens[row]))
        ids = [token.token_id if isinstance(token, SampledToken) else 0 for token in tokens]
        slots = torch.from_numpy(step.layout.row_slots).to(self.device)
        self._sampler.last_tokens[slots] = torch.tensor(ids, device=self.device)
        return tokens

    def _out_of_memory(self, doing: str) -> OutOfMemory:
        """What is said when an allocation fails."""
        return out_of_memory(self.device, doing, self.footprint.describe())


def _token(token_id: int) -> SampledToken | RowError:
    """What the device's sampler gave: -1 where the logits were not numbers."""
    return SampledToken(token_id) if token_id >= 0 else NO_NUMBERS
