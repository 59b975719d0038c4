"""Scales and integers of a weight: nearest, no worse than plain rounding, the same for a part as for the whole."""

import pytest
import torch

from tritium.config import SCHEMES as SCHEME_NAMES
from tritium.ops.quantized import dequantize_weight, unpack_weight
from tritium.quant.schemes import SCHEMES, scheme_named
from tritium.quant.weights import pack_nibbles, quantize_weight, scales_of

FORMATS = ((8, 0), (4, 32), (4, 128))


def quantized(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = scales_of(weight, bits, group_size)
    return quantize_weight(weight, scales, bits), scales


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_each_integer_is_the_nearest_to_its_weight(bits: int, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 384).to(dtype)
    qweight, scales = quantized(weight, bits, group_size)
    assert qweight.dtype == (torch.int8 if bits == 8 else torch.uint8) and scales.shape[0] == 40
    steps = scales.float().abs().repeat_interleave(384 // scales.shape[1], 1)
    integers = unpack_weight(qweight)
    error = (dequantize_weight(qweight, scales) - weight.float()).abs() / steps
    is_inside = (integers > integers.min()) & (integers < integers.max())
    assert (error[is_inside] <= 0.5 + 1e-3).all()
    assert integers.min() >= (-127 if bits == 8 else -8) and integers.max() <= (127 if bits == 8 else 7)


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_search_has_less_error_than_rounding_to_the_largest_element(group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    qweight, scales = quantized(weight, 4, group_size)
    found = (dequantize_weight(qweight, scales) - weight).square().sum()
    plain_scales = (weight.unflatten(1, (-1, group_size)).abs().amax(-1) / 7).bfloat16()
    plain = dequantize_weight(quantize_weight(weight, plain_scales, 4), plain_scales)
    assert found < 0.85 * (plain - weight).square().sum()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_a_part_of_the_outputs_gives_a_part_of_the_quantised_weight(bits: int, group_size: int) -> None:
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    whole = quantized(weight, bits, group_size)
    for rows in (slice(0, 13), slice(13, 50)):
        part = quantized(weight[rows], bits, group_size)
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_zeros_stay_zeros_and_make_no_nan(bits: int, group_size: int) -> None:
    weight = torch.zeros(3, 128)
    assert torch.equal(dequantize_weight(*quantized(weight, bits, group_size)), weight)


def test_nibbles_come_back_as_they_went_in() -> None:
    integers = torch.arange(-8, 8).repeat(3, 2)
    assert torch.equal(unpack_weight(pack_nibbles(integers)), integers.to(torch.int8))


def test_the_configuration_knows_every_scheme_and_no_other() -> None:
    assert (*(scheme.name for scheme in SCHEMES), "fp8") == SCHEME_NAMES  # fp8 is a GPU's (ops/fp8.py)
    assert scheme_named("w4a8_g32").weight.group_size == 32
    with pytest.raises(KeyError, match=r"no scheme is named 'w3'; known: w8a8, "):
        scheme_named("w3")
