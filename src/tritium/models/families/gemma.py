"""Gemma 2 and 3; of a multimodal Gemma 3 its text model."""

from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.families.family import Family
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.reading import layer_types, llama_like
from tritium.models.hf_fields import Fields
from tritium.models.rope_config import RopeConfig

GEMMA2_NAMES = LLAMA_NAMES | {
    "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}

GEMMA3_NAMES = GEMMA2_NAMES | {
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
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


def _read_gemma3(fields: Fields) -> dict[str, Any]:
    """Windowed layers have a RoPE of their own. The first files say it by rope_local_base_freq, later ones nested."""
    fields.refuse("use_bidirectional_attention", (False,), "only causal attention is supported")
    nested = fields.section("rope_parameters")
    local = fields
    if nested is not None and not nested.data.keys().isdisjoint(("full_attention", "sliding_attention")):
        local = nested.section("sliding_attention") or Fields({}, fields.where)
        full = nested.section("full_attention")
        fields = Fields({**fields.data, "rope_parameters": full.data if full else {}}, fields.where)
    found = llama_like(
        fields,
        kv_heads=4,
        max_positions=131_072,
        head_size=256,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        rope_theta=1e6,
    )
    local.refuse("rope_type", ("default",), "windowed layers have plain RoPE")
    theta = local.number("rope_local_base_freq", *(["rope_theta"] if local is not fields else []), low=1.0, default=1e4)
    layers, hidden = found["num_layers"], found["hidden_size"]
    is_windowed = fields.get("sliding_window", default=4096)[1] is not None
    window = fields.integer("sliding_window", default=4096) if is_windowed else 0
    every = fields.integer("sliding_window_pattern", "_sliding_window_pattern", high=MAX_LAYERS, default=6)
    has_bias = fields.boolean("attention_bias", default=False)
    return found | {
        "windows": layer_types(fields, window, layers, [window if (i + 1) % every else 0 for i in range(layers)]),
        "rope_local": RopeConfig(dim=found["head_size"], theta=theta),
        "attention_scales": (fields.number("query_pre_attn_scalar", default=256) ** -0.5,) * layers,
        "attention_softcap": fields.optional_number("attn_logit_softcapping") or 0.0,
        "logit_softcap": fields.optional_number("final_logit_softcapping") or 0.0,
        "embedding_scale": hidden**0.5,
        "norm": "offset_rms_norm",
        "block": "sandwich",
        "has_qk_norm": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


def _read_multimodal_gemma3(fields: Fields) -> dict[str, Any]:
    """The text model's part. Published files leave out what is transformers' default."""
    text = fields.section("text_config")
    if text is None:
        raise fields.error("text_config", "is missing")
    return _read_gemma3(Fields({"vocab_size": 262_208, "num_attention_heads": 8, **text.data}, fields.where))


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read_gemma2,
    names=GEMMA2_NAMES,
    ignored=ROTARY_BUFFERS,
)

GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read_gemma3,
    names=GEMMA3_NAMES,
    ignored=ROTARY_BUFFERS,
)

GEMMA3_MULTIMODAL = Family(
    name="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    read=_read_multimodal_gemma3,
    names={ours: f"language_model.{theirs}" for ours, theirs in GEMMA3_NAMES.items()},
    ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
)
