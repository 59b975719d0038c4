"""Scales of 4-bit weights as whole steps: near enough, exact where they can be, and never a NaN of their own."""

import torch

from tritium.ops.quantized import MOST_STEPS, TINY, dequantize_weight, steps_of
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import quantize_weight, scales_of


def test_steps_times_units_are_the_scales_within_half_a_step_of_the_largest() -> None:
    scales = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    units, steps = steps_of(scales)
    largest = scales.float().abs().amax(1)
    assert torch.equal(units[:, 0] * MOST_STEPS, largest) and torch.equal(steps, steps.round())
    assert torch.equal(steps.abs().amax(1), torch.full((64,), float(MOST_STEPS)))
    assert ((units * steps - scales.float()).abs() <= largest[:, None] / MOST_STEPS * 0.501).all()


def test_scales_that_are_powers_of_two_of_each_other_stay_as_they_are() -> None:
    scales = torch.tensor([[0.75, -0.375, 0.09375, 0.75]], dtype=torch.bfloat16)
    units, steps = steps_of(scales)
    assert torch.equal(units * steps, scales.float())


def test_rows_of_zeros_count_as_zero_and_rows_that_are_not_finite_have_a_unit_of_nan() -> None:
    scales = torch.tensor([[0.0, 0.0], [TINY / 2, 0.0], [float("inf"), 1.0], [1.0, float("nan")]])
    units, steps = steps_of(scales)
    assert not steps.any()
    assert units[:2].isfinite().all() and units[2:].isnan().all()


def test_a_weight_changes_less_by_its_steps_than_by_its_rounding() -> None:
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(1))
    weight[:, 64:96] *= 8  # one group with scales of eight times the others'
    kept = WeightFormat("int4", 32)
    scales = scales_of(weight, kept)
    qweight = quantize_weight(weight, scales, kept)
    found = dequantize_weight(qweight, scales)
    integers = (found / steps_of(scales)[0]).unflatten(1, (32, 32)) / steps_of(scales)[1][..., None]
    plain = (integers.round() * scales.float()[..., None]).flatten(1)
    assert (found - plain).square().sum() < 1e-3 * (plain - weight).square().sum()
