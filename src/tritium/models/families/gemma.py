"""Gemma 2."""

from typing import Any

from tritium.models.families.family import Family
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.reading import layer_types, llama_like
from tritium.models.hf_fields import Fields

GEMMA2_NAMES = LLAMA_NAMES | {
    "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    """Layers 0, 2, ... have the sliding window unless `layer_types` says otherwise; a null soft-cap is none."""
    fields.refuse("use_bidirectional_attention", (False,), "only causal attention is supported")
    found = llama_like(
        fields, kv_heads=4, max_positions=8192, head_size=256, activation=("hidden_activation", "gelu_pytorch_tanh")
    )
    layers, hidden = found["num_layers"], found["hidden_size"]
    is_windowed = fields.get("sliding_window", default=4096)[1] is not None
    window = fields.integer("sliding_window", default=4096) if is_windowed else 0
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # transformers' defaults
    attention_cap, logit_cap = (
        fields.optional_number(name) if name in fields.data else default for name, default in caps.items()
    )
    has_bias = fields.boolean("attention_bias", default=False)
    return found | {
        "windows": layer_types(fields, window, layers, [0 if layer % 2 else window for layer in range(layers)]),
        "attention_scales": (fields.number("query_pre_attn_scalar", default=256) ** -0.5,) * layers,
        "attention_softcap": attention_cap or 0.0,
        "logit_softcap": logit_cap or 0.0,
        "embedding_scale": hidden**0.5,
        "norm": "offset_rms_norm",
        "block": "sandwich",
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read_gemma2,
    names=GEMMA2_NAMES,
    ignored=ROTARY_BUFFERS,
)
