"""Small random checkpoints, one per feature of every family, drawn so that every tensor matters.

A directory made here looks like a published one: config.json in the spelling of its time, safetensors (one file or
shards with an index), tied or untied, in any dtype. `transformers` (the test extra) says which tensors there are, reads
the same directory, and is the oracle.

Drawn: norm weights N(1, 0.3), biases N(0, 0.3), queries and keys large enough that attention is far from uniform, the
head so that logits have a standard deviation of about 3.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tritium import models
from tritium.weights.recipes import evaluate
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import WeightSource

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 24,
    "sliding_window": 11,
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "sliding_window": 13,
    "max_window_layers": 1,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24}
GEMMA2 = {name: value for name, value in LLAMA.items() if name != "hidden_act"} | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 6.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
STABLELM = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"} | {
    "architectures": ["StableLmForCausalLM"],
    "model_type": "stablelm",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 199,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPTJ = GPT2 | {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "rotary_dim": 8,
    "n_inner": 80,
    "tie_word_embeddings": False,
}


def _scaled(kind: str, **more: Any) -> dict[str, Any]:
    """A Llama with 32 positions of pre-training stretched by 4; prompts of more than 32 tokens see the scaling."""
    scaling = {"rope_type": kind, "factor": 4.0, **more}
    if kind in ("linear", "dynamic"):
        return LLAMA | {"max_position_embeddings": 32, "rope_scaling": scaling}
    return LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 32}}


TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-mha-biased": LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama-linear": _scaled("linear"),
    "llama-dynamic": _scaled("dynamic"),
    "llama-llama3": _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "llama-yarn": _scaled("yarn"),
    "llama-yarn-mscale": _scaled("yarn", mscale=1.3, mscale_all_dim=0.6, beta_fast=4, beta_slow=0.5),
    "llama-yarn-factor": _scaled("yarn", attention_factor=1.4, truncate=False),
    "mistral": MISTRAL,
    "mistral-no-window": MISTRAL | {"sliding_window": None, "head_dim": None},
    "qwen2": QWEN2,
    "qwen2-window": QWEN2 | {"use_sliding_window": True},
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen3": QWEN3 | {"use_sliding_window": True},
    "qwen3-biased": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "gemma2": GEMMA2,
    "gemma2-no-caps": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    "stablelm": STABLELM,
    "stablelm-biased-tied": STABLELM
    | {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2-scaled-by-layer": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 72},
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "gptj": GPTJ,
    "gptj-tied": GPTJ | {"tie_word_embeddings": True, "rotary_dim": 16},
}


# Queries and keys: attention chooses. Outputs: layers outweigh the embedding. Both keep greedy decoding from repeating:
# 32 greedy tokens hold 16 to 26 different ones for the base row of each family (with gains of 1: 1 to 20).
GAINS = {
    **dict.fromkeys(("q_proj", "k_proj", "c_attn"), 3.0),
    **dict.fromkeys(("o_proj", "out_proj", "attn.c_proj"), 6.0),
    **dict.fromkeys(("down_proj", "fc_out", "mlp.c_proj"), 4.0),
}

POST_NORM_GAIN = 10.0  # Gemma 2 multiplies its embedding by sqrt(D), and no layer puts out more than its last norm does


def make_checkpoint(
    path: str | Path,
    model: str | dict[str, Any] = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    num_shards: int = 1,
    is_published_gpt: bool = False,
) -> Path:
    """Write a model directory and return its path. `model`: a name of TINY_MODELS, or the contents of a config.json.

    dtype: of the stored tensors and in config.json. num_shards > 1: shards with an index.
    is_published_gpt: as the first GPT-2 and GPT-J files were: with causal masks, GPT-2 without `transformer.` in names.
    """
    config = dict(TINY_MODELS[model] if isinstance(model, str) else model)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config["torch_dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config, indent=2))
    eos = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": config.get("eos_token_id")}
    (path / "generation_config.json").write_text(json.dumps(eos))
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in draw_tensors(path, seed).items()}
    if is_published_gpt:
        tensors = _as_published(tensors, config)
    write_tensors(path, tensors, num_shards)
    return path


def draw_tensors(path: str | Path, seed: int) -> dict[str, Tensor]:
    """Random float32 values for every tensor that transformers saves for the config.json in `path`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    head = "lm_head.weight" if "lm_head.weight" in shapes else next(iter(shapes))
    is_conv1d = model.config.model_type == "gpt2"
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_linear = len(shape) == 2 and "wte" not in name and "embed" not in name and "wpe" not in name
        if len(shape) == 1:
            gain = POST_NORM_GAIN if "post_feedforward_layernorm" in name else 1.0
            tensors[name] = gain * (0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif name == head:
            tensors[name] = noise * (3 * shape[1] ** -0.5)
        elif is_linear:
            fan_in = shape[0] if is_conv1d else shape[1]
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            tensors[name] = noise * (gain * fan_in**-0.5)
        else:
            tensors[name] = noise * 0.5
    return tensors


def write_tensors(path: str | Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """model.safetensors, or shards of about equal counts and their index, replacing what is there."""
    path = Path(path)
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    files = {
        name: f"model-{i * num_shards // len(names) + 1:05}-of-{num_shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in dict.fromkeys(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def reference_model(path: str | Path, dtype: str = "float32") -> nn.Module:
    """transformers' model of a directory, ready to run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def reference_logits(model: nn.Module, token_ids: list[int] | Tensor) -> Tensor:
    """transformers' logits_TV of one sequence, float32."""
    return model(input_ids=torch.as_tensor(token_ids)[None], use_cache=False).logits[0].float()


def freeze_dynamic_rope(model: Any, max_model_len: int) -> Any:
    """transformers' model with dynamic RoPE as an engine built for `max_model_len` has it: the same at every length."""
    rotary = model.model.rotary_emb
    rotary.inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, "cpu", seq_len=max_model_len)
    rotary.rope_type = "default"
    return model


def random_prompt(length: int, vocab_size: int = 199, seed: int = 0) -> list[int]:
    """Token ids, none of them the first three (bos, eos, ...)."""
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _as_published(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    if config["model_type"] == "gpt2":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    prefix, positions = "" if config["model_type"] == "gpt2" else "transformer.", config["n_positions"]
    for layer in range(config["n_layer"]):
        mask = torch.ones(positions, positions).tril()[None, None]
        tensors[f"{prefix}h.{layer}.attn.bias"] = mask if config["model_type"] == "gpt2" else mask.to(torch.uint8)
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def our_model(path: str | Path, *, dtype: str = "float32", max_model_len: int | None = None) -> nn.Module:
    """Our module of a directory with its weights in memory: what a compiled engine must agree with."""
    source = SafetensorsSource(path)
    config = models.read_config(path, dtype=dtype, max_model_len=max_model_len, source=source)
    return fill(models.create(config), source)


def fill(module: nn.Module, source: WeightSource, mapping: models.Naming | None = None) -> nn.Module:
    """Give a module on the meta device its weights, by its recipes. Returns it."""
    constants = models.constants(module)
    recipes = models.weight_recipes(module, source=source, mapping=mapping)
    weights = {name: evaluate(recipe, source) for name, recipe in recipes.items() if name not in constants}
    module.load_state_dict(weights, assign=True)
    return module


@torch.no_grad()
def our_logits(module: nn.Module, token_ids: list[int] | Tensor) -> Tensor:
    """logits_TV of one sequence from position 0, float32."""
    ids = torch.as_tensor(token_ids)
    return module(ids, torch.arange(len(ids))).float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())
