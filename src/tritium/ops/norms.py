"""rms_norm, layer_norm: references and spellings."""

import torch
import torch.nn.functional as F

from tritium.ops.op import Op, Spelling, like_first


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps)` over the last dimension, times `weight + weight_offset`. Like x.

    cast_before_weight: cast to x's dtype, then multiply in it (Llama); else multiply in fp32 and cast once (Gemma).
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        return h.to(x.dtype) * (weight + weight_offset if weight_offset else weight)
    return (h * (weight.to(torch.float32) + weight_offset)).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension, in fp32, cast once. Like x."""
    fp32_bias = None if bias is None else bias.to(torch.float32)
    h = F.layer_norm(x.to(torch.float32), (x.shape[-1],), weight.to(torch.float32), fp32_bias, eps)
    return h.to(x.dtype)


def _x_weight(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(8, 48, dtype=dtype), torch.randn(48, dtype=dtype)


def _x_weight_bias(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return *_x_weight(dtype), torch.randn(48, dtype=dtype)


def _pow(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _square(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _weight_in_fp32(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h).to(x.dtype)


def _one_plus_weight(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


def _functional(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _divide(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


_EPS = {"eps": 1.2345e-5}
_AFTER = {"cast_before_weight": False}

RMS_NORM = Op(
    name="rms_norm",
    schema="rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0, bool cast_before_weight=True) "
    "-> Tensor",
    reference=rms_norm,
    fake=like_first,
    spellings=(
        Spelling(name="pow", fn=_pow, example=_x_weight, attributes=_EPS),
        Spelling(name="multiply", fn=_multiply, example=_x_weight, attributes=_EPS),
        Spelling(name="square", fn=_square, example=_x_weight, attributes=_EPS),
        Spelling(name="weight_in_fp32", fn=_weight_in_fp32, example=_x_weight, attributes=_EPS, binds=_AFTER),
        Spelling(
            name="one_plus_weight",
            fn=_one_plus_weight,
            example=_x_weight,
            attributes=_EPS,
            binds={"weight_offset": 1.0, "cast_before_weight": False},
        ),
        Spelling(name="functional", fn=_functional, example=_x_weight, attributes=_EPS, binds=_AFTER),
        Spelling(name="divide", fn=_divide, example=_x_weight, attributes=_EPS, bound=2.0),
    ),
)


def _layer_norm_functional(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _layer_norm_no_bias(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


# In bf16 torch's kernel takes mean and variance in another order than in fp32: with torch 2.11 and 2.13 one element in
# 10,000 to 70,000, by size, is rounded to the other neighbour. The values before lay within 0.5 eps of fp32.
LAYER_NORM = Op(
    name="layer_norm",
    schema="layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    reference=layer_norm,
    fake=like_first,
    spellings=(
        Spelling(name="functional", fn=_layer_norm_functional, example=_x_weight_bias, attributes=_EPS, fp32_bound=1.0),
        Spelling(
            name="no_bias",
            fn=_layer_norm_no_bias,
            example=_x_weight,
            attributes=_EPS,
            binds={"bias": None},
            fp32_bound=1.0,
        ),
    ),
)
