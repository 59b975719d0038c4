"""Linears in int8 for GPUs: rows of activations with a scale each, rows of weights with a scale each. References.

As `ops.quantized` with int8 activations, but that rows are quantised by an op of their own, or by the one before them.
"""

import torch

from tritium.ops.fused_rows import Pair, linear_op, row_ops, scaled, with_nan_rows
from tritium.ops.quantized import quantize_rows


def quantize_int8(x: torch.Tensor, scale: torch.Tensor | None = None) -> Pair:
    """The rows of x [T, K] in int8, and their scales in fp32, [T, 1]; see `ops.quantized.quantize_rows`. scale: fp32
    [1], for all rows in their place: a row that holds an infinity or a NaN has the scale NaN then, too."""
    if scale is None:
        return quantize_rows(x)
    h = x.to(torch.float32)
    scales = with_nan_rows(scale, h)
    return (torch.where(scales.isfinite(), h, 0.0) / scale).round().clamp(-127, 127).to(torch.int8), scales


def linear_int8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight_NK: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
) -> torch.Tensor:
    """`x @ weight_NK.T`, exact, times x_scales [T, 1] and weight_scales [1, N] in fp32, plus bias, in `dtype`."""
    sums = (x.double() @ weight_NK.double().t()).float()  # in fp64 they are exact
    return scaled(sums, x_scales, weight_scales, bias, dtype)


INT8_OPS = (*row_ops("int8", torch.int8, quantize_int8), linear_op("int8", linear_int8))
