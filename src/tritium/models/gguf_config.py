"""The configuration of a GGUF file: its metadata as the fields of a config.json, which `parse_config` then reads."""

from typing import Any

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.models.config import ModelConfig
from tritium.models.hf_config import CONFIG_FILE, parse_config, read_config
from tritium.weights.gguf_source import ROPE_FACTORS, GgufSource

MAX_SIZE = 1 << 24
QUANTISED_DTYPE = "bfloat16"  # what a model whose weights are of block types is computed in


def read_gguf_config(source: GgufSource, *, dtype: str = "auto", max_model_len: int | None = None) -> ModelConfig:
    """The configuration that a config.json beside the file says, else the file's own metadata.

    Raises `CheckpointError` for a field that cannot be, `UnsupportedModel` for what metadata does not say in full.
    """
    if (source.path.parent / CONFIG_FILE).is_file():
        return read_config(source.path.parent, dtype=dtype, max_model_len=max_model_len, source=source)
    if source.has_rope_factors:
        raise UnsupportedModel(
            f"{source.path}: has tensor {ROPE_FACTORS!r}, the factors of a RoPE scaling whose parameters the file "
            "does not say: put the config.json that the model was published with beside it"
        )
    return parse_config(_fields(source), str(source.path), dtype=dtype, max_model_len=max_model_len)


def gguf_special_tokens(source: GgufSource) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos ids, as far as the file says them."""
    found = [source.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
    bos, eos = (value if type(value) is int and 0 <= value < MAX_SIZE else None for value in found)
    return bos, () if eos is None else (eos,)


def _fields(source: GgufSource) -> dict[str, Any]:
    embedding = source.spec("model.embed_tokens.weight").shape
    if len(embedding) != 2:
        raise CheckpointError(f"{source.path}: the embedding is {list(embedding)}, expected [vocabulary, hidden size]")
    hidden = source.number("embedding_length", 1, MAX_SIZE)
    heads = source.number("attention.head_count", 1, 1 << 16)
    head_size = source.number("attention.key_length", 1, 1 << 16, default=hidden // heads)
    rotated = source.number("rope.dimension_count", 1, 1 << 16, default=head_size)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "num_hidden_layers": source.number("block_count", 1, 1 << 16),
        "intermediate_size": source.number("feed_forward_length", 1, MAX_SIZE),
        "num_attention_heads": heads,
        "num_key_value_heads": source.number("attention.head_count_kv", 1, 1 << 16, default=heads),
        "head_dim": head_size,
        "max_position_embeddings": source.number("context_length", 1, MAX_SIZE),
        "rms_norm_eps": source.field("attention.layer_norm_rms_epsilon"),
        "rope_theta": source.field("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "lm_head.weight" not in source.names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source.names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in source.names,
        "hidden_act": "silu",
        "torch_dtype": _dtype(source),
    }
    if rotated != head_size:
        raise UnsupportedModel(f"{source.path}: rope.dimension_count is {rotated}, but a head has {head_size}")
    kind = source.field("rope.scaling.type", "none")
    if kind == "linear":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": source.field("rope.scaling.factor")}
    elif kind != "none":
        raise UnsupportedModel(
            f"{source.path}: rope.scaling.type is {kind!r:.60}; 'linear' is read from metadata: put the config.json "
            "that the model was published with beside the file"
        )
    return fields


def _dtype(source: GgufSource) -> str:
    """Of the matrices, when they are in one that torch has."""
    kinds = {tensor.type.dtype for tensor in source.tensors.values() if len(tensor.shape) == 2}
    return QUANTISED_DTYPE if None in kinds or len(kinds) != 1 else str(*kinds)
