"""Small random checkpoints, one per feature of every family, drawn so that every tensor matters.

A directory made here looks like a published one: config.json in the spelling of its time, safetensors (one file or
shards with an index), tied or untied, in any dtype. `transformers` (the test extra) says which tensors there are, reads
the same directory, and is the oracle.

Drawn: norm weights N(1, 0.3), biases N(0, 0.3), queries and keys large enough that attention is far from uniform, the
head so that logits have a standard deviation of about 3.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tritium import models
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_configs import TINY_MODELS as TINY_MODELS
from tritium.testing.tiny_tokenizers import byte_level_bpe, write_directory
from tritium.weights.recipes import evaluate
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import WeightSource

# Queries and keys: attention chooses. Outputs: layers outweigh the embedding. Both keep greedy decoding from repeating:
# 32 greedy tokens hold 16 to 26 different ones for the base row of each family (with gains of 1: 1 to 20).
GAINS = {
    **dict.fromkeys(("self_attn.out_proj", "fc2"), 1.0),  # OPT, else always the same token
    **dict.fromkeys(("q_proj", "k_proj", "c_attn", "qkv_proj", "query_key_value"), 3.0),
    **dict.fromkeys(("o_proj", "out_proj", "attn.c_proj", "attention.dense"), 6.0),
    **dict.fromkeys(("down_proj", "fc_out", "mlp.c_proj", "4h_to_h", ".w2."), 4.0),
    **dict.fromkeys(("moe.gate.", "mlp.gate."), 3.0),  # routers: unequal loads and weights
}

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings.")  # word_embeddings_layernorm is BLOOM's norm
POSITIONS = ("wpe", "embed_positions")
# Attention chooses. Gemma multiplies its embedding by sqrt(D), and no layer puts out more than its last norm does;
# BLOOM's embedding is normed.
NORM_GAINS = {"q_norm": 2.0, "k_norm": 2.0, "post_feedforward_layernorm": 10.0, "word_embeddings_layernorm": 0.3}


def make_checkpoint(
    path: str | Path,
    model: str | dict[str, Any] = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    num_shards: int = 1,
    is_other_spelling: bool = False,
) -> Path:
    """Write a model directory and return its path. `model`: a name of TINY_MODELS, or the contents of a config.json.

    dtype: of the stored tensors and in config.json. num_shards > 1: shards with an index.
    is_other_spelling: as some publications of the family are. GPT-2 and GPT-J with causal masks, GPT-2
        and BLOOM without `transformer.` in names; OPT without `model.`; GPT-NeoX's head by another name.
    """
    config = dict(TINY_MODELS[model] if isinstance(model, str) else model)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config["torch_dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config, indent=2))
    eos = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": config.get("eos_token_id")}
    (path / "generation_config.json").write_text(json.dumps(eos))
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in draw_tensors(path, seed).items()}
    if is_other_spelling:
        tensors = _other_spelling(tensors, config)
    write_tensors(path, tensors, num_shards)
    return path


def make_llama_with_tokenizer(path: str | Path, *, vocab_size: int = 400, **tokenizer_config: Any) -> Path:
    """A checkpoint of a tiny LLaMA with a byte-level BPE, whose end is <|end|>."""
    made = make_checkpoint(path, LLAMA | {"vocab_size": vocab_size})
    return write_directory(made, byte_level_bpe(vocab_size), {"eos_token": "<|end|>", **tokenizer_config})


def draw_tensors(path: str | Path, seed: int) -> dict[str, Tensor]:
    """Random float32 values for every tensor that transformers saves for the config.json in `path`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(model).items()}
    embedding = next(name for name in shapes if any(part in name for part in EMBEDDINGS))
    head = next((name for name in HEADS if name in shapes), embedding)
    is_conv1d = model.config.model_type == "gpt2"
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_linear = len(shape) == 2 and name != embedding and not any(part in name for part in POSITIONS)
        if len(shape) == 1:
            gain = next((gain for part, gain in NORM_GAINS.items() if part in name), 1.0)
            tensors[name] = gain * (0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif name == head:
            tensors[name] = noise * (3 * shape[1] ** -0.5)
        elif is_linear:
            fan_in = shape[0] if is_conv1d else shape[1]
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            tensors[name] = noise * (gain * fan_in**-0.5)
        else:
            tensors[name] = noise * (3.0 if "embed_positions" in name else 0.5)
    return tensors


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """A transformers model's tensors, under the names and in the form in which checkpoints of it are published."""
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: t for name, t in tensors.items() if not (model.config.tie_word_embeddings and name in HEADS)}


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
    """transformers' model of a directory, ready to run.

    Falcon's eager attention adds ALiBi twice (transformers 5.23), through the scores and through the mask.
    """
    is_alibi = json.loads((Path(path) / "config.json").read_text()).get("alibi", False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa" if is_alibi else "eager"
    )
    return model.eval()


def reference_tensor(model: Any, name: str) -> Tensor:
    """The part of transformers' model that the checkpoint's tensor `name` is: write to it to change the model."""
    if match := re.fullmatch(r"(.*\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight", name):
        layer, expert, part = match[1], int(match[2]), match[3]
        experts = model.get_submodule(f"{layer}.mlp.experts")
        if part in ("w2", "down_proj"):
            return experts.down_proj.data[expert]
        gate, up = experts.gate_up_proj.data[expert].chunk(2)
        return gate if part in ("w1", "gate_proj") else up
    return model.get_parameter(name.replace("embed_out", "lm_head").replace("block_sparse_moe", "mlp")).data


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


def _other_spelling(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    kind = config["model_type"]
    start, other = {
        "gpt2": ("transformer.", ""),
        "gptj": ("", ""),
        "opt": ("model.", ""),
        "bloom": ("transformer.", ""),
        "gpt_neox": ("embed_out", "lm_head"),
    }[kind]
    tensors = {other + n.removeprefix(start) if n.startswith(start) else n: tensor for n, tensor in tensors.items()}
    for layer in range(config["n_layer"] if kind in ("gpt2", "gptj") else 0):
        prefix, positions = "" if kind == "gpt2" else "transformer.", config["n_positions"]
        mask = torch.ones(positions, positions).tril()[None, None]
        tensors[f"{prefix}h.{layer}.attn.bias"] = mask if kind == "gpt2" else mask.to(torch.uint8)
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
