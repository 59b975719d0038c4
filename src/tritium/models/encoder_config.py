"""EncoderConfig: what a BERT-like encoder is made of, independent of how any checkpoint spells it."""

from dataclasses import dataclass
from typing import Literal

from tritium.config import check_choice, check_int
from tritium.errors import ConfigError
from tritium.models.config import ACTIVATIONS, COMPUTE_DTYPES, MAX_LAYERS
from tritium.models.rope_config import MAX_SIZE

Head = Literal["none", "sequence", "token"]
ScoreActivation = Literal["softmax", "sigmoid", "identity"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional transformer with norms after its residual sums. Lengths are in tokens.

    architecture: the row of `families.ENCODERS` that names its tensors in a checkpoint.
    num_positions: the longest sequence. position_offset: rows of a checkpoint's table before the first position.
    num_token_types: ids that say which of two texts a token belongs to.
    head: "sequence" scores a text by its first token, "token" scores each token, "none" gives hidden states.
    has_pooler: without a head, a sequence's first token goes through one more linear and tanh.
    labels: what the scores stand for. score_activation: what turns scores into probabilities.
    dtype: of weights and activations.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    position_offset: int = 0
    num_token_types: int
    norm_eps: float = 1e-12
    activation: str = "gelu"
    head: Head = "none"
    has_pooler: bool = False
    labels: tuple[str, ...] = ()
    score_activation: ScoreActivation = "softmax"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_positions", "num_token_types"):
            check_int(name, getattr(self, name), 1, MAX_SIZE)
        check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_int("num_heads", self.num_heads, 1, 1 << 14)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        check_choice("head", self.head, ("none", "sequence", "token"))
        check_choice("score_activation", self.score_activation, ("softmax", "sigmoid", "identity"))
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})")
        if (self.head != "none") != bool(self.labels):
            raise ConfigError(
                f"a head needs labels and labels need a head: head {self.head!r}, {len(self.labels)} labels"
            )

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return self.hidden_size // self.num_heads
