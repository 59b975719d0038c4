"""RoPE settings of a config.json: the old `rope_theta` + `rope_scaling` and the new `rope_parameters`."""

from collections.abc import Mapping
from typing import Any

from tritium.models.hf_fields import Fields
from tritium.models.rope_config import ROPE_TYPES, RopeConfig

RENAMED = {"su": "longrope in Phi-3", "mrope": "multimodal RoPE"}


def read_rope(
    fields: Fields,
    head_size: int,
    max_position_embeddings: int,
    *,
    rotated_part: float | None = None,
    theta: float = 10_000.0,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    renamed: Mapping[str, str] | None = None,
) -> RopeConfig:
    """The RoPE of a Llama-like model: halves of what is rotated against each other, all of a head unless said.

    rotated_part: for families that rotate the first part of a head, the default of that field.
    theta: the default base. names: of the two fields beside the RoPE object. renamed: types by other names.

    Precedence as in transformers: `rope_scaling` over `rope_parameters`; a `rope_theta` inside them over one beside
    them; `original_max_position_embeddings` beside them over one inside. Raises `UnsupportedModel` for a type without
    a formula here.
    """
    inner = (
        fields.section("rope_scaling")
        or fields.section("rope_parameters")
        or Fields({}, fields.where, "rope_parameters.")
    )
    theta = fields.number(names[0], low=1.0, default=theta)
    theta = inner.number("rope_theta", low=1.0, default=theta)
    name, kind = inner.get("rope_type", "type", default="default")
    kind = (renamed or {}).get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        also = f" ({RENAMED[kind]})" if isinstance(kind, str) and kind in RENAMED else ""
        known = f"this RoPE type{also} has no formula in Tritium; known types are {', '.join(ROPE_TYPES)}"
        raise inner.unsupported(name, kind, known)
    dim = _rotated(fields, inner, head_size, rotated_part, names[1])
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta)
    return RopeConfig(dim=dim, theta=theta, type=kind, **_scaling(fields, inner, kind, dim, max_position_embeddings))


def _rotated(fields: Fields, inner: Fields, head_size: int, rotated_part: float | None, name: str) -> int:
    """How many dimensions of a head are rotated."""
    if rotated_part is not None:
        holder, name = (inner, "partial_rotary_factor") if "partial_rotary_factor" in inner.data else (fields, name)
        rotated_part = holder.number(name, high=1.0, default=rotated_part)
        dim = int(head_size * rotated_part)
        if dim < 2 or dim % 2:
            problem = f"is {rotated_part:g}: {dim} dimensions of a head of {head_size} cannot be rotated in pairs"
            raise holder.error(name, problem)
        return dim
    for part in (fields, inner):
        part.refuse("partial_rotary_factor", (1, 1.0), "this family rotates whole heads")
    if head_size % 2:
        raise fields.error("head_dim", f"is {head_size}: an odd head cannot be rotated in pairs")
    return head_size


def _scaling(fields: Fields, inner: Fields, kind: str, dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """Keywords of RopeConfig for a type that scales."""
    original = inner.optional_integer("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        original = fields.optional_integer("original_max_position_embeddings") or original or max_position_embeddings
    if kind in ("yarn", "longrope"):
        factor = inner.optional_number("factor", low=0.01, high=1e6) or max_position_embeddings / (original or 1)
    else:
        factor = inner.number("factor", low=0.01, high=1e6)
    if kind == "dynamic" and dim < 4:
        raise fields.error("head_dim", f"leaves {dim} rotated dimensions: dynamic RoPE needs at least 4")
    low, high = 1.0, 4.0
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise inner.error("high_freq_factor", f"is {high:g}, expected more than low_freq_factor ({low:g})")
    fast, slow = (inner.optional_number(name, low=1e-6, high=1e6) for name in ("beta_fast", "beta_slow"))
    if kind == "longrope" and original == 1:
        raise inner.error("original_max_position_embeddings", "is 1: longrope divides by its logarithm")
    short, long = (
        _factors(inner, name, dim // 2) if kind == "longrope" else () for name in ("short_factor", "long_factor")
    )
    return {
        "factor": factor,
        "max_position_embeddings": max_position_embeddings,
        "original_max_position_embeddings": original or 0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "beta_fast": fast or 32.0,
        "beta_slow": slow or 1.0,
        "attention_factor": inner.optional_number("attention_factor", low=1e-6, high=1e6),
        "mscale": inner.optional_number("mscale", low=-1e-9, high=1e6),
        "mscale_all_dim": inner.optional_number("mscale_all_dim", low=-1e-9, high=1e6),
        "truncate": inner.boolean("truncate", default=True),
        "short_factors": short,
        "long_factors": long,
    }


def _factors(inner: Fields, name: str, count: int) -> tuple[float, ...]:
    """One number above 0 for each rotated pair."""
    values = inner.get(name)[1]
    is_list = isinstance(values, list) and len(values) == count
    if not is_list or any(isinstance(v, bool) or not isinstance(v, int | float) or not 1e-6 < v < 1e6 for v in values):
        raise inner.error(name, f"is {str(values)[:200]}, expected {count} numbers above 0, one for each rotated pair")
    return tuple(float(v) for v in values)
