"""BLOOM: ALiBi, and a norm behind the embedding."""

from typing import Any

from tritium.models.alibi import alibi_slopes
from tritium.models.config import MAX_LAYERS
from tritium.models.families.family import Family, Names
from tritium.models.families.places import GroupedRows
from tritium.models.families.reading import heads_size
from tritium.models.hf_fields import Fields

BLOOM_NAMES: Names = {
    "embed_tokens": "transformer.word_embeddings",
    "embedding_norm": "transformer.word_embeddings_layernorm",
    "layers.*.attention_norm": "transformer.h.*.input_layernorm",
    "layers.*.attention.q_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "q"),
    "layers.*.attention.k_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "k"),
    "layers.*.attention.v_proj": GroupedRows("transformer.h.*.self_attention.query_key_value", "v"),
    "layers.*.attention.o_proj": "transformer.h.*.self_attention.dense",
    "layers.*.mlp_norm": "transformer.h.*.post_attention_layernorm",
    "layers.*.mlp.up_proj": "transformer.h.*.mlp.dense_h_to_4h",
    "layers.*.mlp.down_proj": "transformer.h.*.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def _read_bloom(fields: Fields) -> dict[str, Any]:
    """ALiBi has no last position; the length it was trained on is `seq_length`, where the file says it."""
    fields.refuse("apply_residual_connection_post_layernorm", (False,), "residual sums of norms are not supported")
    hidden = fields.integer("n_embed", "hidden_size")
    heads = fields.integer("n_head", "num_attention_heads", high=1 << 14)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_layers": fields.integer("n_layer", "num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_size": heads_size(fields, hidden, heads),
        "max_position_embeddings": fields.integer("seq_length", default=2048),
        "has_embedding_norm": True,
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_epsilon", high=1.0, default=1e-5),
        "activation": "gelu_tanh",
        "is_gated": False,
        "alibi_slopes": alibi_slopes(heads),
        "has_qkv_bias": True,
        "has_output_bias": True,
        "has_mlp_bias": True,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


BLOOM = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    read=_read_bloom,
    names=BLOOM_NAMES,
    respelled=(("transformer.", ""),),
)
