"""What the readers of several families share."""

from collections.abc import Mapping, Sequence
from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.hf_fields import Fields
from tritium.models.hf_rope import read_rope


def heads_size(fields: Fields, hidden: int, heads: int) -> int:
    """The head size when config.json does not say it."""
    if hidden % heads:
        raise fields.error("num_attention_heads" if "num_attention_heads" in fields.data else "n_head",
                           f"is {heads}, which does not divide the hidden size {hidden}")  # fmt: skip
    return hidden // heads


def llama_like(
    fields: Fields,
    *,
    kv_heads: int | None,
    max_positions: int,
    head_size: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    rotated_part: float | None = None,
    rope_theta: float = 10_000.0,
    rope_types: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What Llama and its successors share. The keywords are transformers' defaults for absent fields."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    if head_size is None or "head_dim" in fields.data:
        head_size = fields.optional_integer("head_dim", high=1 << 14) or heads_size(fields, hidden, heads)
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
        "rope": read_rope(
            fields, head_size, max_positions, rotated_part=rotated_part, theta=rope_theta, renamed=rope_types
        ),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
    }


def layer_types(fields: Fields, window: int, layers: int, default: Sequence[int]) -> tuple[int, ...]:
    """Each layer's window: by `layer_types` when there is one, else `default`."""
    types = fields.get("layer_types", default=None)[1]
    if types is None:
        return tuple(default)
    allowed = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(types, list) or len(types) != layers or any(kind not in allowed for kind in types):
        expected = f"{layers} times {' or '.join(map(repr, allowed))}"
        raise fields.error("layer_types", f"is {str(types)[:200]}, expected {expected} (sliding window: {window})")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
