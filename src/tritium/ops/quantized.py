"""quantized_linear, alone and with an activation: a linear whose weight is kept in 8 or 4 bits. References.

Sizes: N outputs, K inputs, G groups of K / G inputs each. A weight is `q * scale`, q a signed integer:

    qweight   int8 [N, K], q itself; or uint8 [N, K / 2], two q + 8 a byte, the one of even k in the low four bits
    scales_NG of any floating dtype; G = 1: one scale per output
"""

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


def dequantize_weight(qweight: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """The weight in float32 [N, K]."""
    weight = unpack_weight(qweight).float()
    return (weight.unflatten(1, (scales_NG.shape[1], -1)) * scales_NG.float()[..., None]).flatten(1)


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


def quantized_linear(
    x: torch.Tensor, qweight: torch.Tensor, scales_NG: torch.Tensor, bias: torch.Tensor | None, int8_activations: bool
) -> torch.Tensor:
    """`x @ weight.T + bias` with the weight's integers: [..., K] -> [..., N], computed in fp32, rounded once.

    int8_activations: rows of x become int8 (`quantize_rows`). The products of a group are then summed exactly, as
    integers; each sum times the group's scale is added to the total, groups in order; the row's scale comes last. Every
    implementation gives the same bits. Without it x is taken as it is.
    """
    if not int8_activations:
        weight = dequantize_weight(qweight, scales_NG)
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    weight_NK, num_groups = unpack_weight(qweight), scales_NG.shape[1]
    q_MK, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    total = torch.zeros(q_MK.shape[0], weight_NK.shape[0], dtype=torch.float32, device=x.device)
    for g, (q, weight) in enumerate(zip(q_MK.chunk(num_groups, 1), weight_NK.chunk(num_groups, 1), strict=True)):
        total += (q.double() @ weight.double().t()).float() * scales_NG[:, g].float()  # in fp64 the sums are exact
    out = total * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def quantized_linear_activation(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    kind: str,
) -> torch.Tensor:
    """`activation(quantized_linear(...), kind)`: [..., K] -> [..., N]."""
    return activation(quantized_linear(x, qweight, scales_NG, bias, int8_activations), kind)


def quantized_linear_gated(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales_NG: torch.Tensor,
    bias: torch.Tensor | None,
    int8_activations: bool,
    kind: str,
) -> torch.Tensor:
    """`gated_activation(gate, up, kind)` of the two halves of `quantized_linear(...)`: [..., K] -> [..., N / 2]."""
    gate, up = quantized_linear(x, qweight, scales_NG, bias, int8_activations).chunk(2, dim=-1)
    return gated_activation(gate, up, kind)


def _shape(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], qweight.shape[0]), dtype=x.dtype, device=x.device)


def _gated_shape(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], qweight.shape[0] // 2), dtype=x.dtype, device=x.device)


_ARGS = "Tensor x, Tensor qweight, Tensor scales_NG, Tensor? bias, bool int8_activations"
QUANTIZED_OPS = tuple(
    Op(name=reference.__name__, schema=f"{reference.__name__}({arguments}) -> Tensor", reference=reference, fake=fake)
    for reference, arguments, fake in (
        (quantized_linear, _ARGS, _shape),
        (quantized_linear_activation, f"{_ARGS}, str kind", _shape),
        (quantized_linear_gated, f"{_ARGS}, str kind", _gated_shape),
    )
)
