"""SmoothQuant's and AWQ's vectors: by how much each channel is divided before linears, and their weights multiplied.

SmoothQuant (Xiao et al., 2022) moves what is large in activations into weights: s = max|x|^a / max|w|^(1 - a). AWQ (Lin
et al., 2023) makes weights large whose inputs are: s = mean|x|^a / mean|w|^(1 - a). For both, a is searched: of all
candidates, no smoothing among them, the one counts that gives the least error of the linears' outputs, with weights
(and activations, where the scheme has them in int8) quantised as they will be.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tritium.ops.quantized import dequantize_weight, quantize_rows
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import quantize_weight, scales_of

EXPONENTS = tuple(i / 10 for i in range(11))
MOST = 1e4  # of a factor, and its inverse
SAMPLE_ROWS = 512  # of the calibration's, evenly spread: what candidates are tried on
Smoothing = Literal["smoothquant", "awq"]


def smoothing_vector(
    x_TK: Tensor, weights: Sequence[tuple[Tensor, WeightFormat]], method: Smoothing, *, int8_activations: bool
) -> Tensor:
    """fp32 [K]. x_TK: what the linears read. weights: [N, K] of each, and how it will be kept. Deterministic."""
    sample = x_TK[:: max(1, len(x_TK) // SAMPLE_ROWS)]
    expected = [sample @ weight.t() for weight, _ in weights]
    best, least = torch.ones(x_TK.shape[1]), torch.inf
    for vector in (best, *_candidates(x_TK, [weight for weight, _ in weights], method)):
        rows = sample / vector
        if int8_activations:
            numbers, steps = quantize_rows(rows)
            rows = numbers.float() * steps
        error = 0.0
        for (weight, kept), wanted in zip(weights, expected, strict=True):
            error += float((rows @ rounded(weight * vector, kept).t() - wanted).square().sum())
        if error < least:
            best, least = vector, error
    return best


def rounded(weight_NK: Tensor, kept: WeightFormat, importance_K: Tensor | None = None) -> Tensor:
    """The weight as a format keeps it, in fp32."""
    scales = scales_of(weight_NK, kept, importance_K)
    return dequantize_weight(quantize_weight(weight_NK, scales, kept), scales)


def _candidates(x_TK: Tensor, weights: Sequence[Tensor], method: Smoothing) -> Iterator[Tensor]:
    joined = torch.cat(list(weights)).abs()
    if method == "smoothquant":
        inputs, columns = x_TK.abs().amax(0), joined.amax(0)
    else:
        inputs, columns = x_TK.abs().mean(0), joined.mean(0)
    is_used = (inputs > 0) & (columns > 0)
    inputs, columns = (torch.where(is_used, sizes, 1.0) for sizes in (inputs, columns))
    for exponent in EXPONENTS:
        vector = inputs**exponent / columns ** (1 - exponent)
        vector = vector / (vector.amax() * vector.amin()).sqrt()
        yield torch.where(is_used, vector.clamp(1 / MOST, MOST), 1.0)
