"""Llama, whose names of tensors most later families keep, Mistral and Mixtral."""

from typing import Any

from tritium.models.config import MAX_EXPERTS, ExpertsConfig
from tritium.models.families.family import Family, Names
from tritium.models.families.places import Experts
from tritium.models.families.reading import llama_like
from tritium.models.hf_fields import Fields

LLAMA_NAMES: Names = {
    "embed_tokens": "model.embed_tokens",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp.gate_proj": "model.layers.*.mlp.gate_proj",
    "layers.*.mlp.up_proj": "model.layers.*.mlp.up_proj",
    "layers.*.mlp.down_proj": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
MIXTRAL_NAMES: Names = LLAMA_NAMES | {
    "layers.*.mlp.router": "model.layers.*.block_sparse_moe.gate",
    "layers.*.mlp.experts_gate_up": Experts("model.layers.*.block_sparse_moe.experts", ("w1", "w3")),
    "layers.*.mlp.experts_down": Experts("model.layers.*.block_sparse_moe.experts", ("w2",)),
}
ROTARY_BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def _read_llama(fields: Fields) -> dict[str, Any]:
    has_bias = fields.boolean("attention_bias", default=False)
    return llama_like(fields, kv_heads=None, max_positions=2048) | {
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "has_mlp_bias": fields.boolean("mlp_bias", default=False),
    }


def _read_mistral(fields: Fields) -> dict[str, Any]:
    found = llama_like(fields, kv_heads=8, max_positions=4096 * 32)
    name, window = fields.get("sliding_window", default=4096)
    window = 0 if window is None else fields.integer(name, default=4096)
    return found | {"windows": (window,) * found["num_layers"]}


def _read_mixtral(fields: Fields) -> dict[str, Any]:
    found = llama_like(fields, kv_heads=8, max_positions=4096 * 32, rope_theta=1e6)
    layers, window = found["num_layers"], fields.optional_integer("sliding_window") or 0
    num_experts = fields.integer("num_local_experts", "num_experts", high=MAX_EXPERTS, default=8)
    return found | {
        "norm_eps": fields.number("rms_norm_eps", high=1.0, default=1e-5),
        "windows": (window,) * layers,
        "experts": ExpertsConfig(
            num_experts=num_experts,
            num_active=fields.integer("num_experts_per_tok", high=num_experts, default=2),
            intermediate_size=found["intermediate_size"],
            layers=tuple(range(layers)),
        ),
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read=_read_llama,
    names=LLAMA_NAMES,
    ignored=ROTARY_BUFFERS,
)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    read=_read_mistral,
    names=LLAMA_NAMES,
    ignored=ROTARY_BUFFERS,
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    read=_read_mixtral,
    names=MIXTRAL_NAMES,
    ignored=ROTARY_BUFFERS,
)
