"""RopeConfig: the settings of a rotary position embedding."""

from dataclasses import dataclass

from tritium.config import check_choice, check_int
from tritium.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
MAX_SIZE = 1 << 24  # of one dimension: far above any model, far below what could exhaust memory or overflow


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `models/rope.py` says what each type does with these numbers.

    dim: leading dimensions of each head that are rotated. is_interleaved: pairs are (0, 1), (2, 3), ... (GPT-J), else
    (0, dim/2), (1, dim/2 + 1), ... max_position_embeddings: what "dynamic" counts as unscaled.
    short_factors, long_factors: longrope's divisors of each pair's frequency, for lengths up to
    original_max_position_embeddings and beyond.
    truncate: yarn rounds the borders of its ramp to whole dimensions.
    """

    dim: int
    theta: float = 10_000.0
    type: str = "default"
    is_interleaved: bool = False
    factor: float = 1.0
    max_position_embeddings: int = 0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("rope type", self.type, ROPE_TYPES)
        check_int("rope dim", self.dim, 2, MAX_SIZE)
        if self.dim % 2:
            raise ConfigError(f"rope dim must be even, not {self.dim}: dimensions are rotated in pairs")
        if self.type == "dynamic":
            check_int("rope max_position_embeddings", self.max_position_embeddings, 1, MAX_SIZE)
        if self.type in ("yarn", "llama3", "longrope"):
            check_int("rope original_max_position_embeddings", self.original_max_position_embeddings, 1, MAX_SIZE)
        for name in ("short_factors", "long_factors") if self.type == "longrope" else ():
            factors = getattr(self, name)
            if len(factors) != self.dim // 2 or min(factors) <= 0:
                raise ConfigError(f"rope {name} must be {self.dim // 2} numbers above 0, not {factors}")
