"""activation, gated_activation: element by element in fp32, a program a piece of a row. Rows may be strided."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import Thunk

_BLOCK = 1024


@triton.jit
def act(x, KIND: tl.constexpr):
    """The function named KIND (ops.activations.KINDS) of x in fp32. tanh(z) is 2 sigmoid(2 z) - 1."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN
    else:
        tl.static_assert(KIND == "quick_gelu")
        return x * tl.sigmoid(1.702 * x)


@triton.jit
def _activation_kernel(x_ptr, out_ptr, width, stride_x, stride_out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + i, mask=i < width).to(tl.float32)
    tl.store(out_ptr + row * stride_out + i, act(x, KIND).to(out_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def _gated_activation_kernel(
    gate_ptr, up_ptr, out_ptr, width, stride_gate, stride_up, stride_out, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + i, mask=i < width).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + i, mask=i < width).to(tl.float32)
    y = act(gate, KIND).to(out_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(out_ptr + row * stride_out + i, y.to(out_ptr.dtype.element_ty), mask=i < width)


def bind_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.activation into outputs[0]."""
    x, out = args["x"], outputs[0]
    need_dense(x=x[0], out=out[0])
    strides = (x.stride(0), out.stride(0))
    return partial(_activation_kernel[_grid(x)], x, out, x.shape[1], *strides, KIND=args["kind"], BLOCK=_BLOCK)


def bind_gated_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gated_activation into outputs[0]."""
    gate, up, out = args["gate"], args["up"], outputs[0]
    need_dense(gate=gate[0], up=up[0], out=out[0])
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    kernel = _gated_activation_kernel[_grid(gate)]
    return partial(kernel, gate, up, out, gate.shape[1], *strides, KIND=args["kind"], BLOCK=_BLOCK)


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], _BLOCK)
