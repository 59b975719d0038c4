"""Norms that give int8 rows, and linears that read these: bit for bit the norm and the linear, one after the other."""

import pytest
import torch

from tritium import ops
from tritium.kernels import select
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.quantized import SCALE_BYTES, rows_with_scales
from tritium.quant.schemes import INT8, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of

pytestmark = pytest.mark.usefixtures("two_threads")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(name: str, args: dict, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (kernel,) = (k for k in KERNELS if k.name == name)
    resolve(kernel.target)(args, outputs)()
    return outputs


def view(num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows inside wider ones, as a slice of a merged linear has them."""
    return torch.randn(num_tokens, 2 * width + 3).to(dtype)[:, 2 : 2 + width]


def poisoned(num_tokens: int, width: int) -> torch.Tensor:
    return torch.full((num_tokens, width + SCALE_BYTES), 77, dtype=torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "layer_norm without bias", "rms_norm of gemma"])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 37), (5, 64), (200, 1000)])
def test_rows_have_the_bits_of_the_norm_quantised(norm, backend, dtype, num_tokens, width):
    x, residual, weight = view(num_tokens, width, dtype), view(num_tokens, width, dtype), torch.randn(width).to(dtype)
    x[0, 3] = torch.nan  # a row without a scale
    literals = {"weight": weight, "eps": 1e-5}
    if norm == "rms_norm of gemma":
        literals |= {"weight_offset": 1.0, "cast_before_weight": False}
    if norm.startswith("layer"):
        literals["bias"] = None if "without" in norm else torch.randn(width).to(dtype)
    op, empty = norm.split()[0], torch.empty(num_tokens, width, dtype=dtype)
    (normed,) = run(f"{backend}.{op}", {"x": x, **literals}, empty.clone())
    (rows,) = run(f"{backend}.quantized_{op}", {"x": x, **literals}, poisoned(num_tokens, width))
    assert torch.equal(rows, rows_with_scales(normed))
    both = {"x": x, "residual": residual, **literals}
    normed, total = run(f"{backend}.add_{op}", both, empty.clone(), empty.clone())
    rows, found = run(f"{backend}.quantized_add_{op}", both, poisoned(num_tokens, width), empty.clone())
    assert torch.equal(rows, rows_with_scales(normed)) and torch.equal(found.nan_to_num(7.0), total.nan_to_num(7.0))


@pytest.mark.parametrize("weight_format", [INT8, WeightFormat("int4", 32)], ids=lambda kept: kept.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_linear_of_rows_has_the_bits_of_the_linear_that_quantises_them(backend, dtype, weight_format):
    num_in, num_out = 96, 70
    weight = torch.randn(num_out, num_in)
    scales = scales_of(weight, weight_format)
    shared = {"qweight": quantize_weight(weight, scales, weight_format), "scales_NG": scales, "int8_activations": True}
    shared["bias"] = torch.randn(num_out).to(dtype)
    for op, more, width in (
        ("quantized_linear", {}, num_out),
        ("quantized_linear_activation", {"kind": "gelu"}, num_out),
        ("quantized_linear_gated", {"kind": "silu"}, num_out // 2),
        ("quantized_linear_add", {"residual": None}, num_out),
    ):
        (kernel,) = (k for k in KERNELS if k.name == f"{backend}.{op}")
        for num_rows in (1, 3, 8, 9, 13, 40):
            x = torch.randn(num_rows, num_in).to(dtype)
            if "residual" in more:
                more["residual"] = torch.randn(num_rows, width).to(dtype)
            results = []
            for given in ({"x": x}, {"x": rows_with_scales(x), "dtype": str(dtype)[6:]}):
                args = {**shared, **more, **given}
                packed = {name: resolve(pack)(args[name]) for name, pack in kernel.pack.items()}
                results.append(torch.full((num_rows, width), torch.nan, dtype=dtype))
                resolve(kernel.target)(args | packed, [results[-1]])()
            assert torch.equal(*results), f"{op}, {num_rows} rows"


def test_rows_go_to_the_compiled_linear_only_with_int8_activations_and_a_dtype_it_has():
    weight = torch.randn(32, 64)
    scales = scales_of(weight, INT8)
    args = {"qweight": quantize_weight(weight, scales, INT8), "scales_NG": scales, "bias": None}
    args = {name: None if t is None else TensorSpec(dtype=t.dtype, shape=tuple(t.shape)) for name, t in args.items()}
    args |= {"x": TensorSpec(dtype=torch.int8, shape=(5, 68)), "int8_activations": True}
    kernels = [
        select.choose("quantized_linear", args | {"dtype": dtype}, available={"cpu", "eager"}).name
        for dtype in ("bfloat16", "float64", "")
    ]
    assert kernels == ["cpu.quantized_linear", "eager.quantized_linear", "eager.quantized_linear"]


def test_the_op_of_rows_is_the_op_of_what_they_were_made_of():
    x, weight = torch.randn(2, 3, 64), torch.randn(5, 64)
    scales = scales_of(weight, INT8)
    q = quantize_weight(weight, scales, INT8)
    rows = ops.quantized_linear(rows_with_scales(x), q, scales, None, True, "float32")
    assert rows.shape == (2, 3, 5) and torch.equal(rows, ops.quantized_linear(x, q, scales, None, True))
