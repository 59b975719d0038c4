"""Falcon: 7B (one kv head), 40B and later (groups of heads, two norms in parallel), RW (ALiBi)."""

from dataclasses import dataclass
from typing import Any

import torch

from tritium.models.alibi import alibi_slopes
from tritium.models.config import MAX_LAYERS, ModelConfig
from tritium.models.families.family import Family, Names
from tritium.models.families.places import GroupedRows
from tritium.models.families.reading import heads_size
from tritium.models.hf_fields import Fields
from tritium.models.hf_rope import read_rope
from tritium.weights.recipes import Checkpoint, Recipe


@dataclass(frozen=True)
class Norm:
    """A norm that is called `parallel` where attention and MLP, side by side, have one each."""

    path: str
    parallel: str

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """The tensor, by the name that it has in layers of this kind."""
        if config.block == "parallel_two_norms":
            name = name.replace(self.path.rpartition(".")[2], self.parallel)
        return Checkpoint(name, shape)


FALCON_NAMES: Names = {
    "embed_tokens": "transformer.word_embeddings",
    "layers.*.norm": "transformer.h.*.input_layernorm",
    "layers.*.attention_norm": Norm("transformer.h.*.input_layernorm", parallel="ln_attn"),
    "layers.*.attention.q_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "q"),
    "layers.*.attention.k_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "k"),
    "layers.*.attention.v_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "v"),
    "layers.*.attention.o_proj": "transformer.h.*.self_attention.dense",
    "layers.*.mlp_norm": Norm("transformer.h.*.post_attention_layernorm", parallel="ln_mlp"),
    "layers.*.mlp.up_proj": "transformer.h.*.mlp.dense_h_to_4h",
    "layers.*.mlp.down_proj": "transformer.h.*.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def _read_falcon(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    head_size = heads_size(fields, hidden, heads)
    is_new = fields.boolean("new_decoder_architecture", default=False)
    has_bias = fields.boolean("bias", default=False)
    max_positions = fields.integer("max_position_embeddings", default=2048)
    found = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.optional_integer("ffn_hidden_size") or 4 * hidden,
        "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(fields, heads, is_new=is_new),
        "head_size": head_size,
        "max_position_embeddings": max_positions,
        "block": _block(fields, is_new=is_new),
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_epsilon", high=1.0, default=1e-5),
        "activation": fields.activation("activation", default="gelu"),
        "is_gated": False,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "has_mlp_bias": has_bias,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }
    if fields.boolean("alibi", default=False):
        return found | {"alibi_slopes": _slopes(heads, head_size)}
    return found | {"rope": read_rope(fields, head_size, max_positions)}


def _kv_heads(fields: Fields, heads: int, *, is_new: bool) -> int:
    if not is_new:
        return 1 if fields.boolean("multi_query", default=True) else heads
    kv_heads = fields.optional_integer("num_kv_heads", high=heads) or heads
    if heads % kv_heads:
        raise fields.error("num_kv_heads", f"is {kv_heads}, which does not divide num_attention_heads ({heads})")
    return kv_heads


def _block(fields: Fields, *, is_new: bool) -> str:
    norms = fields.optional_integer("num_ln_in_parallel_attn", high=2) or (2 if is_new else 1)
    if fields.boolean("parallel_attn", default=True):
        if norms == 2 and not is_new:
            why = "two norms come with new_decoder_architecture only"
            raise fields.unsupported("num_ln_in_parallel_attn", norms, why)
        return "parallel_two_norms" if norms == 2 else "parallel"
    if is_new:
        raise fields.unsupported("parallel_attn", False, "new_decoder_architecture puts attention and MLP side by side")
    return "pre_norm"


def _slopes(heads: int, head_size: int) -> tuple[float, ...]:
    """Falcon rounds slopes to bf16 and scales them like the scores.

    transformers rounds slope · position to bf16 too, which grows coarse with the position; here it is exact.
    """
    slopes = torch.tensor(alibi_slopes(heads), device="cpu").to(torch.bfloat16).to(torch.float64)
    return tuple((slopes * head_size**-0.5).tolist())


FALCON = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    read=_read_falcon,
    names=FALCON_NAMES,
    ignored=(r"transformer\.h\.\d+\.self_attention\.(maybe_)?rotary(_emb)?\.inv_freq",),
)
