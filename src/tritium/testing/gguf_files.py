"""GGUF files of tiny Llamas, written by the `gguf` package (of the test extra)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    model_dir: Path,
    kind: str,
    *,
    fields: Mapping[str, Any] | None = None,
    tokens: Sequence[str] = ("<unk>", "<s>", "</s>"),
    rope_factors: bool = False,
) -> Path:
    """The Llama of a directory as a file, its matrices in `kind` (ggml's name of a type). Returns `path`.

    Q4_K and Q6_K, which the package cannot make, get random bytes with small scales. fields: in place of the model's.
    """
    config = json.loads((model_dir / "config.json").read_text())
    known = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    } | dict(fields or {})
    writer = gguf.GGUFWriter(path, known.pop("general.architecture", "llama"))
    for name, value in known.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    number = gguf.GGMLQuantizationType[kind]
    for index, (name, tensor) in enumerate(load_file(model_dir / "model.safetensors").items()):
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        rows = tensor if heads is None else _interleaved(tensor, config[heads])
        is_matrix = tensor.dim() == 2
        data = _encoded(rows.float().numpy(), number, index) if is_matrix else rows.float().numpy()
        writer.add_tensor(gguf_name(name), data, raw_dtype=number if is_matrix else None)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """A tensor's name in such a file."""
    base, _, leaf = name.rpartition(".")
    parts = base.split(".")
    if parts[:2] != ["model", "layers"]:
        return f"{NAMES[base]}.{leaf}"
    return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.{leaf}"


def gguf_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What the package reads from a file, in fp32, by the names and in the order of rows of these tensors."""
    reader = gguf.GGUFReader(path)
    read = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    heads = {part: int(reader.fields[f"llama.attention.head_count{end}"].contents()) for part, end in HEADS.items()}
    found = {}
    for name, tensor in tensors.items():
        values = torch.from_numpy(read[gguf_name(name)].copy()).view(tensor.shape)
        count = heads.get(name.split(".")[-2])
        found[name] = values if count is None else _halves(values, count)
    return found


HEADS = {"q_proj": "", "k_proj": "_kv"}


def _interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k as llama.cpp converts them: from two halves of a head to pairs."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _halves(rows: Tensor, num_heads: int) -> Tensor:
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _encoded(rows: np.ndarray, kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    if kind not in (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K):
        return gguf.quantize(rows, kind)
    draw = np.random.default_rng(seed)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (rows.size // size, num_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(4e-4).tobytes(), np.uint8)
    for start in (0, 2) if kind == gguf.GGMLQuantizationType.Q4_K else (208,):
        blocks[:, start : start + 2] = scale
    return blocks.reshape(rows.shape[0], -1)
