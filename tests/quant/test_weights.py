"""Scales and integers of a weight: nearest, no worse than plain rounding, the same for a part as for the whole."""

import pytest
import torch

from tritium.config import SCHEMES as SCHEME_NAMES
from tritium.ops.quantized import dequantize_weight, unpack_weight
from tritium.quant.schemes import INT8, SCHEMES, QuantScheme, WeightFormat, format_named, scheme_named
from tritium.quant.weights import pack_nibbles, quantize_weight, scales_of

FORMATS = (INT8, WeightFormat("int4", 32), WeightFormat("int4", 128))
EACH_FORMAT = pytest.mark.parametrize("kept", FORMATS, ids=lambda kept: kept.name)


def quantized(weight: torch.Tensor, kept: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    scales = scales_of(weight, kept)
    return quantize_weight(weight, scales, kept), scales


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_each_integer_is_the_nearest_to_its_weight(kept: WeightFormat, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 384).to(dtype)
    qweight, scales = quantized(weight, kept)
    assert qweight.dtype == (torch.int8 if kept == INT8 else torch.uint8) and scales.shape[0] == 40
    steps = scales.float().abs().repeat_interleave(384 // scales.shape[1], 1)
    integers = unpack_weight(qweight)
    error = (dequantize_weight(qweight, scales) - weight.float()).abs() / steps
    is_inside = (integers > integers.min()) & (integers < integers.max())
    assert (error[is_inside] <= 0.5 + 1e-3).all()
    assert integers.min() >= (-127 if kept == INT8 else -8) and integers.max() <= (127 if kept == INT8 else 7)


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_search_has_less_error_than_rounding_to_the_largest_element(group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    qweight, scales = quantized(weight, WeightFormat("int4", group_size))
    found = (dequantize_weight(qweight, scales) - weight).square().sum()
    plain_scales = (weight.unflatten(1, (-1, group_size)).abs().amax(-1) / 7).bfloat16()
    plain = dequantize_weight(quantize_weight(weight, plain_scales, WeightFormat("int4", group_size)), plain_scales)
    assert found < 0.85 * (plain - weight).square().sum()


@EACH_FORMAT
def test_a_part_of_the_outputs_gives_a_part_of_the_quantised_weight(kept: WeightFormat) -> None:
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    whole = quantized(weight, kept)
    for rows in (slice(0, 13), slice(13, 50)):
        part = quantized(weight[rows], kept)
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))


@EACH_FORMAT
def test_zeros_stay_zeros_and_make_no_nan(kept: WeightFormat) -> None:
    weight = torch.zeros(3, 128)
    assert torch.equal(dequantize_weight(*quantized(weight, kept)), weight)


def test_nibbles_come_back_as_they_went_in() -> None:
    integers = torch.arange(-8, 8).repeat(3, 2)
    assert torch.equal(unpack_weight(pack_nibbles(integers)), integers.to(torch.int8))


def test_the_configuration_knows_every_scheme_and_no_other() -> None:
    assert tuple(scheme.name for scheme in SCHEMES) == SCHEME_NAMES
    assert scheme_named("w4a8_g32").weight.group_size == 32
    with pytest.raises(KeyError, match=r"no scheme is named 'w3'; known: w8a8, "):
        scheme_named("w3")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_format_is_found_by_its_name(scheme: QuantScheme) -> None:
    assert format_named(scheme.weight.name) == scheme.weight


@pytest.mark.parametrize("name", ["int3", "int4_g", "int4_g-1", "int4_g0", "int4_g99999999", "int4_gx", "fp8_g32", ""])
def test_a_name_that_is_no_formats_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no weight format is named '{name}'"):
        format_named(name)
