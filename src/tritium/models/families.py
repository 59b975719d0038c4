"""The model table: one row per family. A row says how its config.json is read and how its tensors are named.

To add a family whose parts exist: write a reader and a naming below, and add the row; CONTRIBUTING.md has the steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.errors import UnsupportedModel
from tritium.models.config import MAX_LAYERS, ModelConfig, RopeConfig
from tritium.models.hf_fields import Fields
from tritium.models.hf_rope import read_rope


@dataclass(frozen=True)
class Conv1D:
    """A linear that the checkpoint keeps as [in, out], perhaps as part `part` of `parts` side by side along out."""

    path: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """architecture: as in config.json's `architectures`; model_type: as in its `model_type`.

    read: config.json -> keywords of ModelConfig.
    names: our module path, `*` for a layer's number -> the checkpoint's; `.weight` or `.bias` is appended to both.
    prefix: what some publications leave out in front of every name.
    ignored: regular expressions of tensors that published checkpoints carry beside the weights.
    """

    name: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    names: Mapping[str, str | Conv1D]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


def _head_size(fields: Fields, hidden: int, heads: int) -> int:
    """The head size when config.json does not say it."""
    if hidden % heads:
        raise fields.error("num_attention_heads" if "num_attention_heads" in fields.data else "n_head",
                           f"is {heads}, which does not divide the hidden size {hidden}")  # fmt: skip
    return hidden // heads


def _llama_like(
    fields: Fields,
    *,
    kv_heads: int | None,
    max_positions: int,
    head_size: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    rotated_part: float | None = None,
) -> dict[str, Any]:
    """What Llama and its successors share. The keywords are transformers' defaults for absent fields."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    if head_size is None or "head_dim" in fields.data:
        head_size = fields.optional_integer("head_dim", high=1 << 14) or _head_size(fields, hidden, heads)
    name, value = fields.get("num_key_value_heads", default=kv_heads)
    kv = heads if value is None else fields.integer(name, high=heads, default=kv_heads)
    if heads % kv:
        raise fields.error(name, f"is {kv}, which does not divide num_attention_heads ({heads})")
    max_positions = fields.integer("max_position_embeddings", default=max_positions)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_size": head_size,
        "max_position_embeddings": max_positions,
        "norm_eps": fields.number("rms_norm_eps", high=1.0, default=1e-6),
        "activation": fields.activation(activation[0], default=activation[1]),
        "rope": read_rope(fields, head_size, max_positions, rotated_part=rotated_part),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
    }


def _read_llama(fields: Fields) -> dict[str, Any]:
    has_bias = fields.boolean("attention_bias", default=False)
    return _llama_like(fields, kv_heads=None, max_positions=2048) | {
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "has_mlp_bias": fields.boolean("mlp_bias", default=False),
    }


def _read_mistral(fields: Fields) -> dict[str, Any]:
    found = _llama_like(fields, kv_heads=8, max_positions=4096 * 32)
    name, window = fields.get("sliding_window", default=4096)
    window = 0 if window is None else fields.integer(name, default=4096)
    return found | {"windows": (window,) * found["num_layers"]}


