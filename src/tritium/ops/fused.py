"""Ops that passes make of others: a norm of a sum, rope_kv_store, linears with what follows. References and spellings.

Each equals the ops it stands for, one after the other, bit for bit, but for linear_pair, which rounds less often; it
saves a launch and a pass over memory.
"""

import torch

from tritium.ops.activations import activation, gated_activation
from tritium.ops.attention import kv_store
from tritium.ops.linears import linear
from tritium.ops.norms import layer_norm, rms_norm
from tritium.ops.op import Op, Spelling
from tritium.ops.rope import rope

Pair = tuple[torch.Tensor, torch.Tensor]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> Pair:
    """`rms_norm(x + residual, ...)`, and the sum itself, rounded to x's dtype. Both like x."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset, cast_before_weight), total


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Pair:
    """`layer_norm(x + residual, ...)`, and the sum itself, rounded to x's dtype. Both like x."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rope_kv_store(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cos_sin: torch.Tensor,
    cache_layer: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """`kv_store(rope(k), v, ...)`, and the result: `rope(q)`, like q."""
    kv_store(rope(k_TKH, cos_sin, interleaved), v_TKH, cache_layer, slot_mapping_T)
    return rope(q_TNH, cos_sin, interleaved)


def linear_activation(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """`activation(linear(x, weight, bias), kind)`: [..., K] -> [..., N]."""
    return activation(linear(x, weight_NK, bias), kind)


def linear_gated(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """`gated_activation(gate, up, kind)` of the two halves of `linear(x, weight, bias)`: [..., K] -> [..., N / 2]."""
    gate, up = linear(x, weight_NK, bias).chunk(2, dim=-1)
    return gated_activation(gate, up, kind)


def linear_add(
    x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`linear(x, weight, bias) + residual`, both rounded: [..., K] -> [..., N], like the residual."""
    return linear(x, weight_NK, bias) + residual


def linear_pair(x: torch.Tensor, y: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` of x [..., K1] and y [..., K2] side by side, K = K1 + K2: [..., N], one sum over K, rounded once."""
    return linear(torch.cat((x, y), -1), weight_NK, bias)


def _pair_shape(x: torch.Tensor, y: torch.Tensor, weight_NK: torch.Tensor, *_: object) -> torch.Tensor:
    return _activated_shape(x, weight_NK)


def _activated_shape(x: torch.Tensor, weight_NK: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], weight_NK.shape[0]), dtype=x.dtype, device=x.device)


def _gated_shape(x: torch.Tensor, weight_NK: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], weight_NK.shape[0] // 2), dtype=x.dtype, device=x.device)


def _two_like_first(x: torch.Tensor, *_: object, **__: object) -> Pair:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _one_like_first(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _x_residual_weight(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return *(torch.randn(8, 48, dtype=dtype) for _ in range(2)), torch.randn(48, dtype=dtype)


def _x_residual_weight_bias(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return *_x_residual_weight(dtype), torch.randn(48, dtype=dtype)


def _rms(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float) -> Pair:
    total = x + residual
    return torch.ops.tritium.rms_norm(total, weight, eps, weight_offset, True), total


def _rms_cast_after(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float
) -> Pair:
    total = x + residual
    return torch.ops.tritium.rms_norm(total, weight, eps, weight_offset, False), total


def _layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> Pair:
    total = x + residual
    return torch.ops.tritium.layer_norm(total, weight, bias, eps), total


def _layer_no_bias(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float) -> Pair:
    total = x + residual
    return torch.ops.tritium.layer_norm(total, weight, None, eps), total


_EPS = {"eps": 1.2345e-5}
_RMS = {**_EPS, "weight_offset": 0.625}

ADD_RMS_NORM = Op(
    name="add_rms_norm",
    schema="add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset=0.0, "
    "bool cast_before_weight=True) -> (Tensor, Tensor)",
    reference=add_rms_norm,
    fake=_two_like_first,
    spellings=(
        Spelling(
            name="cast_before_weight",
            fn=_rms,
            example=_x_residual_weight,
            attributes=_RMS,
            binds={"cast_before_weight": True},
        ),
        Spelling(
            name="cast_after_weight",
            fn=_rms_cast_after,
            example=_x_residual_weight,
            attributes=_RMS,
            binds={"cast_before_weight": False},
        ),
    ),
    is_fused=True,
)
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    schema="add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    reference=add_layer_norm,
    fake=_two_like_first,
    spellings=(
        Spelling(name="bias", fn=_layer, example=_x_residual_weight_bias, attributes=_EPS),
        Spelling(name="no_bias", fn=_layer_no_bias, example=_x_residual_weight, attributes=_EPS, binds={"bias": None}),
    ),
    is_fused=True,
)
ROPE_KV_STORE = Op(
    name="rope_kv_store",
    schema="rope_kv_store(Tensor q_TNH, Tensor k_TKH, Tensor v_TKH, Tensor cos_sin, Tensor(a!) cache_layer, "
    "Tensor slot_mapping_T, bool interleaved=False) -> Tensor",
    reference=rope_kv_store,
    fake=_one_like_first,
    is_fused=True,
)
LINEAR_ACTIVATION = Op(
    name="linear_activation",
    schema="linear_activation(Tensor x, Tensor weight_NK, Tensor? bias, str kind) -> Tensor",
    reference=linear_activation,
    fake=_activated_shape,
    is_fused=True,
)
LINEAR_GATED = Op(
    name="linear_gated",
    schema="linear_gated(Tensor x, Tensor weight_NK, Tensor? bias, str kind) -> Tensor",
    reference=linear_gated,
    fake=_gated_shape,
    is_fused=True,
)
LINEAR_ADD = Op(
    name="linear_add",
    schema="linear_add(Tensor x, Tensor weight_NK, Tensor? bias, Tensor residual) -> Tensor",
    reference=linear_add,
    fake=_activated_shape,
    is_fused=True,
)
LINEAR_PAIR = Op(
    name="linear_pair",
    schema="linear_pair(Tensor x, Tensor y, Tensor weight_NK, Tensor? bias) -> Tensor",
    reference=linear_pair,
    fake=_pair_shape,
    is_fused=True,
)
