"""Runs an encoder's plan on packed batches: no padding between sequences, each of which sees itself alone."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.engine.plan import Sizes
from tritium.engine.tactics import Tactics
from tritium.kernels.kernel import Thunk
from tritium.runtime.buckets import bucket, common_multiple
from tritium.runtime.encoder_batch import EncoderLimits, PackedInputs, largest_cpu_batch
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.kernel_choice import choose_kernels, usable_tactics
from tritium.runtime.plan_runner import PlanRunner


class EncoderRunner(EncoderLimits):
    """Owns weights, arena and inputs of one encoder on a CPU. All calls belong on the thread that made it."""

    num_in_flight = 1  # batches that may be launched and not collected

    def __init__(self, engine: Engine, config: RuntimeConfig, *, tactics: Tactics | None = None) -> None:
        """Load and lay out everything. tactics: in place of the engine's own, which count only on a machine like that
        on which they were measured. Raises `EngineError`, `KernelError` or `OutOfMemory`."""
        super().__init__(engine, config)
        tuned = tactics or usable_tactics(engine, environment(config.num_threads))
        kernels = choose_kernels(engine.plan, tuned=tuned.kernels if tuned else None)
        multiple = common_multiple(kernel.row_multiple for kernel in kernels)
        self._largest = largest_cpu_batch(kernels, config, engine.manifest.max_model_len)
        self._inputs = PackedInputs(self._largest)
        self._runner = PlanRunner(engine, self._largest, self._inputs.tensors, config.num_threads, tuned)
        self._multiple = multiple if engine.manifest.invariance == "bitwise" else 1

    def compute(self, batch: Sequence[EncoderRequest]) -> list[torch.Tensor]:
        """What each request asked for, in float32: [D] "embed", [T, D] "token_embed", [C] or [T, C] probabilities."""
        starts = [0, *itertools.accumulate(len(request.token_ids) for request in batch)]
        tokens, rows = self._write(batch, starts)
        self._runner.run("tokens", tokens)
        if any(self.source(request) in self.by_row for request in batch):
            self._runner.run("rows", rows)
        found = {name: self._runner.output(name, rows if name in self.by_row else tokens) for name in self.outputs}
        return [self._result(request, found, i, starts[i], starts[i + 1]) for i, request in enumerate(batch)]

    def launch(self, batch: Sequence[EncoderRequest]) -> list[torch.Tensor]:
        """`compute`: on a CPU nothing runs behind the caller's back."""
        return self.compute(batch)

    def collect(self, launched: list[torch.Tensor]) -> list[torch.Tensor]:
        """The answers to a batch that was launched."""
        return launched

    def close(self) -> None:
        """Give back all memory: nothing may be computed after it."""
        self._runner.close()

    def thunks(self, batch: Sequence[EncoderRequest]) -> list[Thunk]:
        """The batch written into the inputs, and the calls of all steps of the plan for it, to be timed."""
        starts = [0, *itertools.accumulate(len(request.token_ids) for request in batch)]
        tokens, rows = self._write(batch, starts)
        bound = (*self._runner.bound("tokens", tokens), *self._runner.bound("rows", rows))
        return [thunk for _, thunk in bound]

    def _write(self, batch: Sequence[EncoderRequest], starts: Sequence[int]) -> tuple[Sizes, Sizes]:
        """The batch into the inputs, and the sizes of its two phases."""
        tokens, rows = bucket(starts[-1], self._multiple), bucket(len(batch), self._multiple)
        self._inputs.write(batch, starts, tokens=tokens, rows=rows)
        return (
            Sizes(tokens=tokens, sequences=self.max_requests, rows=self._largest.rows),
            Sizes(tokens=self._largest.tokens, sequences=self.max_requests, rows=rows),
        )

    def _result(
        self, request: EncoderRequest, found: dict[str, torch.Tensor], index: int, start: int, end: int
    ) -> torch.Tensor:
        source = self.source(request)
        value = found[source][index if source in self.by_row else slice(start, end)].to(torch.float32, copy=True)
        if request.task in ("classify", "token_classify"):
            return self.probabilities(value)
        if request.task == "embed" and request.pooling != "pooler":
            value = value.mean(0) if request.pooling == "mean" else value[0 if request.pooling == "cls" else -1].clone()
        return F.normalize(value, dim=-1) if request.is_normalized else value
