"""Quantised linears: bits of the reference with int8 activations, on every path; rows by themselves in every format."""

from collections.abc import Iterator

import pytest
import torch

from tritium import ops
from tritium.errors import KernelError
from tritium.kernels import select
from tritium.kernels.cpu import activations, library, quantized
from tritium.kernels.kernel import TensorSpec
from tritium.kernels.table import KERNELS
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of
from tritium.testing.isa_levels import HERE, LEVELS, compiled
from tritium.testing.kernel_cases import run

pytestmark = pytest.mark.usefixtures("two_threads")
KERNEL, EAGER = (next(k for k in KERNELS if k.name == f"{name}.quantized_linear") for name in ("cpu", "eager"))
FULL = ("avx512", "sse", "native without amx")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (INT8, WeightFormat("int4", 32), WeightFormat("int4", 128))
EACH_FORMAT = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda kept: kept.name)
ROWS = (*range(1, 33), 64, 100, 257)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in HERE])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The linear kernels compiled for one level stand in for the library, which is the native level itself."""
    if request.param == "native":
        yield request.param
        return
    linears = compiled(LEVELS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_load", lambda: (linears, ""))
        yield request.param


def arguments(num_rows: int, num_out: int, num_in: int, weight_format: WeightFormat, dtype: torch.dtype) -> dict:
    """Activations with an outlier in each row, inside a wider tensor of NaN; a bias for odd num_out."""
    wide = torch.full((num_rows, num_in + 7), float("nan"), dtype=dtype)
    wide[:, 3 : 3 + num_in] = torch.randn(num_rows, num_in)
    wide[:, 3] *= 10
    weight = torch.randn(num_out, num_in)
    scales = scales_of(weight, weight_format)
    qweight = quantize_weight(weight, scales, weight_format)
    bias = torch.randn(num_out).to(dtype) if num_out % 2 else None
    return {"x": wide[:, 3 : 3 + num_in], "qweight": qweight, "scales_NG": scales, "bias": bias}


@EACH_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_int8_activations_give_the_references_bits_for_every_shape_and_number_of_rows(
    level: str, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    group = weight_format.group_size
    for num_out, num_in in ((1, group or 1), (33, (group or 13) * 3), (64, 256), (65, 1024), (31, group * 9 or 1030)):
        args = arguments(ROWS[-1], num_out, num_in, weight_format, dtype) | {"int8_activations": True}
        expected = ops.quantized_linear(**args)
        for num_rows in ROWS:
            torch.set_num_threads(1 + num_rows % 2)
            part = run(KERNEL, {**args, "x": args["x"][:num_rows]}, (num_rows, num_out), dtype)
            assert torch.equal(part, expected[:num_rows]), f"{num_out} x {num_in}, {num_rows} rows"


@EACH_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_float_activations_are_as_exact_as_fp32_and_a_row_is_its_own(
    level: str, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    group = weight_format.group_size
    for num_out, num_in in ((1, group or 1), (33, (group or 13) * 3), (65, 1024)):
        args = arguments(ROWS[-1], num_out, num_in, weight_format, dtype) | {"int8_activations": False}
        weight = dequantize_weight(args["qweight"], args["scales_NG"]).double()
        bias = None if args["bias"] is None else args["bias"].double()
        exact = torch.nn.functional.linear(args["x"].double(), weight, bias)
        terms = torch.nn.functional.linear(args["x"].double().abs(), weight.abs())
        whole = run(KERNEL, args, (ROWS[-1], num_out), dtype)
        limit = torch.finfo(dtype).eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps * terms + 1e-6
        assert ((whole.double() - exact).abs() <= limit).all()
        for num_rows in ROWS:
            torch.set_num_threads(1 + num_rows % 2)
            part = run(KERNEL, {**args, "x": args["x"][:num_rows]}, (num_rows, num_out), dtype)
            assert torch.equal(part, whole[:num_rows]), f"{num_out} x {num_in}, {num_rows} rows"


@pytest.mark.parametrize("is_int8", [True, False])
@EACH_FORMAT
def test_sums_that_wait_in_memory_for_the_rest_of_k_go_on_where_they_stopped(
    level: str, weight_format: WeightFormat, is_int8: bool
) -> None:
    args = arguments(290, 34, 8192 + 128, weight_format, torch.bfloat16) | {"int8_activations": is_int8}
    whole, expected = run(KERNEL, args, (290, 34), torch.bfloat16), ops.quantized_linear(**args)
    if is_int8:
        assert torch.equal(whole, expected)
    torch.testing.assert_close(whole, expected, rtol=2**-8, atol=0.1)  # of outputs of about 100
    for num_rows in (1, 40):
        part = run(KERNEL, {**args, "x": args["x"][:num_rows]}, (num_rows, 34), torch.bfloat16)
        assert torch.equal(part, whole[:num_rows])


@pytest.mark.parametrize("is_int8", [True, False])
@EACH_FORMAT
def test_an_activation_in_it_gives_the_bits_of_one_after_it(
    level: str, weight_format: WeightFormat, is_int8: bool
) -> None:
    for num_out, dtype in ((33, torch.bfloat16), (70, torch.float32), (32, torch.float16)):
        args = arguments(40, 2 * num_out, 256, weight_format, dtype) | {"int8_activations": is_int8}
        args["bias"] = torch.randn(2 * num_out).to(dtype)
        linear = run(KERNEL, args, (40, 2 * num_out), dtype)
        gate, up = linear.chunk(2, -1)
        expected = {"activation": torch.empty_like(linear), "gated": torch.empty(40, num_out, dtype=dtype)}
        activations.bind_activation({"x": linear, "kind": "gelu"}, [expected["activation"]])()
        gated = {"gate": gate, "up": up, "kind": "silu"}
        activations.bind_gated_activation(gated, [expected["gated"]])()
        for name, kind in (("activation", "gelu"), ("gated", "silu")):
            kernel = next(k for k in KERNELS if k.name == f"cpu.quantized_linear_{name}")
            for num_rows in (1, 5, 40):
                part = run(
                    kernel, {**args, "kind": kind, "x": args["x"][:num_rows]}, expected[name][:num_rows].shape, dtype
                )
                assert torch.equal(part, expected[name][:num_rows]), f"{name} of {num_out}, {num_rows} rows"


@pytest.mark.parametrize("is_int8", [True, False])
@EACH_FORMAT
def test_a_residual_in_it_gives_the_bits_of_a_sum_after_it(
    level: str, weight_format: WeightFormat, is_int8: bool
) -> None:
    for num_out, dtype in ((33, torch.bfloat16), (70, torch.float32), (32, torch.float16)):
        args = arguments(40, num_out, 256, weight_format, dtype) | {"int8_activations": is_int8}
        residual = torch.randn(40, 80).to(dtype)[:, 1 : 1 + num_out]
        for backend, plain in (("cpu", KERNEL), ("eager", EAGER)):
            kernel = next(k for k in KERNELS if k.name == f"{backend}.quantized_linear_add")
            expected = run(plain, args, (40, num_out), dtype) + residual
            for num_rows in (1, 5, 40) if backend == "cpu" else (40,):
                part = {**args, "x": args["x"][:num_rows], "residual": residual[:num_rows]}
                assert torch.equal(run(kernel, part, (num_rows, num_out), dtype), expected[:num_rows])


@pytest.mark.parametrize("is_int8", [True, False])
@EACH_FORMAT
def test_extreme_rows_and_rows_that_are_not_finite_stay_by_themselves(
    level: str, weight_format: WeightFormat, is_int8: bool
) -> None:
    args = arguments(9, 33, 256, weight_format, torch.float32) | {"int8_activations": is_int8}
    args["x"][1], args["x"][2], args["x"][3, 7], args["x"][4, 200] = 0.0, 1e-38, float("inf"), float("nan")
    args["x"][5] *= 1e30
    out, expected = run(KERNEL, args, (9, 33), torch.float32), ops.quantized_linear(**args)
    assert not out[3:5].isfinite().any() and out[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()
    if is_int8:
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("is_int8", [True, False])
@EACH_FORMAT
def test_the_eager_kernel_is_the_reference_and_keeps_rows_apart(weight_format: WeightFormat, is_int8: bool) -> None:
    args = arguments(64, 33, 384, weight_format, torch.bfloat16) | {"int8_activations": is_int8}
    whole = run(EAGER, args, (64, 33), torch.bfloat16)
    torch.testing.assert_close(whole, ops.quantized_linear(**args), rtol=1e-2, atol=1e-2)
    part = run(EAGER, {**args, "x": args["x"][32:]}, (32, 33), torch.bfloat16)
    assert torch.equal(part, whole[32:])


def test_what_the_compiled_kernel_has_no_code_for_is_refused_with_its_sizes() -> None:
    def spec(*shape: int | None, dtype: torch.dtype) -> TensorSpec:
        return TensorSpec(dtype=dtype, shape=shape)

    x = spec(None, 1 << 17, dtype=torch.bfloat16)
    for qweight, scales, reason in (
        (spec(8, 1 << 17, dtype=torch.int8), spec(8, 1, dtype=torch.float32), "131072 inputs are more than 65536"),
        (spec(8, 64, dtype=torch.int8), spec(8, 2, dtype=torch.float32), "kept as int8 in 2 groups with scales in fl"),
        (spec(8, 40, dtype=torch.uint8), spec(8, 5, dtype=torch.bfloat16), "of 80 inputs kept as uint8 in 5 groups"),
    ):
        args = {"x": x, "qweight": qweight, "scales_NG": scales, "bias": None, "int8_activations": True}
        assert reason in str(quantized.supports(args))
        with pytest.raises(KernelError, match=reason):
            select.choose("quantized_linear", args, available={"cpu"})
        assert select.choose("quantized_linear", args, available={"cpu", "eager"}).name == "eager.quantized_linear"
