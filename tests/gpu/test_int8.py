"""int8 rows, linears of them, and linears of 8 and 4 bit weights on a GPU, or in Triton's interpreter, against ops."""

from typing import Any

import pytest
import torch

from tritium import ops
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.fused_rows import ROW_BASES
from tritium.ops.int8 import quantize_int8
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))
SIZES = [(100, 256), (33, 100), (64, 4096)] if HAS_GPU else [(100, 256), (33, 100)]  # outputs, inputs


def launch(op: str, args: dict[str, Any], outputs: list[torch.Tensor], **tactic: Any) -> None:
    kernel = next(k for k in KERNELS if k.op == op and k.backend == "gpu")
    specs = {n: TensorSpec(dtype=a.dtype, shape=tuple(a.shape)) if torch.is_tensor(a) else a for n, a in args.items()}
    assert kernel.supports is None or resolve(kernel.supports)(specs) is None
    packed = {name: resolve(target)(args[name]) for name, target in kernel.pack.items()}
    resolve(kernel.target)({**args, **packed}, outputs, **tactic)()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A part of a wider tensor of NaN."""
    return torch.full((shape[0], shape[1] + 24), float("nan"), dtype=dtype, device=device)[:, 8 : 8 + shape[1]]


def drawn(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = poisoned((num_rows, width), dtype, device)
    x.copy_(torch.randn(num_rows, width) * 2)
    return x


@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("base", ROW_BASES)
def test_rows_and_scales_are_the_ops(base: str, scale: float | None, device: torch.device) -> None:
    x, other = (drawn(9, 300, torch.float16, device) for _ in range(2))
    x[3] = 0
    weight = torch.randn(300, dtype=torch.float16, device=device)
    norm = {"eps": 1e-5, "weight_offset": 0.0, "cast_before_weight": True}
    args: dict[str, Any] = {
        "quantize": {"x": x},
        "rms_norm": {"x": x, "weight": weight, **norm},
        "add_rms_norm": {"x": x, "residual": other, "weight": weight, **norm},
        "gated_activation": {"gate": x, "up": other, "kind": "silu"},
        "activation": {"x": x, "bias": weight, "kind": "gelu_tanh"},
        "add_layer_norm": {
            "x": x, "residual": other, "x_bias": weight, "weight": weight, "bias": None, "eps": 1e-5,
        },
        "activation_pair": {"x": x[:, 200:], "y": other, "bias": weight, "kind": "gelu_tanh"},
    }[base]  # fmt: skip
    args["scale"] = None if scale is None else torch.tensor([scale], device=device)
    expected = ops.op_named(f"{base}_int8").reference(**args)
    outputs = [torch.empty_like(t) for t in expected]
    launch(f"{base}_int8", args, outputs)
    torch.testing.assert_close(outputs[1], expected[1], rtol=1e-4, atol=1e-12)
    step = (outputs[0].int() - expected[0].int()).abs()  # beside a half, rounding may part
    assert step.max() <= 1 and (step > 0).float().mean() < 0.02
    if len(outputs) == 3:
        torch.testing.assert_close(outputs[2], expected[2], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [None, 0.02])
def test_a_row_with_an_infinity_or_nan_says_so_by_its_scale(scale: float | None, device: torch.device) -> None:
    x = torch.randn(4, 40, device=device)
    x[1, 7], x[2, 3] = float("inf"), float("nan")
    outputs = [torch.empty(4, 40, dtype=torch.int8, device=device), torch.empty(4, 1, device=device)]
    given = None if scale is None else torch.tensor([scale], device=device)
    launch("quantize_int8", {"x": x, "scale": given}, outputs)
    assert outputs[1].isnan().flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize("num_rows", [1, 17, 70, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_int8_linear_is_the_ops_exactly(num_rows: int, sizes: tuple[int, int], device: torch.device) -> None:
    num_out, num_in = sizes
    x, x_scales = quantize_int8(torch.randn(num_rows, num_in))
    weight, scales = quantize_int8(torch.randn(num_out, num_in))
    for bias in (None, torch.randn(num_out, dtype=torch.float16)):
        args = {"x": x, "x_scales": x_scales, "weight_NK": weight, "weight_scales": scales.view(1, -1), "bias": bias}
        expected = ops.op_named("linear_int8").reference(**args, dtype="float32")
        moved = {name: None if a is None else a.to(device) for name, a in args.items()}
        out = poisoned((num_rows, num_out), torch.float16, device)
        launch("linear_int8", {**moved, "dtype": "float16"}, [out])
        assert (out.float().cpu() - expected).abs().max() <= expected.abs().max() * 2**-11 * 1.01


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kept", [INT8, WeightFormat("int8", 32), WeightFormat("int4", 32), WeightFormat("int4", 128)],
                         ids=lambda kept: kept.name)  # fmt: skip
@pytest.mark.parametrize("num_rows", [1, 19, 100])
def test_a_linear_of_a_quantised_weight_is_within_twice_the_references_own_error(
    num_rows: int, kept: WeightFormat, dtype: torch.dtype, device: torch.device
) -> None:
    one_group = ((33, 100) if kept == INT8 else (33, kept.group_size),)
    for num_out, num_in in ((100, 256), (64, 1024 if HAS_GPU else 384), *one_group):
        weight = torch.randn(num_out, num_in)
        scales = scales_of(weight, kept)
        x, bias = drawn(num_rows, num_in, dtype, device), torch.randn(num_out).to(dtype)
        numbers = quantize_weight(weight, scales, kept)
        args = {"x": x, "qweight": numbers.to(device), "scales_NG": scales.to(device), "int8_activations": False}
        for has_bias in (False, True):
            given = bias if has_bias else None
            out = poisoned((num_rows, num_out), dtype, device)
            launch("quantized_linear", {**args, "bias": given if given is None else given.to(device)}, [out])
            exact = x.cpu().double() @ dequantize_weight(numbers, scales).double().t()
            exact = exact if given is None else exact + given.double()
            reference = ops.quantized_linear(x.cpu(), numbers, scales, given, False)
            ulp = torch.finfo(dtype).eps * exact.abs().max()
            assert (out.cpu().double() - exact).abs().max() <= 2 * (reference.double() - exact).abs().max() + ulp
