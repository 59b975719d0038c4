"""ModelConfig: what a decoder is made of, independent of how any checkpoint spells it.

`hf_config.py` reads it from a config.json, `presets.py` names well-known ones, and a person can write one by hand.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tritium.config import check_choice, check_int
from tritium.errors import ConfigError
from tritium.models.rope_config import MAX_SIZE, RopeConfig

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")
NORMS = ("rms_norm", "offset_rms_norm", "layer_norm")
BLOCKS = ("pre_norm", "post_norm", "sandwich", "parallel", "parallel_two_norms")
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 10


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP of some layers.

    num_active: experts that a token chooses. intermediate_size: of one. is_normed: the chosen ones' weights add up to
    1, else all experts' do. layers: the layers that have experts.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    layers: tuple[int, ...]
    is_normed: bool = True

    def __post_init__(self) -> None:
        check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_int("num_active", self.num_active, 1, self.num_experts)
        check_int("experts' intermediate_size", self.intermediate_size, 1, MAX_SIZE)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Lengths are in tokens.

    family: the row of `families.FAMILIES` that names its tensors in a checkpoint; "" for a model of your own.
    windows: per layer, how many keys a query sees at most, itself included; 0: all.
    rope: None means learned position embeddings, or alibi_slopes, one for each head, if these are given.
    rope_local: that of windowed layers, where it is another.
    attention_scales: per layer; None means head_size ** -0.5.
    has_qk_norm: each head's queries and keys go through such a norm too, before they are rotated.
    has_norm_per_head: that is a layer norm without bias, which has a weight of its own for each head.
    is_gated: the MLP is act(gate(x)) * up(x), else act(up(x)).
    has_embedding_norm: embeddings go through a norm before the first layer.
    experts: None: every layer has an MLP.
    block: how a layer's norms and residual sums lie; `blocks.py` has their formulas.
    embedding_size: None is hidden_size; else a linear leads from it into the model, and one back before the head.
    embedding_scale: token embeddings are multiplied by it, rounded to dtype. attention_softcap, logit_softcap: scores
    or logits s become cap · tanh(s / cap); 0: they stay.
    max_model_len: prompt plus output the model is built for; freezes "dynamic" RoPE and "longrope"; None takes
    `default_model_len`.
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
    block: Literal["pre_norm", "post_norm", "sandwich", "parallel", "parallel_two_norms"] = "pre_norm"
    norm: Literal["rms_norm", "offset_rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    activation: str = "silu"
    is_gated: bool = True
    experts: ExpertsConfig | None = None
    has_embedding_norm: bool = False
    has_final_norm: bool = True
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope: RopeConfig | None = None
    rope_local: RopeConfig | None = None
    alibi_slopes: tuple[float, ...] | None = None
    windows: tuple[int, ...] = ()
    attention_scales: tuple[float, ...] | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_norm_per_head: bool = False
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
        if self.embedding_size is not None:
            check_int("embedding_size", self.embedding_size, 1, MAX_SIZE)
        check_choice("norm", self.norm, NORMS)
        check_choice("block", self.block, BLOCKS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        for rope in (self.rope, self.rope_local):
            if rope is not None and rope.dim > self.head_size:
                raise ConfigError(f"rope dim ({rope.dim}) must be at most head_size ({self.head_size})")
        if self.rope_local is not None and (
            self.rope is None or self.rope_local.is_interleaved != self.rope.is_interleaved
        ):
            raise ConfigError("rope_local needs a rope that rotates the same pairs of dimensions")
        if self.alibi_slopes is not None:
            if self.rope is not None:
                raise ConfigError("rope and alibi_slopes cannot both be given: each says where a token stands")
            if len(self.alibi_slopes) != self.num_heads or not all(map(math.isfinite, self.alibi_slopes)):
                raise ConfigError(f"alibi_slopes must be {self.num_heads} finite numbers, not {self.alibi_slopes}")
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
        if rope is None or rope.type in ("default", "llama3", "longrope"):
            return length
        if rope.original_max_position_embeddings:
            return max(length, int(rope.original_max_position_embeddings * rope.factor))
        return int(length * rope.factor) if rope.type == "dynamic" else length

    @property
    def longest_model_len(self) -> int:
        """The longest sequence the model can be run on at all: learned positions end, the others do not."""
        return self.max_position_embeddings if self.has_learned_positions else MAX_SIZE

    @property
    def has_learned_positions(self) -> bool:
        """Whether there is a table of positions."""
        return self.rope is None and self.alibi_slopes is None

    def attention_scale(self, layer: int) -> float:
        """What q·k is multiplied by in this layer."""
        return self.head_size**-0.5 if self.attention_scales is None else self.attention_scales[layer]
