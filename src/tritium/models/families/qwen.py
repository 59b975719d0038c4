"""Qwen 2, 2.5 and 3."""

from typing import Any

from tritium.models.families.family import Family
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.reading import layer_types, llama_like
from tritium.models.hf_fields import Fields

QWEN3_NAMES = LLAMA_NAMES | {
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Layers from max_window_layers on have the sliding window, if it is used at all; `layer_types` overrides."""
    window = 0
    if (
        fields.boolean("use_sliding_window", default=False)
        and fields.get("sliding_window", default=4096)[1] is not None
    ):
        window = fields.integer("sliding_window", default=4096)
    first = fields.integer("max_window_layers", low=0, default=28)
    return layer_types(fields, window, layers, [window if layer >= first else 0 for layer in range(layers)])


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    fields.refuse("use_mrope", (False,), "multimodal RoPE has no formula in Tritium")
    found = llama_like(fields, kv_heads=32, max_positions=32768)
    return found | {"windows": _qwen_windows(fields, found["num_layers"]), "has_qkv_bias": True}


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    found = llama_like(fields, kv_heads=32, max_positions=32768, head_size=128)
    has_bias = fields.boolean("attention_bias", default=False)
    return found | {
        "windows": _qwen_windows(fields, found["num_layers"]),
        "has_qk_norm": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
    }


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read_qwen2,
    names=LLAMA_NAMES,
    ignored=ROTARY_BUFFERS,
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read_qwen3,
    names=QWEN3_NAMES,
    ignored=ROTARY_BUFFERS,
)
