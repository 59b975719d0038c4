"""Runs an encoder's plan on a GPU: the batches of a CPU, one of them launched while another one is computed.

    launch    write the batch into the inputs (one copy), call or replay its steps, start the answers' way back
    collect   wait for the answers of a batch that was launched

What is pooled is pooled on the GPU: only one row a text comes back, unless rows by token are asked for. Batches of few
tokens, of which the host would be what is waited for, are CUDA graphs: their numbers of tokens and of sequences and
their longest sequence are rounded to buckets.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import gpu_environment
from tritium.engine.plan import Sizes
from tritium.engine.tactics import Tactics
from tritium.kernels.kernel import LaunchContext, Thunk
from tritium.runtime.encoder_batch import BY_TOKEN, EncoderLimits, PackedInputs, largest_gpu_batch
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.gpu.buckets import gpu_bucket
from tritium.runtime.gpu.device import gpu_for
from tritium.runtime.gpu.graphs import StepGraphs
from tritium.runtime.gpu.inputs import DeviceInputs
from tritium.runtime.kernel_choice import usable_tactics
from tritium.runtime.plan_runner import PlanRunner

GRAPH_TOKENS = 4096  # of a batch: up to here launching takes longer than computing
_MOST_GRAPHS = 64


class _Shape(NamedTuple):
    """What the launches of a batch depend on. rows: 0 when nothing by row is asked for."""

    tokens: int
    rows: int
    sequences: int
    longest: int


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch on its way. starts: where its sequences begin and end. parts: what is asked for, in pinned memory."""

    requests: Sequence[EncoderRequest]
    starts: Sequence[int]
    parts: "dict[str, _Part]"
    event: torch.cuda.Event


