"""quantized_linear, alone, with an activation or a residual: a linear of a weight kept in 8 or 4 bits;
quantized_embedding: rows of a table kept in 8. References.

Sizes: N outputs, K inputs, G groups of K / G inputs each. A weight is `q * scale`, q a signed integer:

    qweight   int8 [N, K], q itself; or uint8 [N, K / 2], two q + 8 a byte, the one of even k in the low four bits
    scales_NG of any floating dtype; G = 1: one scale per output. With two q a byte an output's scales count as whole
              steps of its largest one's 2048th part (`steps_of`): then sums over all groups are sums of integers
"""

from typing import Any

import torch
import torch.nn.functional as F

from tritium.ops.activations import activation, gated_activation
from tritium.ops.op import Op

TINY = 1e-30  # a row whose largest element is smaller counts as zero: 127 / max would not be finite


def unpack_weight(qweight: torch.Tensor) -> torch.Tensor:
    """The integers of a weight: int8 [N, K]."""
    if qweight.dtype == torch.int8:
        return qweight
    halves = torch.stack((qweight & 15, qweight >> 4), -1).flatten(-2)
    return halves.to(torch.int8) - 8


MOST_STEPS = 2048  # times 8 it fits 16 bits; a power of two: the largest scale stays as it is


def steps_of(scales_NG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as units_N1 times steps_NG, both fp32, steps whole numbers up to `MOST_STEPS`, halves to even.

    The largest magnitude of an output is MOST_STEPS; where it is under `TINY`, all are 0; where it is not finite the
    unit is NaN.
    """
    scales_NG = scales_NG.float()
    largest = scales_NG.abs().amax(1, keepdim=True)
    is_finite = largest.isfinite()
    quotient = torch.full_like(largest, float(MOST_STEPS)) / largest
    inverse = torch.where(is_finite & (largest >= TINY), quotient, 0.0)
    units = torch.where(is_finite, largest * (1.0 / MOST_STEPS), torch.nan)
    return units, (torch.where(is_finite, scales_NG, 0.0) * inverse).round()


def kept_scales(qweight_dtype: torch.dtype, scales_NG: torch.Tensor) -> torch.Tensor:
    """What integers of that dtype are multiplied by, fp32 [N, G]: whole steps where two lie in a byte."""
    if qweight_dtype != torch.uint8:
        return scales_NG.float()
    units_N1, steps_NG = steps_of(scales_NG)
    return steps_NG * units_N1


def dequantize_weight(qweight: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """The weight in float32 [N, K]."""
    scales_NG = kept_scales(qweight.dtype, scales_NG)
    return (unpack_weight(qweight).float().unflatten(1, (scales_NG.shape[1], -1)) * scales_NG[..., None]).flatten(1)


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as int8 by its largest element: round(x * 127 / max), halves to even; and its scale max / 127, [M, 1].

    A row that holds an infinity or a NaN is zeros with the scale NaN.
    """
    x_MK = x_MK.float()
    largest = x_MK.abs().amax(-1, keepdim=True)
    is_finite = largest.isfinite()
    quotient = torch.full_like(largest, 127.0) / largest  # a plain 127 / largest is 127 * (1 / largest)
    inverse = torch.where(is_finite & (largest >= TINY), quotient, 0.0)
    rows = torch.where(is_finite, x_MK, 0.0)
    scale = torch.where(is_finite, largest * torch.tensor(1.0 / 127.0, dtype=torch.float32), torch.nan)
    return (rows * inverse).round().to(torch.int8), scale


SCALE_BYTES = 4  # a row's scale in fp32, behind its integers


def rows_with_scales(x: torch.Tensor) -> torch.Tensor:
    """`quantize_rows` of x [..., K] as one tensor, int8 [..., K + 4]: the integers, then the scale's bytes."""
    integers, scales = quantize_rows(x)
    return torch.cat((integers, scales.contiguous().view(torch.int8)), -1)


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [M, K] and scales [M, 1] of x [..., K], or of what `rows_with_scales` has made of it."""
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.int8:
        return quantize_rows(rows)
    return rows[:, :-SCALE_BYTES], rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    dtype: str = "",
) -> torch.Tensor:
    """`x @ weight.T + bias` with the weight's integers: [..., K] -> [..., N], computed in fp32, rounded once.

    int8_activations: rows of x become int8 (`quantize_rows`), or are it: int8 [..., K + 4] (`rows_with_scales`) and
    `dtype` is that of the result, else x's. Products of integers, and of steps where the weight has
    them, are summed exactly; the sum is rounded to fp32 and multiplied by the unit, then by the row's scale. (With
    several groups and no steps, each group's sum is rounded, and multiplied by its scale.) Every implementation gives
    the same bits. Without it x is taken as it is.
    """
    if not int8_activations:
        weight = dequantize_weight(qweight, scales_NG)
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    weight_NK, q_MK, row_scale = unpack_weight(qweight).double(), *_rows_of(x)
    units_NG = scales_NG.float()
    if qweight.dtype == torch.uint8:
        units_NG, steps_NG = steps_of(scales_NG)
        weight_NK = weight_NK * steps_NG.double().repeat_interleave(weight_NK.shape[1] // steps_NG.shape[1], dim=1)
    total = torch.zeros(q_MK.shape[0], weight_NK.shape[0], dtype=torch.float32, device=x.device)
    num_groups = units_NG.shape[1]
    for g, (q, weight) in enumerate(zip(q_MK.chunk(num_groups, 1), weight_NK.chunk(num_groups, 1), strict=True)):
        total += (q.double() @ weight.t()).float() * units_NG[:, g]  # in fp64 the sums are exact
    out = total * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(_dtype_of(x, dtype)).reshape(*x.shape[:-1], -1)


def _dtype_of(x: torch.Tensor, dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype) if dtype else x.dtype
    return found


def quantized_linear_activation(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    kind: str,
    dtype: str = "",
) -> torch.Tensor:
    """`activation(quantized_linear(...), kind)`: [..., K] -> [..., N]."""
    return activation(quantized_linear(x, qweight, scales_NG, bias, int8_activations, dtype), kind)


def quantized_linear_gated(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    kind: str,
    dtype: str = "",
) -> torch.Tensor:
    """`gated_activation(gate, up, kind)` of the two halves of `quantized_linear(...)`: [..., K] -> [..., N / 2]."""
    gate, up = quantized_linear(x, qweight, scales_NG, bias, int8_activations, dtype).chunk(2, dim=-1)
    return gated_activation(gate, up, kind)


def quantized_linear_add(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    residual: torch.Tensor,
    dtype: str = "",
) -> torch.Tensor:
    """`quantized_linear(...) + residual`, both rounded: [..., K] -> [..., N], like the residual."""
    return quantized_linear(x, qweight, scales_NG, bias, int8_activations, dtype) + residual


def quantized_embedding(
    ids_T: torch.Tensor, qweight_VD: torch.Tensor, scales_V1: torch.Tensor, dtype: str
) -> torch.Tensor:
    """Rows of a table kept in int8, each times its scale in fp32, rounded to `dtype`: [T, D]."""
    rows_TD = F.embedding(ids_T, qweight_VD).float() * F.embedding(ids_T, scales_V1)
    return rows_TD.to(getattr(torch, dtype))


def _embedding_shape(ids_T: torch.Tensor, qweight_VD: torch.Tensor, _: object, dtype: str) -> torch.Tensor:
    return torch.empty((*ids_T.shape, qweight_VD.shape[1]), dtype=getattr(torch, dtype), device=ids_T.device)


def _shape(x: torch.Tensor, qweight: torch.Tensor, _: object, __: object, ___: object, dtype: str = "") -> torch.Tensor:
    return torch.empty((*x.shape[:-1], qweight.shape[0]), dtype=_dtype_of(x, dtype), device=x.device)


def _shape_of_more(x: torch.Tensor, qweight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _shape(x, qweight, *rest[:3], *rest[4:])  # without a kind or a residual


def _gated_shape(x: torch.Tensor, qweight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _shape_of_more(x, qweight[::2], *rest)


_ARGS = "Tensor x, Tensor qweight, Tensor scales_NG, Tensor? bias, bool int8_activations"
QUANTIZED_OPS = tuple(
    Op(
        name=reference.__name__,
        schema=f"{reference.__name__}({arguments}, str dtype='') -> Tensor",
        reference=reference,
        fake=fake,
    )
    for reference, arguments, fake in (
        (quantized_linear, _ARGS, _shape),
        (quantized_linear_activation, f"{_ARGS}, str kind", _shape_of_more),
        (quantized_linear_gated, f"{_ARGS}, str kind", _gated_shape),
        (quantized_linear_add, f"{_ARGS}, Tensor residual", _shape_of_more),
    )
)
QUANTIZED_EMBEDDING = Op(
    name="quantized_embedding",
    schema="quantized_embedding(Tensor ids_T, Tensor qweight_VD, Tensor scales_V1, str dtype) -> Tensor",
    reference=quantized_embedding,
    fake=_embedding_shape,
)
