"""StableLM."""

from typing import Any

from tritium.models.families.family import Family, Names
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.places import Heads
from tritium.models.families.reading import llama_like
from tritium.models.hf_fields import Fields

STABLELM_NAMES: Names = LLAMA_NAMES | {
    "layers.*.norm": "model.layers.*.input_layernorm",
    "layers.*.attention.q_norm": Heads("model.layers.*.self_attn.q_layernorm.norms"),
    "layers.*.attention.k_norm": Heads("model.layers.*.self_attn.k_layernorm.norms"),
}


def _read_stablelm(fields: Fields) -> dict[str, Any]:
    has_qk_norm = fields.boolean("qk_layernorm", default=False)
    is_parallel = fields.boolean("use_parallel_residual", default=False)
    return llama_like(fields, kv_heads=32, max_positions=4096, rotated_part=0.25) | {
        "block": "parallel" if is_parallel else "pre_norm",
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_eps", high=1.0, default=1e-5),
        "has_qk_norm": has_qk_norm,
        "has_norm_per_head": has_qk_norm,
        "has_qkv_bias": fields.boolean("use_qkv_bias", default=False),
    }


STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    read=_read_stablelm,
    names=STABLELM_NAMES,
    ignored=ROTARY_BUFFERS,
)
