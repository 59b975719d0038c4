"""GPT-NeoX and Pythia."""

from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.families.family import Family, Names
from tritium.models.families.places import GroupedRows
from tritium.models.families.reading import heads_size
from tritium.models.hf_fields import Fields
from tritium.models.hf_rope import read_rope

GPT_NEOX_NAMES: Names = {
    "embed_tokens": "gpt_neox.embed_in",
    "layers.*.attention_norm": "gpt_neox.layers.*.input_layernorm",
    "layers.*.attention.q_proj": GroupedRows("gpt_neox.layers.*.attention.query_key_value", "q"),
    "layers.*.attention.k_proj": GroupedRows("gpt_neox.layers.*.attention.query_key_value", "k"),
    "layers.*.attention.v_proj": GroupedRows("gpt_neox.layers.*.attention.query_key_value", "v"),
    "layers.*.attention.o_proj": "gpt_neox.layers.*.attention.dense",
    "layers.*.mlp_norm": "gpt_neox.layers.*.post_attention_layernorm",
    "layers.*.mlp.up_proj": "gpt_neox.layers.*.mlp.dense_h_to_4h",
    "layers.*.mlp.down_proj": "gpt_neox.layers.*.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}


def _read_gpt_neox(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    head_size = heads_size(fields, hidden, heads)
    max_positions = fields.integer("max_position_embeddings", default=2048)
    is_parallel = fields.boolean("use_parallel_residual", default=True)
    has_bias = fields.boolean("attention_bias", default=True)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size", default=24_576),
        "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_size": head_size,
        "max_position_embeddings": max_positions,
        "block": "parallel_two_norms" if is_parallel else "pre_norm",
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_eps", high=1.0, default=1e-5),
        "activation": fields.activation("hidden_act", default="gelu"),
        "is_gated": False,
        "rope": read_rope(fields, head_size, max_positions, rotated_part=0.25, names=("rotary_emb_base", "rotary_pct")),
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "has_mlp_bias": True,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
    }


GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=_read_gpt_neox,
    names=GPT_NEOX_NAMES,
    respelled=(("embed_out.", "lm_head."),),
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
