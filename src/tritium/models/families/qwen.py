"""Qwen 2, 2.5, 3 and 3 MoE."""

from typing import Any

from tritium.models.config import MAX_EXPERTS, MAX_LAYERS, ExpertsConfig
from tritium.models.families.family import Family, Names
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.places import Experts
from tritium.models.families.reading import layer_types, llama_like
from tritium.models.hf_fields import Fields

QWEN3_NAMES = LLAMA_NAMES | {
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}

QWEN3_MOE_NAMES: Names = QWEN3_NAMES | {
    "layers.*.mlp.router": "model.layers.*.mlp.gate",
    "layers.*.mlp.experts_gate_up": Experts("model.layers.*.mlp.experts", ("gate_proj", "up_proj")),
    "layers.*.mlp.experts_down": Experts("model.layers.*.mlp.experts", ("down_proj",)),
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


def _read_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """A layer is dense when mlp_only_layers names it, or decoder_sparse_step does not divide its number from 1 on."""
    found = llama_like(fields, kv_heads=4, max_positions=32768)
    layers, has_bias = found["num_layers"], fields.boolean("attention_bias", default=False)
    window = fields.get("sliding_window", default=4096)[1]
    is_windowed = fields.boolean("use_sliding_window", default=False) and window is not None
    found |= {
        "windows": (fields.integer("sliding_window", default=4096) if is_windowed else 0,) * layers,
        "has_qk_norm": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
    }
    num_experts = fields.integer("num_experts", "num_local_experts", low=0, high=MAX_EXPERTS, default=128)
    name, dense = fields.get("mlp_only_layers", default=None)
    if not isinstance(dense or [], list) or any(isinstance(n, bool) or not isinstance(n, int) for n in dense or []):
        raise fields.error(name, f"is {str(dense)[:200]}, expected a list of layers' numbers")
    step = fields.integer("decoder_sparse_step", high=MAX_LAYERS, default=1)
    sparse = tuple(i for i in range(layers) if i not in (dense or []) and (i + 1) % step == 0)
    if not num_experts or not sparse:
        return found
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_active=fields.integer("num_experts_per_tok", high=num_experts, default=8),
        intermediate_size=fields.integer("moe_intermediate_size", default=768),
        layers=sparse,
        is_normed=fields.boolean("norm_topk_prob", default=False),
    )
    return found | {"experts": experts}


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

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read_qwen3_moe,
    names=QWEN3_MOE_NAMES,
    ignored=ROTARY_BUFFERS,
)