class GpuEncoderRunner(EncoderLimits):
    """Owns weights, arena, inputs and graphs of one encoder on one GPU. All calls belong on the thread that made it."""

    num_in_flight = 2  # batches that may be launched and not collected

    def __init__(
        self, engine: Engine, config: RuntimeConfig, *, tactics: Tactics | None = None, has_graphs: bool = True
    ) -> None:
        """Load and lay out everything. tactics: in place of the engine's own, which count only on a GPU like that on
        which they were measured. Raises `EngineError`, also without a GPU, `KernelError` or `OutOfMemory`."""
        super().__init__(engine, config)
        self.device = gpu_for(engine)
        self._largest = largest_gpu_batch(config, engine.manifest.max_model_len)
        self._host = PackedInputs(self._largest)
        self._inputs = DeviceInputs(self._host.tensors, self.device, BY_TOKEN)
        self._context = LaunchContext()
        self._runner = PlanRunner(
            engine,
            self._largest,
            self._inputs.tensors,
            config.num_threads,
            tactics or usable_tactics(engine, gpu_environment()),
            device=self.device,
            context=self._context,
        )
        self._graphs = StepGraphs(self._run, _MOST_GRAPHS) if has_graphs else None
        # Now and not at the first batch: weights come over, or have no room. Few rows would have kernels compiled.
        self._bound(_Shape(self.max_tokens, self.max_requests, self.max_requests, self.max_model_len))

    def compute(self, batch: Sequence[EncoderRequest]) -> list[torch.Tensor]:
        """`launch` and `collect`."""
        return self.collect(self.launch(batch))

    def launch(self, batch: Sequence[EncoderRequest]) -> LaunchedBatch:
        """Start a batch. Raises `OutOfMemory` when a library finds no room for its workspace, `EngineError` when a step
        fails; the next batch may be launched after it."""
        starts, shape = self._bring(batch)
        try:
            if self._graphs is not None and shape.tokens <= GRAPH_TOKENS:
                self._graphs.run(shape)
            else:
                self._run(shape)
            parts = {name: _Part(self._part(name, shape, starts)) for name in {_part_of(r) for r in batch}}
        except torch.cuda.OutOfMemoryError as error:
            raise self._runner.out_of_memory("running a batch") from error
        event = torch.cuda.Event()
        event.record()
        return LaunchedBatch(batch, starts, parts, event)

    def collect(self, launched: LaunchedBatch) -> list[torch.Tensor]:
        """What each request asked for, in float32 on the host: see `EncoderRunner.compute`."""
        launched.event.synchronize()
        spans = itertools.pairwise(launched.starts)
        return [
            self._result(request, launched.parts[_part_of(request)], index, span)
            for index, (request, span) in enumerate(zip(launched.requests, spans, strict=True))
        ]

    def use(self, tactics: Tactics) -> None:
        """Run by these tactics and the kernels that they name from the next launch on."""
        torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.forget()
        self._runner.use(tactics)

    def thunks(self, batch: Sequence[EncoderRequest]) -> list[Thunk]:
        """The batch in the inputs, and the calls of all steps of the plan for it, to be timed."""
        _, shape = self._bring(batch)
        shape = shape._replace(rows=gpu_bucket(len(batch), self.max_requests))
        return [thunk for _, thunk in self._bound(shape)]

    def close(self) -> None:
        """Give the GPU's memory back, to other programs too: nothing may be computed after it."""
        torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.forget()
        self._runner.close()
        self._inputs.close()
        self._context.scratch.clear()
        torch.cuda.empty_cache()

    def _bring(self, batch: Sequence[EncoderRequest]) -> tuple[list[int], _Shape]:
        """The batch into the inputs."""
        starts = [0, *itertools.accumulate(len(request.token_ids) for request in batch)]
        tokens, rows = gpu_bucket(starts[-1], self.max_tokens), gpu_bucket(len(batch), self.max_requests)
        self._host.write(batch, starts, tokens=tokens, rows=rows)
        self._inputs.push(0, tokens)
        longest = max(len(request.token_ids) for request in batch)
        has_rows = any(self.source(request) in self.by_row for request in batch)
        if tokens <= GRAPH_TOKENS:
            longest = min(self.max_model_len, 1 << (longest - 1).bit_length())
        return starts, _Shape(tokens, rows if has_rows else 0, rows, longest)

    def _sizes(self, *, tokens: int = 0, rows: int = 0) -> Sizes:
        """A phase's: so many tokens or rows, and what the largest batch has of the other."""
        return Sizes(
            tokens=tokens or self._largest.tokens, sequences=self.max_requests, rows=rows or self._largest.rows
        )

    def _bound(self, shape: _Shape) -> list[tuple[str, Thunk]]:
        """The steps for a batch of that shape, which the kernels are told."""
        self._context.num_prefills, self._context.longest_prefill = shape.sequences, shape.longest
        self._context.num_prefill_tokens = self._context.num_prefill_keys = shape.tokens
        rows = self._runner.bound("rows", self._sizes(rows=shape.rows)) if shape.rows else []
        return [*self._runner.bound("tokens", self._sizes(tokens=shape.tokens)), *rows]

    def _run(self, shape: _Shape) -> object:
        """Call all steps; what owns the memory that they use beside the arena."""
        bound = self._bound(shape)
        self._runner.call(bound)
        return bound

    def _part(self, name: str, shape: _Shape, starts: Sequence[int]) -> torch.Tensor:
        """What a name of `_part_of` stands for, on the GPU, by sequence or by token."""
        num_sequences = len(starts) - 1
        if name in ("classify", "pooler"):
            output = "scores" if name == "classify" else "pooled"
            return self._runner.output(output, self._sizes(rows=shape.rows))[:num_sequences]
        output = "scores" if name == "token_classify" else "hidden"
        values_TD = self._runner.output(output, self._sizes(tokens=shape.tokens))[: starts[-1]]
        if name in ("token_embed", "token_classify"):
            return values_TD
        begin, end = (self._inputs.tensors["cu_seqlens_q"][i : num_sequences + i] for i in (0, 1))
        if name == "mean":
            return torch.segment_reduce(values_TD.float(), "mean", lengths=end - begin, unsafe=True)
        return values_TD.index_select(0, begin if name == "cls" else end - 1)

    def _result(self, request: EncoderRequest, part: "_Part", index: int, span: tuple[int, int]) -> torch.Tensor:
        if request.task == "classify":
            return self.probabilities(part.values[index])
        if request.task == "embed":
            return (part.normalized if request.is_normalized else part.values)[index].clone()
        value = part.values[slice(*span)]
        if request.task == "token_classify":
            return self.probabilities(value)
        return F.normalize(value, dim=-1) if request.is_normalized else value.clone()


def _part_of(request: EncoderRequest) -> str:
    """What of a batch's results a request's answer is made of: equal names share one copy to the host."""
    return request.pooling if request.task == "embed" else request.task


class _Part:
    """A tensor on its way from the GPU; to be read when the batch's event has passed."""

    def __init__(self, on_gpu: torch.Tensor) -> None:
        self._pinned = torch.empty(on_gpu.shape, dtype=on_gpu.dtype, pin_memory=on_gpu.is_cuda)
        self._pinned.copy_(on_gpu, non_blocking=True)

    @cached_property
    def values(self) -> torch.Tensor:
        """In float32, memory of its own."""
        return self._pinned.to(torch.float32, copy=True)

    @cached_property
    def normalized(self) -> torch.Tensor:
        """Each row to length 1."""
        return F.normalize(self.values, dim=-1)
