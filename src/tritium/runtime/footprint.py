"""What an engine takes of memory, from its plan alone: executors are laid out by it, `tritium plan` shows it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tritium.config import RuntimeConfig
from tritium.engine.arena import plan_arena
from tritium.engine.plan import Extent, Phase, Plan, Sizes
from tritium.kernels.eager.collectives import scratch_len
from tritium.kernels.gpu.scratch import Batch, Piece
from tritium.kernels.kernel import Kernel, resolve
from tritium.runtime.buckets import bucket, common_multiple
from tritium.runtime.encoder_batch import largest_cpu_batch, largest_gpu_batch
from tritium.runtime.kernel_choice import specs_of
from tritium.runtime.loaded_weights import bytes_in_use
from tritium.runtime.memory import GPU_KV_SHARE, GPU_RESERVE, KV_SHARE, MemoryPlan, megabytes, plan_memory

GPU_LIBRARIES = 64 << 20  # bytes: cuBLAS's two workspaces of 32 MiB
SAMPLING_CHUNK = 8192  # logits that one program of kernels/gpu/sampling.py looks at
PHASES: tuple[Phase, ...] = ("tokens", "rows")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """largest: the largest batch. multiples: what a phase's number of rows is padded to. offsets: in the arena.

    weights_bytes, arena_bytes, workspace_bytes: bytes; workspace: what kernels and libraries keep beside the arena on
    a GPU, and ranks for what comes from the others. memory: the KV cache.
    """

    largest: Sizes
    multiples: Mapping[Phase, int]
    offsets: Mapping[str, int]
    arena_bytes: int
    weights_bytes: int
    memory: MemoryPlan
    workspace_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights, arena, KV cache and workspace."""
        return self.weights_bytes + self.arena_bytes + self.memory.kv_bytes + self.workspace_bytes

    def describe(self) -> str:
        """In one line, largest things first."""
        return (
            f"weights {megabytes(self.weights_bytes)}, KV cache {megabytes(self.memory.kv_bytes)}, activations "
            f"{megabytes(self.arena_bytes)}, workspace {megabytes(self.workspace_bytes)}"
        )


def footprint(
    plan: Plan,
    kernels: Sequence[Kernel],
    config: RuntimeConfig,
    *,
    is_bitwise: bool,
    engine_max_model_len: int,
    available_bytes: int,
    num_ranks: int = 1,
) -> Footprint:
    """Lay out a decoder's plan for `config`. Touches no weight and no device. Raises `OutOfMemory` with the numbers.

    num_ranks: of the model that the plan is a part of.
    """
    multiples = {phase: _row_multiple(plan, kernels, phase) if is_bitwise else 1 for phase in PHASES}
    largest = Sizes(
        tokens=bucket(config.max_num_batched_tokens, multiples["tokens"]),
        sequences=config.max_num_seqs,
        rows=bucket(config.max_num_seqs, multiples["rows"]),
    )
    gathered = _gathered_bytes(plan, kernels, largest, num_ranks)
    available_bytes -= gathered
    found = _laid_out(plan, kernels, config, largest, multiples, engine_max_model_len, available_bytes)
    return replace(found, workspace_bytes=gathered)


