"""ModelConfig: what a decoder is made of, independent of how any checkpoint spells it.

`hf_config.py` reads it from a config.json, `presets.py` names well-known ones, and a person can write one by hand.
"""

from dataclasses import dataclass
from typing import Literal

from tritium.config import check_choice, check_int
from tritium.errors import ConfigError

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
MAX_LAYERS = 1 << 12
MAX_SIZE = 1 << 24  # of one dimension: far above any model, far below what could exhaust memory or overflow


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `models/rope.py` says what each type does with these numbers.

    dim: leading dimensions of each head that are rotated. is_interleaved: pairs are (0, 1), (2, 3), ... (GPT-J), else
    (0, dim/2), (1, dim/2 + 1), ... max_position_embeddings: what "dynamic" counts as unscaled.
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

    def __post_init__(self) -> None:
        check_choice("rope type", self.type, ROPE_TYPES)
        check_int("rope dim", self.dim, 2, MAX_SIZE)
        if self.dim % 2:
            raise ConfigError(f"rope dim must be even, not {self.dim}: dimensions are rotated in pairs")
        if self.type == "dynamic":
            check_int("rope max_position_embeddings", self.max_position_embeddings, 1, MAX_SIZE)
        if self.type in ("yarn", "llama3"):
            check_int("rope original_max_position_embeddings", self.original_max_position_embeddings, 1, MAX_SIZE)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Lengths are in tokens.

    family: the row of `families.FAMILIES` that names its tensors in a checkpoint; "" for a model of your own.
    windows: per layer, how many keys a query sees at most, itself included; 0: all.
    rope: None means learned position embeddings. attention_scales: per layer; None means head_size ** -0.5.
    has_qk_norm: each head's queries and keys go through an RMS norm before they are rotated.
    is_gated: the MLP is act(gate(x)) * up(x), else act(up(x)).
    is_parallel: attention and MLP read the same norm's output.
    has_post_norms: what attention and MLP put out is normed too.
    embedding_scale: token embeddings are multiplied by it, rounded to dtype. attention_softcap, logit_softcap: scores
    or logits s become cap · tanh(s / cap); 0: they stay.
    max_model_len: prompt plus output the model is built for; freezes "dynamic" RoPE; None takes `default_model_len`.
    dtype: of weights and activations.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    family: str = ""
    norm: Literal["rms_norm", "offset_rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    activation: str = "silu"
    is_gated: bool = True
    is_parallel: bool = False
    has_post_norms: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope: RopeConfig | None = None
    windows: tuple[int, ...] = ()
    attention_scales: tuple[float, ...] | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    max_model_len: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            check_int(name, getattr(self, name), 1, MAX_SIZE)
        check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        for name in ("num_heads", "num_kv_heads", "head_size"):
            check_int(name, getattr(self, name), 1, 1 << 14)
        check_choice("norm", self.norm, ("rms_norm", "offset_rms_norm", "layer_norm"))
        if self.is_parallel and self.has_post_norms:
            raise ConfigError("is_parallel and has_post_norms cannot both be true: no block has both")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        if self.rope is not None and self.rope.dim > self.head_size:
            raise ConfigError(f"rope dim ({self.rope.dim}) must be at most head_size ({self.head_size})")
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        if len(self.windows) != self.num_layers or min(self.windows) < 0:
            raise ConfigError(f"windows must be {self.num_layers} numbers of at least 0, not {self.windows}")
        if self.attention_scales is not None and len(self.attention_scales) != self.num_layers:
            raise ConfigError(f"attention_scales must be {self.num_layers} numbers, not {self.attention_scales}")
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 1, MAX_SIZE)
            if self.max_model_len > self.longest_model_len:
                raise ConfigError(
                    f"max_model_len ({self.max_model_len}) must be at most {self.longest_model_len}: this model "
                    "has no more positions"
                )

    @property
    def default_model_len(self) -> int:
        """The longest sequence that the checkpoint claims to handle well."""
        rope, length = self.rope, self.max_position_embeddings
        if rope is None or rope.type in ("default", "llama3"):
            return length
        if rope.original_max_position_embeddings:
            return max(length, int(rope.original_max_position_embeddings * rope.factor))
        return int(length * rope.factor) if rope.type == "dynamic" else length

    @property
    def longest_model_len(self) -> int:
        """The longest sequence the model can be run on at all: learned positions end, rotary ones do not."""
        return self.max_position_embeddings if self.rope is None else MAX_SIZE

    def attention_scale(self, layer: int) -> float:
        """What q·k is multiplied by in this layer."""
        return self.head_size**-0.5 if self.attention_scales is None else self.attention_scales[layer]
