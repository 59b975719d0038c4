"""OPT. Positions start in row 2 of their table; OPT-350m norms after its residual sums and has a narrow embedding."""

from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.families.family import Family, Names
from tritium.models.families.places import RowsFrom
from tritium.models.families.reading import heads_size
from tritium.models.hf_fields import Fields

OPT_NAMES: Names = {
    "embed_tokens": "model.decoder.embed_tokens",
    "embed_positions": RowsFrom("model.decoder.embed_positions", 2),
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "layers.*.attention_norm": "model.decoder.layers.*.self_attn_layer_norm",
    "layers.*.attention.q_proj": "model.decoder.layers.*.self_attn.q_proj",
    "layers.*.attention.k_proj": "model.decoder.layers.*.self_attn.k_proj",
    "layers.*.attention.v_proj": "model.decoder.layers.*.self_attn.v_proj",
    "layers.*.attention.o_proj": "model.decoder.layers.*.self_attn.out_proj",
    "layers.*.mlp_norm": "model.decoder.layers.*.final_layer_norm",
    "layers.*.mlp.up_proj": "model.decoder.layers.*.fc1",
    "layers.*.mlp.down_proj": "model.decoder.layers.*.fc2",
    "norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}


def _read_opt(fields: Fields) -> dict[str, Any]:
    fields.refuse("layer_norm_elementwise_affine", (True,), "layer norms without weights are not supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    is_before = fields.boolean("do_layer_norm_before", default=True)
    has_bias = fields.boolean("enable_bias", default=True)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "embedding_size": fields.optional_integer("word_embed_proj_dim"),
        "intermediate_size": fields.integer("ffn_dim"),
        "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_size": heads_size(fields, hidden, heads),
        "max_position_embeddings": fields.integer("max_position_embeddings", default=2048),
        "block": "pre_norm" if is_before else "post_norm",
        "has_final_norm": is_before and not fields.boolean("_remove_final_layer_norm", default=False),
        "norm": "layer_norm",
        "norm_eps": 1e-5,  # PyTorch's default: the file does not say it
        "activation": fields.activation("activation_function", default="relu"),
        "is_gated": False,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "has_mlp_bias": has_bias,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    read=_read_opt,
    names=OPT_NAMES,
    respelled=(("model.", ""),),
)
