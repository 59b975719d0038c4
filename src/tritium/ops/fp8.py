"""Linears in fp8 (e4m3): rows of activations with a scale each, rows of weights with a scale each. References.

A row x becomes x / s rounded to e4m3, s = max|x| / 448 in fp32: e4m3's largest number is 448. Passes make these ops;
the fused ones equal their parts one after the other, but that the row is quantised before it is rounded to its dtype.
"""

import torch

from tritium.ops.activations import activation
from tritium.ops.norms import layer_norm
from tritium.ops.op import Op

LARGEST = 448.0
SMALLEST_ROW = 1e-12  # the largest element that a row's scale assumes at least: rows of zeros stay zeros
FP8 = torch.float8_e4m3fn
Pair = tuple[torch.Tensor, torch.Tensor]


def quantize_fp8(x: torch.Tensor) -> Pair:
    """The rows of x [T, K] in e4m3, and their scales in fp32, [T, 1]."""
    h = x.to(torch.float32)
    scales = h.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW) / LARGEST
    return (h / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


def linear_fp8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight_NK: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
) -> torch.Tensor:
    """`x @ weight_NK.T` with fp32 sums, times x_scales [T, 1] and weight_scales [1, N], plus bias, in `dtype`."""
    sums = x.to(torch.float32) @ weight_NK.to(torch.float32).t() * x_scales * weight_scales
    return (sums if bias is None else sums + bias.to(torch.float32)).to(getattr(torch, dtype))


def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, cast_before_weight: bool
) -> Pair:
    """`quantize_fp8(rms_norm(x, ...))`."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    h = h.to(x.dtype).to(torch.float32) if cast_before_weight else h
    return quantize_fp8(h * (weight.to(torch.float32) + weight_offset))


def add_rms_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_fp8(rms_norm(x + residual, ...))`, and the sum itself, rounded to x's dtype."""
    total = x + residual
    return *rms_norm_fp8(total, weight, eps, weight_offset, cast_before_weight), total


def gated_activation_fp8(gate: torch.Tensor, up: torch.Tensor, kind: str) -> Pair:
    """`quantize_fp8(gated_activation(gate, up, kind))`."""
    return quantize_fp8(activation(gate, kind).to(torch.float32) * up.to(torch.float32))


def activation_fp8(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> Pair:
    """`quantize_fp8(activation(x + bias, kind))`, the sum in fp32."""
    h = x.to(torch.float32)
    return quantize_fp8(activation(h if bias is None else h + bias.to(torch.float32), kind))


def add_layer_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_fp8(layer_norm(x + residual + x_bias, weight, bias, eps))`, and the sum, rounded once to x's dtype."""
    total = x.to(torch.float32) + residual.to(torch.float32)
    total = (total if x_bias is None else total + x_bias.to(torch.float32)).to(x.dtype)
    bias = None if bias is None else bias.to(torch.float32)
    return *quantize_fp8(layer_norm(total.to(torch.float32), weight.to(torch.float32), bias, eps)), total


def _quantized(x: torch.Tensor, *_: object) -> Pair:
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=FP8, device=x.device), scales


def _quantized_and_sum(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_quantized(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _linear_shape(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight_NK: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: object,
    dtype: str,
) -> torch.Tensor:
    return torch.empty((x.shape[0], weight_NK.shape[0]), dtype=getattr(torch, dtype), device=x.device)


_NORM = "float eps, float weight_offset, bool cast_before_weight"
_LINEAR = "Tensor x, Tensor x_scales, Tensor weight_NK, Tensor weight_scales, Tensor? bias, str dtype"
_ADD_LAYER_NORM = "Tensor x, Tensor residual, Tensor? x_bias, Tensor weight, Tensor? bias, float eps"
_RESULTS = {_quantized: "(Tensor, Tensor)", _quantized_and_sum: "(Tensor, Tensor, Tensor)", _linear_shape: "Tensor"}

FP8_OPS = tuple(
    Op(
        name=reference.__name__,
        schema=f"{reference.__name__}({arguments}) -> {_RESULTS[fake]}",
        reference=reference,
        fake=fake,
        is_fused=True,
    )
    for reference, arguments, fake in (
        (quantize_fp8, "Tensor x", _quantized),
        (linear_fp8, _LINEAR, _linear_shape),
        (rms_norm_fp8, f"Tensor x, Tensor weight, {_NORM}", _quantized),
        (add_rms_norm_fp8, f"Tensor x, Tensor residual, Tensor weight, {_NORM}", _quantized_and_sum),
        (gated_activation_fp8, "Tensor gate, Tensor up, str kind", _quantized),
        (activation_fp8, "Tensor x, Tensor? bias, str kind", _quantized),
        (add_layer_norm_fp8, _ADD_LAYER_NORM, _quantized_and_sum),
    )
)
