"""Linears in fp8 (e4m3): rows of activations with a scale each, rows of weights with a scale each. References.

A row x becomes x / s rounded to e4m3, s = max|x| / 448 in fp32: e4m3's largest number is 448.
"""

import torch

from tritium.ops.fused_rows import Pair, linear_op, row_ops, scaled, with_nan_rows

LARGEST = 448.0
SMALLEST_ROW = 1e-12  # the largest element that a row's scale assumes at least: rows of zeros stay zeros
FP8 = torch.float8_e4m3fn


def quantize_fp8(x: torch.Tensor, scale: torch.Tensor | None = None) -> Pair:
    """The rows of x [T, K] in e4m3, and their scales in fp32, [T, 1]. scale: fp32 [1], for all rows in their place; a
    row that holds an infinity or a NaN has the scale NaN then, too."""
    h = x.to(torch.float32)
    if scale is None:
        scales = h.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW) / LARGEST
    else:
        scales = with_nan_rows(scale, h)
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
    sums = x.to(torch.float32) @ weight_NK.to(torch.float32).t()
    return scaled(sums, x_scales, weight_scales, bias, dtype)


FP8_OPS = (*row_ops("fp8", FP8, quantize_fp8), linear_op("fp8", linear_fp8))
