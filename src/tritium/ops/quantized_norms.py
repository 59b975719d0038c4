"""Norms that give their rows quantised, as `quantized_linear` takes them with int8 activations. References.

A row of K elements becomes K + 4 bytes: its integers, then its scale in fp32 (`ops.quantized.quantize_rows` of the norm
as it is rounded to its dtype), as in a KV cache in int8. So the bits are those of the norm and the linear behind it.
"""

from collections.abc import Callable

import torch

from tritium.ops.fused import add_layer_norm, add_rms_norm
from tritium.ops.norms import layer_norm, rms_norm
from tritium.ops.op import Op
from tritium.ops.quantized import SCALE_BYTES, rows_with_scales

_RMS = "float eps, float weight_offset=0.0, bool cast_before_weight=True"


def quantized_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> torch.Tensor:
    """The rows of `rms_norm(...)` in int8: [..., K] -> int8 [..., K + 4]."""
    return rows_with_scales(rms_norm(x, weight, eps, weight_offset, cast_before_weight))


def quantized_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The rows of `layer_norm(...)` in int8: [..., K] -> int8 [..., K + 4]."""
    return rows_with_scales(layer_norm(x, weight, bias, eps))


def quantized_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `add_rms_norm(...)` in int8, [..., K + 4], and the sum [..., K] in x's dtype."""
    norm, total = add_rms_norm(x, residual, weight, eps, weight_offset, cast_before_weight)
    return rows_with_scales(norm), total


def quantized_add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `add_layer_norm(...)` in int8, [..., K + 4], and the sum [..., K] in x's dtype."""
    norm, total = add_layer_norm(x, residual, weight, bias, eps)
    return rows_with_scales(norm), total


def _rows(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] + SCALE_BYTES), dtype=torch.int8, device=x.device)


def _rows_and_sum(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)


_FORMS: tuple[tuple[Callable[..., object], str, str, Callable[..., object]], ...] = (
    (quantized_rms_norm, f"Tensor x, Tensor weight, {_RMS}", "Tensor", _rows),
    (quantized_layer_norm, "Tensor x, Tensor weight, Tensor? bias, float eps", "Tensor", _rows),
    (quantized_add_rms_norm, f"Tensor x, Tensor residual, Tensor weight, {_RMS}", "(Tensor, Tensor)", _rows_and_sum),
    (
        quantized_add_layer_norm,
        "Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps",
        "(Tensor, Tensor)",
        _rows_and_sum,
    ),
)
QUANTIZED_NORMS = tuple(
    Op(
        name=reference.__name__,
        schema=f"{reference.__name__}({arguments}) -> {results}",
        reference=reference,
        fake=fake,
        is_fused=True,
    )
    for reference, arguments, results, fake in _FORMS
)
