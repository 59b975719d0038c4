"""Whatever the tuner chooses for a linear is the same function: each tactic of a row against the op's reference."""

from typing import Any

import pytest
import torch

from tritium import ops
from tritium.kernels.gpu.tactics import INT8 as INT8_TILES
from tritium.kernels.gpu.tactics import LINEAR, QUANTIZED
from tritium.kernels.kernel import Kernel, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.int8 import quantize_int8
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
ROWS = (1, 19, 64, 300) if HAS_GPU else (1, 19)


def row(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


def named(tactic: dict[str, Any]) -> str:
    return "x".join(map(str, tactic.values()))


@pytest.mark.parametrize("tactic", QUANTIZED[1:], ids=named)
@pytest.mark.parametrize("kept", [INT8, WeightFormat("int4", 128)], ids=lambda kept: kept.name)
def test_every_tile_of_a_quantised_linear_is_within_twice_the_references_own_error(
    kept: WeightFormat, tactic: dict[str, Any], device: torch.device
) -> None:
    from triton.runtime.errors import OutOfResources

    kernel, (num_out, num_in) = row("gpu.quantized_linear"), (100, 4096 if HAS_GPU else 384)
    weight = torch.randn(num_out, num_in)
    scales = scales_of(weight, kept)
    numbers = quantize_weight(weight, scales, kept)
    weights = {"qweight": numbers.to(device), "scales_NG": scales.to(device)}
    packed = {name: resolve(kernel.pack[name])(tensor) for name, tensor in weights.items()}
    for num_rows in ROWS:
        x, bias = torch.randn(num_rows, num_in).half(), torch.randn(num_out).half()
        args = {"x": x.to(device), **packed, "bias": bias.to(device), "int8_activations": False}
        out = torch.full((num_rows, num_out), float("nan"), dtype=torch.float16, device=device)
        try:
            resolve(kernel.target)(args, [out], **tactic)()
        except OutOfResources:
            assert torch.cuda.get_device_capability() < (9, 0)  # which has all that these tiles want
            return
        exact = x.double() @ dequantize_weight(numbers, scales).double().t() + bias.double()
        reference = ops.quantized_linear(x, numbers, scales, bias, False)
        ulp = torch.finfo(torch.float16).eps * exact.abs().max()
        assert (out.cpu().double() - exact).abs().max() <= 2 * (reference.double() - exact).abs().max() + ulp


@pytest.mark.parametrize("tactic", LINEAR, ids=named)
def test_a_linear_is_within_twice_the_references_own_error_whosever_it_is(
    tactic: dict[str, Any], device: torch.device
) -> None:
    weight, bias = torch.randn(100, 1040 if HAS_GPU else 272).half(), torch.randn(100).half()
    for num_rows in ROWS:
        x = torch.randn(num_rows, weight.shape[1]).half()
        args = {"x": x.to(device), "weight_NK": weight.to(device), "bias": bias.to(device)}
        out = torch.full((num_rows, 100), float("nan"), dtype=torch.float16, device=device)
        resolve(row("gpu.linear").target)(args, [out], **tactic)()
        exact, reference = x.double() @ weight.double().t() + bias.double(), ops.linear(x, weight, bias)
        ulp = torch.finfo(torch.float16).eps * exact.abs().max()
        assert (out.cpu().double() - exact).abs().max() <= 2 * (reference.double() - exact).abs().max() + ulp


@pytest.mark.parametrize("tactic", INT8_TILES[1:], ids=named)
def test_every_tile_of_an_int8_linear_has_the_same_bits(tactic: dict[str, Any], device: torch.device) -> None:
    kernel = row("gpu.linear_int8")
    weight, scales = quantize_int8(torch.randn(100, 1040 if HAS_GPU else 272))
    for num_rows in ROWS:
        x, x_scales = quantize_int8(torch.randn(num_rows, weight.shape[1]))
        args: dict[str, Any] = {"x": x, "x_scales": x_scales, "weight_NK": weight, "weight_scales": scales.view(1, -1)}
        args = {name: tensor.to(device) for name, tensor in args.items()} | {"bias": None, "dtype": "float16"}
        plain, tiled = (torch.full((num_rows, 100), float("nan"), dtype=torch.float16, device=device) for _ in range(2))
        resolve(kernel.target)(args, [plain])()
        resolve(kernel.target)(args, [tiled], **tactic)()
        assert torch.equal(plain, tiled) and plain.isfinite().all()
