"""Quantised linears on drawn shapes, values and tactics: the op's bits, or fp32's error, and nothing beside x."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium import ops
from tritium.kernels.cpu import library
from tritium.kernels.select import valid_tactics
from tritium.kernels.table import KERNELS
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import quantize_weight, scales_of
from tritium.testing.kernel_cases import run, specs_of

pytestmark = pytest.mark.skipif(not library.available(), reason=library.why_not())
KERNEL = next(kernel for kernel in KERNELS if kernel.name == "cpu.quantized_linear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One, odd, and one beside the sizes of tiles, row groups, panels and runs
ROWS = st.sampled_from([1, 2, 7, 8, 9, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 47, 48, 255, 256, 257])
OUTPUTS = st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 63, 65, 100])
INPUTS = st.sampled_from([1, 3, 31, 32, 33, 63, 64, 65, 127, 129, 511, 512, 513, 1025, 4095, 4097])
GROUPS = st.sampled_from(
    [(32, 1), (32, 3), (32, 17), (64, 5), (96, 3), (128, 1), (128, 9), (160, 2), (512, 2), (1024, 1)]
)
VALUES = st.sampled_from(["normal", "one huge", "tiny", "ends", "zeros"])


def draw_rows(kind: str, num_rows: int, num_in: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(num_rows, num_in)
    if kind == "one huge":
        x[:, num_in // 2] = 3e4
    elif kind == "tiny":
        x *= 1e-6
    elif kind == "ends":
        x = torch.where(x < 0, -2.0, 2.0)  # every integer is -127 or 127: the largest sums there are
    elif kind == "zeros":
        x[::2] = 0.0
    return x.to(dtype)


def draw_problem(data: st.DataObject) -> dict[str, Any]:
    """Arguments of the op: x is a slice of a tensor that holds NaN everywhere else."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    num_rows, num_out, dtype = data.draw(ROWS), data.draw(OUTPUTS), data.draw(st.sampled_from(DTYPES))
    if data.draw(st.booleans()):
        kept, num_in = WeightFormat("int8"), data.draw(INPUTS)
    else:
        size, count = data.draw(GROUPS)
        kept, num_in = WeightFormat("int4", size), size * count
    weight = torch.randn(num_out, num_in)
    if data.draw(st.booleans()):
        weight[num_out // 2] = 0.0
    scales = scales_of(weight, kept)
    wide = torch.full((num_rows + 2, num_in + 9), float("nan"), dtype=dtype)
    x = wide[1:-1, 4 : 4 + num_in]
    x.copy_(draw_rows(data.draw(VALUES), num_rows, num_in, dtype))
    bias = torch.randn(num_out).to(dtype) if data.draw(st.booleans()) else None
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    return {"x": x, "qweight": quantize_weight(weight, scales, kept), "scales_NG": scales, "bias": bias}


def check(data: st.DataObject) -> None:
    threads = torch.get_num_threads()
    args = draw_problem(data)
    x, shape = args["x"], (args["x"].shape[0], args["qweight"].shape[0])
    try:
        integers, plain = args | {"int8_activations": True}, args | {"int8_activations": False}
        tactics = [data.draw(st.sampled_from(valid_tactics(KERNEL, specs_of(one)))) for one in (integers, plain)]
        whole = run(KERNEL, integers, shape, x.dtype, tactics[0])
        assert torch.equal(whole, ops.quantized_linear(**integers)), tactics[0]
        floats = run(KERNEL, plain, shape, x.dtype, tactics[1])
        last = run(KERNEL, args | {"int8_activations": False, "x": x[-1:]}, (1, shape[1]), x.dtype)
    finally:
        torch.set_num_threads(threads)
    weight = dequantize_weight(args["qweight"], args["scales_NG"]).double()
    bias = torch.zeros(shape[1]) if args["bias"] is None else args["bias"]
    exact = torch.nn.functional.linear(x.double(), weight, bias.double())
    terms = torch.nn.functional.linear(x.double().abs(), weight.abs(), bias.double().abs())
    # fp16 overflows where the sum of a huge element does: the same way
    limit = torch.finfo(x.dtype).eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps * terms + 1e-6
    fits = exact.abs() < torch.finfo(x.dtype).max * 0.99
    assert ((floats.double() - exact).abs() <= limit)[fits].all()
    assert torch.equal(last, floats[-1:])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_drawn_problems_give_the_references_bits_or_fp32s_error(data: st.DataObject) -> None:
    check(data)


@pytest.mark.full
@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_many_drawn_problems_do_too(data: st.DataObject) -> None:
    check(data)
