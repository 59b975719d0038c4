"""A linear with an activation or a residual, of two inputs, or merged has the bits of what it stands for."""

import itertools

import pytest
import torch

from tritium.kernels.cpu import linear
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.table import KERNELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 8, 16), (3, 37, 33), (16, 64, 70), (33, 300, 96), (200, 100, 257))  # rows, outputs, inputs


NAMES = ("rows", "num_out", "num_in", "has_bias", "backend", "dtype")
EVERYWHERE = [(*s, *others) for s, *others in itertools.product(SHAPES, [False, True], ["cpu", "eager"], DTYPES)]


def run(name: str, args: dict, *shape: int) -> torch.Tensor:
    (kernel,) = (k for k in KERNELS if k.name == name)
    packed = {arg: resolve(target)(args[arg]) for arg, target in kernel.pack.items()}
    out = torch.full(shape, torch.nan, dtype=args[next(iter(args))].dtype)
    resolve(kernel.target)({**args, **packed}, [out])()
    return out


def drawn(rows: int, num_out: int, num_in: int, dtype: torch.dtype, *, has_bias: bool) -> dict:
    torch.manual_seed(0)
    wide = torch.randn(rows, num_in + 9).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    return {"x": wide[:, 5 : 5 + num_in], "weight_NK": torch.randn(num_out, num_in).to(dtype) * 0.3, "bias": bias}


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_an_activation_in_the_linear_has_the_bits_of_one_after_it(rows, num_out, num_in, has_bias, backend, dtype):
    args = drawn(rows, num_out, num_in, dtype, has_bias=has_bias)
    for kind in ("silu", "gelu_tanh", "relu"):
        expected = run(f"{backend}.activation", {"x": run(f"{backend}.linear", args, rows, num_out), "kind": kind},
                       rows, num_out)  # fmt: skip
        assert torch.equal(run(f"{backend}.linear_activation", {**args, "kind": kind}, rows, num_out), expected)


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_a_gate_in_the_linear_has_the_bits_of_one_after_it(rows, num_out, num_in, has_bias, backend, dtype):
    args = drawn(rows, 2 * num_out, num_in, dtype, has_bias=has_bias)
    gate, up = run(f"{backend}.linear", args, rows, 2 * num_out).chunk(2, -1)
    for kind in ("silu", "gelu"):
        expected = run(f"{backend}.gated_activation", {"gate": gate, "up": up, "kind": kind}, rows, num_out)
        assert torch.equal(run(f"{backend}.linear_gated", {**args, "kind": kind}, rows, num_out), expected)


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_a_residual_in_the_linear_has_the_bits_of_a_sum_after_it(rows, num_out, num_in, has_bias, backend, dtype):
    args = drawn(rows, num_out, num_in, dtype, has_bias=has_bias)
    residual = torch.randn(rows, 2 * num_out).to(dtype)[:, 1 : 1 + num_out]
    expected = run(f"{backend}.linear", args, rows, num_out) + residual
    assert torch.equal(run(f"{backend}.linear_add", {**args, "residual": residual}, rows, num_out), expected)


@pytest.mark.parametrize(NAMES, EVERYWHERE)
def test_two_inputs_of_a_linear_have_the_bits_of_one_that_holds_both(rows, num_out, num_in, has_bias, backend, dtype):
    for first in (32, 96) if dtype == torch.bfloat16 else (1, 50):
        args = drawn(rows, num_out, first + num_in, dtype, has_bias=has_bias)
        expected = run(f"{backend}.linear", args, rows, num_out)
        parts = {"x": args["x"][:, :first], "y": args["x"][:, first:]}
        assert torch.equal(run(f"{backend}.linear_pair", {**args, **parts}, rows, num_out), expected)


def test_a_first_input_that_fills_no_tiles_in_bf16_and_a_residual_of_another_type_are_refused():
    x, y, weight = (TensorSpec(dtype=torch.bfloat16, shape=(3, size)) for size in (40, 24, 64))
    given = {"x": x, "y": y, "weight_NK": weight, "bias": None}
    assert linear.supports_pair(given) == "the first input has 40 elements, no multiple of 32"
    wide = TensorSpec(dtype=torch.float32, shape=(3, 3))
    assert linear.supports_add({"x": x, "weight_NK": weight, "bias": None, "residual": wide})
    assert linear.supports_add({"x": x, "weight_NK": weight, "bias": None, "residual": x}) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_linear_has_the_bits_of_its_parts(dtype):
    """Each output is one chain over K, in whatever panel it lies: sizes here are no multiples of a panel."""
    for rows, num_in in ((1, 33), (5, 64), (40, 300)):
        x = torch.randn(rows, num_in).to(dtype)
        weights = [torch.randn(size, num_in).to(dtype) for size in (24, 7, 100)]
        biases = [torch.randn(len(w)).to(dtype) if len(w) != 7 else torch.zeros(7, dtype=dtype) for w in weights]
        parts = [
            run("cpu.linear", {"x": x, "weight_NK": w, "bias": b if len(w) != 7 else None}, rows, len(w))
            for w, b in zip(weights, biases, strict=True)
        ]
        merged = run("cpu.linear", {"x": x, "weight_NK": torch.cat(weights), "bias": torch.cat(biases)}, rows, 131)
        assert torch.equal(merged, torch.cat(parts, -1))