def _layer_types(fields: Fields, window: int, layers: int, default: Sequence[int]) -> tuple[int, ...]:
    """Each layer's window: by `layer_types` when there is one, else `default`."""
    types = fields.get("layer_types", default=None)[1]
    if types is None:
        return tuple(default)
    allowed = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(types, list) or len(types) != layers or any(kind not in allowed for kind in types):
        expected = f"{layers} times {' or '.join(map(repr, allowed))}"
        raise fields.error("layer_types", f"is {str(types)[:200]}, expected {expected} (sliding window: {window})")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Layers from max_window_layers on have the sliding window, if it is used at all; `layer_types` overrides."""
    window = 0
    if (
        fields.boolean("use_sliding_window", default=False)
        and fields.get("sliding_window", default=4096)[1] is not None
    ):
        window = fields.integer("sliding_window", default=4096)
    first = fields.integer("max_window_layers", low=0, default=28)
    return _layer_types(fields, window, layers, [window if layer >= first else 0 for layer in range(layers)])


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    fields.refuse("use_mrope", (False,), "multimodal RoPE has no formula in Tritium")
    found = _llama_like(fields, kv_heads=32, max_positions=32768)
    return found | {"windows": _qwen_windows(fields, found["num_layers"]), "has_qkv_bias": True}


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    found = _llama_like(fields, kv_heads=32, max_positions=32768, head_size=128)
    has_bias = fields.boolean("attention_bias", default=False)
    return found | {
        "windows": _qwen_windows(fields, found["num_layers"]),
        "has_qk_norm": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
    }


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    """Layers 0, 2, ... have the sliding window unless `layer_types` says otherwise; a null soft-cap is none."""
    fields.refuse("use_bidirectional_attention", (False,), "only causal attention is supported")
    found = _llama_like(
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
        "windows": _layer_types(fields, window, layers, [0 if layer % 2 else window for layer in range(layers)]),
        "attention_scales": (fields.number("query_pre_attn_scalar", default=256) ** -0.5,) * layers,
        "attention_softcap": attention_cap or 0.0,
        "logit_softcap": logit_cap or 0.0,
        "embedding_scale": hidden**0.5,
        "norm": "offset_rms_norm",
        "has_post_norms": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True),
    }


def _read_stablelm(fields: Fields) -> dict[str, Any]:
    fields.refuse("qk_layernorm", (False,), "layer norms on queries and keys are not supported")
    fields.refuse("use_parallel_residual", (False,), "StableLM's parallel residual is not supported")
    return _llama_like(fields, kv_heads=32, max_positions=4096, rotated_part=0.25) | {
        "norm": "layer_norm",
        "norm_eps": fields.number("layer_norm_eps", high=1.0, default=1e-5),
        "has_qkv_bias": fields.boolean("use_qkv_bias", default=False),
    }


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
        "head_size": _head_size(fields, hidden, heads),
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
        "is_parallel": True,
        "rope": RopeConfig(dim=dim, is_interleaved=True),
        "has_lm_head_bias": True,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
    }


LLAMA_NAMES: dict[str, str | Conv1D] = {
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

QWEN3_NAMES = LLAMA_NAMES | {
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}

GEMMA2_NAMES = LLAMA_NAMES | {
    "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}

GPT2_NAMES: dict[str, str | Conv1D] = {
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

GPTJ_NAMES: dict[str, str | Conv1D] = {
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

ROTARY_BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
GPT_BUFFERS = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)

FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        read=_read_llama,
        names=LLAMA_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        read=_read_mistral,
        names=LLAMA_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        read=_read_qwen2,
        names=LLAMA_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        read=_read_qwen3,
        names=QWEN3_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        read=_read_gemma2,
        names=GEMMA2_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="stablelm",
        architecture="StableLmForCausalLM",
        read=_read_stablelm,
        names=LLAMA_NAMES,
        ignored=ROTARY_BUFFERS,
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        read=_read_gpt2,
        names=GPT2_NAMES,
        prefix="transformer.",
        ignored=GPT_BUFFERS,
    ),
    Family(
        name="gptj",
        architecture="GPTJForCausalLM",
        read=_read_gptj,
        names=GPTJ_NAMES,
        prefix="transformer.",
        ignored=GPT_BUFFERS,
    ),
)


def find_family(fields: Fields) -> Family:
    """The row for a config.json: by its first architecture, or by model_type when it names none."""
    architectures = fields.get("architectures", default=None)[1]
    known = ", ".join(family.architecture for family in FAMILIES)
    add = "to add one, write a row in tritium/models/families.py, or pass your own nn.Module to tritium.build"
    if architectures:
        if not isinstance(architectures, list) or not isinstance(architectures[0], str):
            raise fields.error("architectures", f"is {architectures!r}, expected a list of names")
        for family in FAMILIES:
            if family.architecture == architectures[0]:
                return family
        raise UnsupportedModel(f"{fields.where}: architecture {architectures[0]!r} is unknown; known: {known}; {add}")
    kind = fields.get("model_type")[1]
    for family in FAMILIES:
        if family.name == kind:
            return family
    raise UnsupportedModel(f"{fields.where}: model_type {kind!r} is unknown; known: {known}; {add}")


def family_named(config: ModelConfig) -> Family | None:
    """The row that `config.family` names; None for a model of your own."""
    return next((family for family in FAMILIES if family.name == config.family), None)
