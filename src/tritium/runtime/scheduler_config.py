"""What a scheduler must know of the engine and of the user's wishes, and what it tells about itself."""

from dataclasses import dataclass
from typing import NamedTuple

from tritium.config import SchedulingPolicy, check_batch_limits, check_choice, check_int
from tritium.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine. A wrong value is a `ConfigError` that names it.

    num_blocks: KV blocks in the pool, the null block included. block_size: tokens in a block.
    windows: one entry per KV group: the keys a query sees at most, itself included; 0: all.
    fingerprint: prefixes are shared only between equal ones, of the same weights generation: the engine's hash.
    weights_generation: of the weights it starts with.
    vocab_size: prompts with ids from here on are refused; None: not checked.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    windows: tuple[int, ...] = (0,)
    policy: SchedulingPolicy = "max_utilization"
    enable_prefix_caching: bool = True
    fingerprint: str = ""
    weights_generation: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_batch_limits(self.max_num_seqs, self.max_num_batched_tokens)
        check_int("max_model_len", self.max_model_len, 2, 1 << 24)
        check_int("block_size", self.block_size, 1, 1 << 16)
        check_int("num_blocks", self.num_blocks, 2, 1 << 31)
        if not self.windows:
            raise ConfigError("windows must name at least one KV group")
        for window in self.windows:
            check_int("windows", window, 0, 1 << 31)
        check_choice("policy", self.policy, ("max_utilization", "guaranteed_no_evict"))
        check_int("weights_generation", self.weights_generation, 0, 1 << 62)
        if self.vocab_size is not None:
            check_int("vocab_size", self.vocab_size, 1, 1 << 31)


class SchedulerStats(NamedTuple):
    """A snapshot. Blocks count the usable ones; prefix counts cover each request's first admission only."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks_total: int
    num_prefix_hit_tokens: int
    num_prefix_query_tokens: int
    num_preemptions: int
    num_steps: int
