"""RoPE settings of a config.json: the old `rope_theta` + `rope_scaling` and the new `rope_parameters`."""

from tritium.models.config import ROPE_TYPES, RopeConfig
from tritium.models.hf_fields import Fields

RENAMED = {"su": "longrope", "mrope": "multimodal RoPE"}


def read_rope(
    fields: Fields, head_size: int, max_position_embeddings: int, *, rotated_part: float | None = None
) -> RopeConfig:
    """The RoPE of a Llama-like model: all of each head is rotated, halves against each other.

    rotated_part: for families that rotate the first part of a head, the default of `partial_rotary_factor`.

    Precedence as in transformers: `rope_scaling` over `rope_parameters`; a `rope_theta` inside them over one beside
    them; `original_max_position_embeddings` beside them over one inside. Raises `UnsupportedModel` for a type without
    a formula here.
    """
    inner = (
        fields.section("rope_scaling")
        or fields.section("rope_parameters")
        or Fields({}, fields.where, "rope_parameters.")
    )
    outer_theta = fields.number("rope_theta", default=10_000.0)
    name, kind = inner.get("rope_type", "type", default="default")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        also = f" ({RENAMED[kind]})" if isinstance(kind, str) and kind in RENAMED else ""
        known = f"this RoPE type{also} has no formula in Tritium; known types are {', '.join(ROPE_TYPES)}"
        raise inner.unsupported(name, kind, known)
    if rotated_part is not None:
        holder = inner if "partial_rotary_factor" in inner.data else fields
        rotated_part = holder.number("partial_rotary_factor", high=1.0, default=rotated_part)
        dim = int(head_size * rotated_part)
        if dim < 2 or dim % 2:
            problem = f"is {rotated_part:g}: {dim} dimensions of a head of {head_size} cannot be rotated in pairs"
            raise holder.error("partial_rotary_factor", problem)
        if kind != "default":
            raise inner.unsupported(name, kind, "families that rotate part of a head have no scaled RoPE in Tritium")
        return RopeConfig(dim=dim, theta=inner.number("rope_theta", low=1.0, default=outer_theta))
    for part in (fields, inner):
        part.refuse("partial_rotary_factor", (1, 1.0), "this family rotates whole heads")
    if head_size % 2:
        raise fields.error("head_dim", f"is {head_size}: an odd head cannot be rotated in pairs")
    theta = inner.number("rope_theta", low=1.0, default=outer_theta)
    if kind == "default":
        return RopeConfig(dim=head_size, theta=theta)
    original = inner.optional_integer("original_max_position_embeddings")
    if kind in ("llama3", "yarn"):
        original = fields.optional_integer("original_max_position_embeddings") or original or max_position_embeddings
    if kind == "yarn":
        factor = inner.optional_number("factor", low=0.01, high=1e6) or max_position_embeddings / (original or 1)
    else:
        factor = inner.number("factor", low=0.01, high=1e6)
    if kind == "dynamic" and head_size < 4:
        raise fields.error("head_dim", f"is {head_size}: dynamic RoPE needs at least 4")
    low, high = 1.0, 4.0
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise inner.error("high_freq_factor", f"is {high:g}, expected more than low_freq_factor ({low:g})")
    fast, slow = (inner.optional_number(name, low=1e-6, high=1e6) for name in ("beta_fast", "beta_slow"))
    return RopeConfig(
        dim=head_size,
        theta=theta,
        type=kind,
        factor=factor,
        max_position_embeddings=max_position_embeddings,
        original_max_position_embeddings=original or 0,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=fast or 32.0,
        beta_slow=slow or 1.0,
        attention_factor=inner.optional_number("attention_factor", low=1e-6, high=1e6),
        mscale=inner.optional_number("mscale", low=-1e-9, high=1e6),
        mscale_all_dim=inner.optional_number("mscale_all_dim", low=-1e-9, high=1e6),
        truncate=inner.boolean("truncate", default=True),
    )
