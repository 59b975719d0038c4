"""What an engine takes of memory, from its plan alone: the executor is laid out by it, `tritium plan` shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tritium.config import RuntimeConfig
from tritium.engine.arena import plan_arena
from tritium.engine.plan import Phase, Plan, Sizes
from tritium.kernels.kernel import Kernel
from tritium.runtime.buckets import bucket, common_multiple
from tritium.runtime.loaded_weights import bytes_in_use
from tritium.runtime.memory import KV_SHARE, MemoryPlan, plan_memory

PHASES: tuple[Phase, ...] = ("tokens", "rows")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """largest: the largest batch. multiples: what a phase's number of rows is padded to. offsets: in the arena.

    weights_bytes, arena_bytes: bytes. memory: the KV cache.
    """

    largest: Sizes
    multiples: Mapping[Phase, int]
    offsets: Mapping[str, int]
    arena_bytes: int
    weights_bytes: int
    memory: MemoryPlan

    @property
    def total_bytes(self) -> int:
        """Weights, arena and KV cache."""
        return self.weights_bytes + self.arena_bytes + self.memory.kv_bytes


def footprint(
    plan: Plan,
    kernels: Sequence[Kernel],
    config: RuntimeConfig,
    *,
    is_bitwise: bool,
    engine_max_model_len: int,
    available_bytes: int,
    kv_share: float = KV_SHARE,
) -> Footprint:
    """Lay out a decoder's plan for `config`. Touches no weight and no device. Raises `OutOfMemory` with the numbers."""
    multiples = {phase: _row_multiple(plan, kernels, phase) if is_bitwise else 1 for phase in PHASES}
    largest = Sizes(
        tokens=bucket(config.max_num_batched_tokens, multiples["tokens"]),
        sequences=config.max_num_seqs,
        rows=bucket(config.max_num_seqs, multiples["rows"]),
    )
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


def _row_multiple(plan: Plan, kernels: Sequence[Kernel], phase: Phase) -> int:
    pairs = zip(plan.steps, kernels, strict=True)
    return common_multiple(kernel.row_multiple for step, kernel in pairs if step.phase == phase)