def gpu_footprint(
    plan: Plan,
    kernels: Sequence[Kernel],
    config: RuntimeConfig,
    *,
    engine_max_model_len: int,
    available_bytes: int,
    num_ranks: int = 1,
    capability: tuple[int, int] | None = None,
) -> Footprint:
    """The same for a GPU. available_bytes: what is free of its memory. capability: its compute capability; None: not
    known, what any may take. Raises `OutOfMemory` with the numbers."""
    largest = Sizes(tokens=config.max_num_batched_tokens, sequences=config.max_num_seqs, rows=config.max_num_seqs)
    kept = _scratch_bytes(plan, kernels, largest, capability) + _gathered_bytes(plan, kernels, largest, num_ranks)
    available_bytes -= GPU_RESERVE + kept
    multiples = dict.fromkeys(PHASES, 1)
    found = _laid_out(plan, kernels, config, largest, multiples, engine_max_model_len, available_bytes, GPU_KV_SHARE)
    tables = len(plan.kv_groups) * config.max_num_seqs * -(-found.memory.max_model_len // config.block_size) * 4
    logits = config.max_num_seqs * plan.vocab_size * 8 // SAMPLING_CHUNK  # a value and an id of each chunk
    return replace(found, workspace_bytes=GPU_LIBRARIES + kept + tables + logits + 48 * found.largest.tokens)


def encoder_footprint(
    plan: Plan,
    kernels: Sequence[Kernel],
    config: RuntimeConfig,
    *,
    engine_max_model_len: int,
    available_bytes: int,
    device: str = "cpu",
) -> Footprint:
    """The same of an encoder, which has no KV cache."""
    if device == "cuda":
        largest = largest_gpu_batch(config, engine_max_model_len)
        inputs = [(value.shape, value.dtype) for value in plan.values if value.kind == "input"]
        kept = GPU_LIBRARIES + sum(_num_bytes(shape, dtype, largest) for shape, dtype in inputs)
        kept += _scratch_bytes(plan, kernels, largest, None)
        available_bytes -= GPU_RESERVE
    else:
        largest = largest_cpu_batch(kernels, config, engine_max_model_len)
        kept = 0
    multiples = dict.fromkeys(PHASES, 1)
    found = _laid_out(plan, kernels, config, largest, multiples, engine_max_model_len, available_bytes)
    return replace(found, workspace_bytes=kept)


def _laid_out(
    plan: Plan,
    kernels: Sequence[Kernel],
    config: RuntimeConfig,
    largest: Sizes,
    multiples: Mapping[Phase, int],
    engine_max_model_len: int,
    available_bytes: int,
    kv_share: float = KV_SHARE,
) -> Footprint:
    offsets, arena_bytes = plan_arena(plan, largest)
    weights_bytes = bytes_in_use(plan, kernels)
    memory = plan_memory(
        plan.kv_groups,
        config,
        engine_max_model_len=engine_max_model_len,
        weights_bytes=weights_bytes,
        arena_bytes=arena_bytes,
        available_bytes=available_bytes,
        kv_share=kv_share,
    )
    return Footprint(
        largest=largest,
        multiples=multiples,
        offsets=offsets,
        arena_bytes=arena_bytes,
        weights_bytes=weights_bytes,
        memory=memory,
    )


def _num_bytes(shape: Sequence[str | int], dtype: str, sizes: Sizes) -> int:
    return math.prod(Extent.parse(dim).at(sizes) for dim in shape) * int(getattr(torch, dtype).itemsize)


def _scratch_bytes(plan: Plan, kernels: Sequence[Kernel], largest: Sizes, capability: tuple[int, int] | None) -> int:
    """What GPU kernels keep for each other, by what their rows say; steps that take equal pieces share them."""
    batch, pieces, values = Batch(largest.tokens, largest.sequences, capability), set[Piece](), plan.by_name
    for step, kernel in zip(plan.steps, kernels, strict=True):
        if kernel.scratch is not None:
            pieces |= resolve(kernel.scratch)(specs_of(step, values), batch)
    return sum(piece.num_bytes for piece in pieces)


def _gathered_bytes(plan: Plan, kernels: Sequence[Kernel], largest: Sizes, num_ranks: int) -> int:
    """What kernels/eager/collectives.py keeps: its scratch for each power of two, of which all together take less than
    twice the largest. Steps of equal sizes share it."""
    most: dict[tuple[str, str], int] = {}
    for step, kernel in zip(plan.steps, kernels, strict=True):
        if kernel.backend == "eager" and step.op in ("all_reduce", "all_gather"):
            value = plan.value(step.outputs[0])
            count = math.prod(Extent.parse(dim).at(largest) for dim in value.shape)
            itemsize = getattr(torch, value.dtype).itemsize
            parts = 2 * scratch_len(count * (num_ranks if step.op == "all_reduce" else 1)) * itemsize
            total = 2 * scratch_len(count) * 4 if step.op == "all_reduce" else 0
            for key, size in ((("parts", value.dtype), parts), (("total", value.dtype), total)):
                most[key] = max(most.get(key, 0), size)
    return sum(most.values())


def _row_multiple(plan: Plan, kernels: Sequence[Kernel], phase: Phase) -> int:
    pairs = zip(plan.steps, kernels, strict=True)
    return common_multiple(kernel.row_multiple for step, kernel in pairs if step.phase == phase)
