"""StableLM."""

from typing import Any

from tritium.models.families.family import Family
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.reading import llama_like
from tritium.models.hf_fields import Fields


def _read_stablelm(fields: Fields) -> dict[str, Any]:
    fields.refuse("qk_layernorm", (False,), "layer norms on queries and keys are not supported")
    is_parallel = fields.boolean("use_parallel_residual", default=False)
    return llama_like(fields, kv_heads=32, max_positions=4096, rotated_part=0.25) | {
        "block": "parallel" if is_parallel else "pre_norm",
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_eps", high=1.0, default=1e-5),
        "has_qkv_bias": fields.boolean("use_qkv_bias", default=False),
    }


STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    read=_read_stablelm,
    names=LLAMA_NAMES | {"layers.*.norm": "model.layers.*.input_layernorm"},
    ignored=ROTARY_BUFFERS,
)
