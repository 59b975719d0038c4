"""GPT-2 and GPT-J."""

from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.families.family import Family, Names
from tritium.models.families.places import Conv1D
from tritium.models.families.reading import heads_size
from tritium.models.hf_fields import Fields
from tritium.models.rope_config import RopeConfig

GPT2_NAMES: Names = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "layers.*.attention_norm": "transformer.h.*.ln_1",
    "layers.*.attention.q_proj": Conv1D("transformer.h.*.attn.c_attn", 0, 3),
    "layers.*.attention.k_proj": Conv1D("transformer.h.*.attn.c_attn", 1, 3),
    "layers.*.attention.v_proj": Conv1D("transformer.h.*.attn.c_attn", 2, 3),
    "layers.*.attention.o_proj": Conv1D("transformer.h.*.attn.c_proj"),
    "layers.*.mlp_norm": "transformer.h.*.ln_2",
    "layers.*.mlp.up_proj": Conv1D("transformer.h.*.mlp.c_fc"),
    "layers.*.mlp.down_proj": Conv1D("transformer.h.*.mlp.c_proj"),
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}

GPTJ_NAMES: Names = {
    "embed_tokens": "transformer.wte",
    "layers.*.norm": "transformer.h.*.ln_1",
    "layers.*.attention.q_proj": "transformer.h.*.attn.q_proj",
    "layers.*.attention.k_proj": "transformer.h.*.attn.k_proj",
    "layers.*.attention.v_proj": "transformer.h.*.attn.v_proj",
    "layers.*.attention.o_proj": "transformer.h.*.attn.out_proj",
    "layers.*.mlp.up_proj": "transformer.h.*.mlp.fc_in",
    "layers.*.mlp.down_proj": "transformer.h.*.mlp.fc_out",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
GPT_BUFFERS = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)


def _gpt_like(fields: Fields, *, max_positions: int) -> dict[str, Any]:
    """What GPT-2 and GPT-J share."""
    hidden, heads = (
        fields.integer("n_embd", "hidden_size"),
        fields.integer("n_head", "num_attention_heads", high=1 << 14),
    )
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.optional_integer("n_inner") or 4 * hidden,
        "num_layers": fields.integer("n_layer", "num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_size": heads_size(fields, hidden, heads),
        "max_position_embeddings": fields.integer("n_positions", "max_position_embeddings", default=max_positions),
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_epsilon", high=1.0, default=1e-5),
        "activation": fields.activation("activation_function", default="gelu_new"),
        "is_gated": False,
        "has_mlp_bias": True,
    }


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.refuse("add_cross_attention", (False,), "decoders with cross-attention are not supported")
    found = _gpt_like(fields, max_positions=1024)
    scale = found["head_size"] ** -0.5 if fields.boolean("scale_attn_weights", default=True) else 1.0
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", default=False)
    return found | {
        "attention_scales": tuple(scale / (layer + 1 if by_layer else 1) for layer in range(found["num_layers"])),
        "has_qkv_bias": True,
        "has_output_bias": True,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


def _read_gptj(fields: Fields) -> dict[str, Any]:
    found = _gpt_like(fields, max_positions=2048)
    dim = fields.integer("rotary_dim", low=2, high=found["head_size"], default=64)
    if dim % 2:
        raise fields.error("rotary_dim", f"is {dim}, expected an even number")
    return found | {
        "block": "parallel",
        "rope": RopeConfig(dim=dim, is_interleaved=True),
        "has_lm_head_bias": True,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
    }


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    read=_read_gpt2,
    names=GPT2_NAMES,
    respelled=(("transformer.", ""),),
    ignored=GPT_BUFFERS,
)

GPTJ = Family(
    name="gptj",
    architecture="GPTJForCausalLM",
    read=_read_gptj,
    names=GPTJ_NAMES,
    respelled=(("transformer.", ""),),
    ignored=GPT_BUFFERS,
)
