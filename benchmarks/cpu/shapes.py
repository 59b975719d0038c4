"""The two models of the comparison, as Hugging Face directories with random weights.

A linear's or embedding's weights are normal with a standard deviation of 1 / sqrt(inputs), so that every layer counts;
norms lie around 1. They are drawn in the order of names from one seed: the same on every machine.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB_SIZE = 32_000
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _COMMON
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-160m": _COMMON
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
    | {"num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": False},
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes |= {
            block + "input_layernorm.weight": (hidden,),
            block + "self_attn.q_proj.weight": (queries, hidden),
            block + "self_attn.k_proj.weight": (keys, hidden),
            block + "self_attn.v_proj.weight": (keys, hidden),
            block + "self_attn.o_proj.weight": (hidden, queries),
            block + "post_attention_layernorm.weight": (hidden,),
            block + "mlp.gate_proj.weight": (inner, hidden),
            block + "mlp.up_proj.weight": (inner, hidden),
            block + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes


def write_model(name: str, path: Path) -> Path:
    """Write the model `name` to `path`, unless it is there."""
    config, weights = SHAPES[name], path / "model.safetensors"
    if weights.exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    draw, tensors = torch.Generator().manual_seed(0), {}
    for tensor, shape in tensor_shapes(config).items():
        mean, std = (0.0, 1 / math.sqrt(shape[1])) if len(shape) > 1 else (1.0, 0.1)
        tensors[tensor] = torch.empty(shape).normal_(mean, std, generator=draw).to(torch.bfloat16)
    save_file(tensors, weights.with_suffix(".part"), metadata={"format": "pt"})
    weights.with_suffix(".part").rename(weights)
    return path
