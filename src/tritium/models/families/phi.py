"""Phi-3, 3.5 and Phi-4-mini: a Llama with merged linears, and RoPE with one factor for each pair."""

from typing import Any

from tritium.models.families.family import Family, Names
from tritium.models.families.llama import LLAMA_NAMES, ROTARY_BUFFERS
from tritium.models.families.places import StackedRows
from tritium.models.families.reading import llama_like
from tritium.models.hf_fields import Fields

PHI3_NAMES: Names = LLAMA_NAMES | {
    "layers.*.attention.q_proj": StackedRows("model.layers.*.self_attn.qkv_proj", "q"),
    "layers.*.attention.k_proj": StackedRows("model.layers.*.self_attn.qkv_proj", "k"),
    "layers.*.attention.v_proj": StackedRows("model.layers.*.self_attn.qkv_proj", "v"),
    "layers.*.mlp.gate_proj": StackedRows("model.layers.*.mlp.gate_up_proj", "gate"),
    "layers.*.mlp.up_proj": StackedRows("model.layers.*.mlp.gate_up_proj", "up"),
}


def _read_phi3(fields: Fields) -> dict[str, Any]:
    """The first files call longrope "su" or "yarn"."""
    found = llama_like(
        fields,
        kv_heads=None,
        max_positions=4096,
        rotated_part=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
    )
    window = fields.optional_integer("sliding_window") or 0
    return found | {
        "windows": (window,) * found["num_layers"],
        "norm_eps": fields.number("rms_norm_eps", high=1.0, default=1e-5),
    }


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    read=_read_phi3,
    names=PHI3_NAMES,
    ignored=ROTARY_BUFFERS,
)
