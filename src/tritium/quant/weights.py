"""Numbers of a weight: its scales, by rounding to nearest with the best clipping, and its integers (or e4m3 numbers).

The integers lie from -127 to 127 and from -8 to 7. Each output's row is its own, and in it each group: to
quantise a part of a weight's outputs gives a part of the quantised weight.
"""

import torch

from tritium.ops.fp8 import quantize_fp8
from tritium.ops.quantized import kept_scales
from tritium.quant.schemes import WeightFormat

# of a kept weight's scales; bfloat16: 4.5 bits a weight in groups of 32
SCALE_DTYPES = {"int8": torch.float32, "int4": torch.bfloat16, "fp8": torch.float32}
DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}  # int4: two numbers a byte
# What a group's element of largest magnitude is divided by. Negative: it becomes the lowest number, which has no
# positive partner. More than the largest number: it is clipped, for the others' sake.
DIVISORS = (-8.0, -8.5, -9.0, -9.5, -10.0, 7.0, 7.5, 8.0, 8.5, 9.0)
_ROWS_AT_ONCE = 1 << 22  # elements: bounds what the search takes beside the weight


def scales_of(
    weight_NK: torch.Tensor, weight_format: WeightFormat, importance_K: torch.Tensor | None = None
) -> torch.Tensor:
    """[N, G] in the kind's `SCALE_DTYPES`. The group size is 0 or a divisor of K.

    8 bits: max / 127, for clipping gains nothing there. 4 bits: of `DIVISORS` the one whose rounding error has the
    least sum of squares, tried with the scale as it is kept. importance_K: what the square of an input's error counts.
    """
    num_rows = max(1, _ROWS_AT_ONCE // weight_NK.shape[1])
    parts = [_scales(rows.float(), weight_format, importance_K) for rows in weight_NK.split(num_rows)]
    return torch.cat(parts)


def quantize_weight(weight_NK: torch.Tensor, scales_NG: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """The numbers nearest to weight / scale: int8 or e4m3 [N, K], or uint8 [N, K / 2] (`ops.quantized` says how)."""
    if weight_format.kind == "fp8":
        return quantize_fp8(weight_NK)[0]
    bits = weight_format.bits
    num_rows = max(1, _ROWS_AT_ONCE // weight_NK.shape[1])
    pairs = zip(weight_NK.split(num_rows), scales_NG.split(num_rows), strict=True)
    dtype = DTYPES[weight_format.kind]
    parts = [_integers(_grouped(w.float(), s.shape[1]), kept_scales(dtype, s), bits).flatten(1) for w, s in pairs]
    integers = torch.cat(parts)
    return integers.to(torch.int8) if bits == 8 else pack_nibbles(integers)


def pack_nibbles(integers_NK: torch.Tensor) -> torch.Tensor:
    """Integers from -8 to 7, K even, as uint8 [N, K / 2]; `ops.quantized.unpack_weight` is the inverse."""
    nibbles = (integers_NK + 8).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _grouped(rows: torch.Tensor, num_groups: int) -> torch.Tensor:
    return rows.unflatten(1, (num_groups, -1))


def _integers(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    return (groups * inverse).round_().clamp_(low, high)


def _scales(rows: torch.Tensor, weight_format: WeightFormat, importance_K: torch.Tensor | None) -> torch.Tensor:
    if weight_format.kind == "fp8":
        return quantize_fp8(rows)[1]
    bits, group_size = weight_format.bits, weight_format.group_size
    groups = _grouped(rows, rows.shape[1] // group_size if group_size else 1)
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)[..., 0]
    dtype = SCALE_DTYPES[weight_format.kind]
    if bits == 8:
        return (extreme.abs() / 127.0).to(dtype)
    counts = None if importance_K is None else importance_K.float().view(groups.shape[1:])
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for divisor in DIVISORS:
        scales = (extreme / divisor).to(dtype).float()
        squares = (_integers(groups, scales, bits) * scales[..., None] - groups).square_()
        error = (squares if counts is None else squares.mul_(counts)).sum(-1)
        is_better = error < least
        best, least = torch.where(is_better, scales, best), torch.where(is_better, error, least)
    return best.to(dtype)
