"""How much memory the KV cache gets, and how long a sequence may become. Pure arithmetic over given numbers."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tritium.config import RuntimeConfig
from tritium.engine.plan import KVGroup
from tritium.errors import OutOfMemory
from tritium.runtime.kv_cache import block_bytes

KV_SHARE = 0.6  # of what the memory limit leaves after weights and arena
GPU_KV_SHARE = 0.9  # of what weights, arena and reserve leave of a GPU's memory
GPU_RESERVE = 1 << 30  # bytes: cuBLAS's workspace, graphs, what fragments
SHORTEST_USEFUL_LEN = 128  # tokens; a cache that cannot hold one such sequence is refused

logger = logging.getLogger("tritium")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The KV cache's size. `num_blocks` includes the null block; `num_tokens` is what the others hold in one group."""

    num_blocks: int
    block_bytes: int
    max_model_len: int
    num_tokens: int
    num_sequences: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.block_bytes

    def describe(self) -> str:
        """One line for people."""
        return (
            f"KV cache: {megabytes(self.kv_bytes)} = {self.num_tokens:,} tokens "
            f"= {self.num_sequences} sequences of {self.max_model_len:,} tokens"
        )


def plan_memory(
    groups: Sequence[KVGroup],
    config: RuntimeConfig,
    *,
    engine_max_model_len: int,
    weights_bytes: int,
    arena_bytes: int,
    available_bytes: int,
    kv_share: float = KV_SHARE,
) -> MemoryPlan:
    """Size the KV cache.

    available_bytes: what this process may use for everything: weights, arena, KV cache.
    Takes `config.kv_cache_memory`, else `kv_share` of what weights and arena leave, and never more than `max_num_seqs`
    sequences of `max_model_len` tokens could fill. When not even one such sequence fits, `max_model_len` shrinks, with
    one warning; below `SHORTEST_USEFUL_LEN` tokens it is `OutOfMemory` with the numbers.
    """
    max_model_len = min(config.max_model_len or engine_max_model_len, engine_max_model_len)
    size = block_bytes(groups, config.block_size)
    left = available_bytes - weights_bytes - arena_bytes
    wanted = config.kv_cache_memory if config.kv_cache_memory is not None else int(left * kv_share)
    numbers = (
        f"memory available {megabytes(available_bytes)}, weights {megabytes(weights_bytes)}, "
        f"arena {megabytes(arena_bytes)}, KV cache {megabytes(max(0, wanted))}"
    )
    if left <= 0:
        raise OutOfMemory(
            f"the model does not fit: {numbers}; give less max_num_batched_tokens (arena), or build with a scheme of "
            "fewer bits"
        )
    if size == 0:  # a model without attention needs no blocks, but the scheduler's pool may not be empty
        return MemoryPlan(num_blocks=2, block_bytes=0, max_model_len=max_model_len, num_tokens=0, num_sequences=0)
    chunk = config.max_num_batched_tokens
    useful = 1 + config.max_num_seqs * blocks_needed(groups, max_model_len, config.block_size, chunk)
    num_blocks = min(max(0, wanted) // size, useful)
    if num_blocks * size > left:
        raise OutOfMemory(f"kv_cache_memory does not fit: {numbers}; give less, or a smaller max_num_seqs")
    longest = longest_sequence(groups, num_blocks - 1, max_model_len, config.block_size)
    if longest < min(SHORTEST_USEFUL_LEN, max_model_len):
        raise OutOfMemory(
            f"the KV cache holds {longest} tokens, not one sequence of {min(SHORTEST_USEFUL_LEN, max_model_len)}: "
            f"{numbers}; a block of {config.block_size} tokens takes {size:,} bytes"
        )
    if longest < max_model_len:
        logger.warning("max_model_len shrinks from %d to %d tokens to fit (%s)", max_model_len, longest, numbers)
        max_model_len = longest
    per_sequence = blocks_needed(groups, max_model_len, config.block_size, 1)
    return MemoryPlan(
        num_blocks=num_blocks,
        block_bytes=size,
        max_model_len=max_model_len,
        num_tokens=(num_blocks - 1) // len(groups) * config.block_size,
        num_sequences=(num_blocks - 1) // per_sequence,
    )


def shared(
    memory: MemoryPlan, groups: Sequence[KVGroup], block_size: int, smallest: Callable[[Sequence[int]], list[int]]
) -> MemoryPlan:
    """What every rank has room for. smallest: of each number the smallest that any rank gives."""
    num_blocks, max_model_len = smallest([memory.num_blocks, memory.max_model_len])
    per_sequence = blocks_needed(groups, max_model_len, block_size, 1)
    return replace(
        memory,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        num_tokens=(num_blocks - 1) // max(1, len(groups)) * block_size,
        num_sequences=(num_blocks - 1) // per_sequence if per_sequence else 0,
    )


LESS_OF_A_DECODER = "less kv_cache_memory, less max_num_batched_tokens (activations) or max_num_seqs"


def gpu_out_of_memory(
    doing: str, name: str, free_bytes: int, total_bytes: int, parts: str, less: str = LESS_OF_A_DECODER
) -> OutOfMemory:
    """One error with the numbers. parts: what the engine takes (`Footprint.describe`). less: what to give less of."""
    return OutOfMemory(
        f"{doing} ran out of memory on {name}: {megabytes(free_bytes)} of {megabytes(total_bytes)} are free; the "
        f"engine takes {parts}. Stop what else uses the GPU, give {less}, or build with a scheme of fewer bits"
    )


def blocks_needed(groups: Sequence[KVGroup], length: int, block_size: int, chunk: int) -> int:
    """Blocks that one sequence holds at most, in all groups, while `length` tokens are computed in chunks of `chunk`.

    A windowed group holds the chunk and the window - 1 keys before it; n positions touch at most
    (n + block_size - 2) // block_size + 1 blocks.
    """
    full = -(-length // block_size)
    peaks = [(g.window + chunk + block_size - 3) // block_size + 1 if g.window else full for g in groups]
    return sum(min(full, peak) for peak in peaks)


def longest_sequence(groups: Sequence[KVGroup], num_blocks: int, limit: int, block_size: int) -> int:
    """The longest length up to `limit` whose blocks fit in `num_blocks`: the limit, or whole blocks; 0 for none."""
    if blocks_needed(groups, limit, block_size, 1) <= num_blocks:
        return limit
    low, high = 0, -(-limit // block_size)  # in blocks: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if blocks_needed(groups, middle * block_size, block_size, 1) <= num_blocks:
            low = middle
        else:
            high = middle
    return low * block_size


def megabytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
