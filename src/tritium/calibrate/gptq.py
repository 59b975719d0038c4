"""GPTQ: round a weight one input after the other, and let the inputs that are left make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022. Inputs
stay in order, so that groups do; a group's scales are chosen when its turn comes, for the weights as they are by then.
"""

import torch
from torch import Tensor

from tritium.ops.quantized import kept_scales
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import DTYPES, quantize_weight, scales_of

DAMPING = 0.01  # of the mean of the diagonal: what the paper adds so that the inverse exists
BLOCK = 128  # inputs whose errors are collected before the rest of the weight is changed


def gptq(weight_NK: Tensor, moments_KK: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor]:
    """The numbers and scales of a weight. moments_KK: the sum of x xᵀ over calibration rows, fp32.

    With 4 bits an output's scales count as steps of its largest (`ops.quantized.steps_of`), which is known at the end
    only: a second round takes the scales that the first has found, as they count.
    """
    numbers, scales = _round(weight_NK, moments_KK, weight_format, None)
    return (numbers, scales) if weight_format.bits == 8 else _round(weight_NK, moments_KK, weight_format, scales)


def _round(
    weight_NK: Tensor, moments_KK: Tensor, weight_format: WeightFormat, found: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One round. found: scales to take; None: each group's are chosen when its turn comes."""
    weight = weight_NK.float().clone()
    num_out, num_in = weight.shape
    inverse, importance = _inverse_factor(moments_KK), moments_KK.diagonal()
    weight[:, importance == 0] = 0  # inputs that are always zero
    size = weight_format.group_size
    block = size * max(1, BLOCK // size) if size else BLOCK  # whole groups
    scales, rounded = scales_of(weight, weight_format) if found is None else found, torch.empty_like(weight)
    counted = kept_scales(DTYPES[weight_format.kind], scales) if found is not None else scales
    for start in range(0, num_in, block):
        stop = min(start + block, num_in)
        errors = torch.empty(num_out, stop - start)
        for k in range(start, stop):
            group = k // size if size else 0
            if found is None and size and k % size == 0:
                inputs = slice(k, k + size)
                scales[:, group : group + 1] = scales_of(weight[:, inputs], weight_format, importance[inputs])
            rounded[:, k] = _nearest(weight[:, k], counted[:, group].float(), weight_format)
            errors[:, k - start] = error = (weight[:, k] - rounded[:, k]) / inverse[k, k]
            weight[:, k + 1 : stop] -= error[:, None] * inverse[k, k + 1 : stop]
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return quantize_weight(rounded, scales, weight_format), scales


def _nearest(column: Tensor, steps: Tensor, weight_format: WeightFormat) -> Tensor:
    """The representable number nearest to each weight, in fp32."""
    low, high = (-127, 127) if weight_format.bits == 8 else (-8, 7)
    inverse = torch.where(steps == 0, 0.0, 1.0 / steps)
    return (column * inverse).round().clamp(low, high) * steps


def _inverse_factor(moments_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments."""
    moments = moments_KK.to(torch.float64, copy=True)
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1
    damping = DAMPING * diagonal.mean()
    for _ in range(8):  # moments of few rows may need more
        factor, info = torch.linalg.cholesky_ex(moments + damping * torch.eye(len(moments), dtype=torch.float64))
        if not int(info):
            break
        damping = damping * 10
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float()
