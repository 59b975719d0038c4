"""rms_norm and layer_norm, alone or after an addition, compiled (csrc/norms.cpp); `quantized_...` give rows of int8."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.cpu import library
from tritium.kernels.cpu.layout import Reads, dense_output, rows_alike
from tritium.kernels.kernel import Thunk

_ROWS = [
    (name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner", "size")
]  # a `Rows` and the elements in a row


class RmsNormArgs(ctypes.Structure):
    """csrc/norms.cpp RmsNormArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *_ROWS,
        *((name, ctypes.c_float) for name in ("eps", "weight_offset")),
        ("cast_before_weight", ctypes.c_int32),
    ]


class LayerNormArgs(ctypes.Structure):
    """csrc/norms.cpp LayerNormArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *_ROWS,
        ("eps", ctypes.c_float),
    ]


_TWO_ROWS = [
    (name, ctypes.c_int64)
    for name in (
        *("num_outer", "num_inner", "x_stride_outer", "x_stride_inner"),
        *("residual_stride_outer", "residual_stride_inner", "size"),
    )
]


class AddRmsNormArgs(ctypes.Structure):
    """csrc/norms.cpp AddRmsNormArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out", "sum")),
        *_TWO_ROWS,
        *((name, ctypes.c_float) for name in ("eps", "weight_offset")),
        ("cast_before_weight", ctypes.c_int32),
    ]


class AddLayerNormArgs(ctypes.Structure):
    """csrc/norms.cpp AddLayerNormArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "out", "sum")),
        *_TWO_ROWS,
        ("eps", ctypes.c_float),
    ]


def supports(args: Mapping[str, Any]) -> str | None:
    """x, weight and bias of one dtype."""
    return library.refuse({name: args.get(name) for name in ("x", "weight", "bias")})


def bind_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], name: str = "rms_norm") -> Thunk:
    """ops.rms_norm(x, weight) into outputs[0], which is dense."""
    reads, out = Reads(), dense_output(outputs[0])
    x, rows = reads.rows(args["x"])
    weight = reads.dense(args["weight"])
    literals = (args["eps"], args.get("weight_offset", 0.0), args.get("cast_before_weight", True))
    struct = RmsNormArgs(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *rows, x.shape[-1], *literals)
    return reads.before(library.thunk(name, x.dtype, struct, x, weight, out))


def bind_layer_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], name: str = "layer_norm") -> Thunk:
    """ops.layer_norm(x, weight, bias) into outputs[0], which is dense."""
    reads, out = Reads(), dense_output(outputs[0])
    x, rows = reads.rows(args["x"])
    weight = reads.dense(args["weight"])
    bias = None if args.get("bias") is None else reads.dense(args["bias"])
    pointers = (x.data_ptr(), weight.data_ptr(), bias.data_ptr() if bias is not None else None, out.data_ptr())
    struct = LayerNormArgs(*pointers, *rows, x.shape[-1], args["eps"])
    return reads.before(library.thunk(name, x.dtype, struct, x, weight, out, *([] if bias is None else [bias])))


def supports_add(args: Mapping[str, Any]) -> str | None:
    """x, residual, weight and bias of one dtype, x and residual of one shape."""
    x, residual = args["x"], args["residual"]
    if tuple(x.shape) != tuple(residual.shape):
        return f"x has sizes {tuple(x.shape)}, residual {tuple(residual.shape)}"
    return library.refuse({name: args.get(name) for name in ("x", "residual", "weight", "bias")})


def bind_add_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], name: str = "add_rms_norm") -> Thunk:
    """ops.add_rms_norm: the norm into outputs[0], the sum into outputs[1], both dense."""
    reads = Reads()
    x, residual, rows = _summands(reads, args)
    weight, out, total = reads.dense(args["weight"]), *map(dense_output, outputs)
    literals = (args["eps"], args.get("weight_offset", 0.0), args.get("cast_before_weight", True))
    tensors = (x, residual, weight, out, total)
    struct = AddRmsNormArgs(*(t.data_ptr() for t in tensors), *rows, *literals)
    return reads.before(library.thunk(name, x.dtype, struct, *tensors))


def bind_add_layer_norm(
    args: Mapping[str, Any], outputs: Sequence[torch.Tensor], name: str = "add_layer_norm"
) -> Thunk:
    """ops.add_layer_norm: the norm into outputs[0], the sum into outputs[1], both dense."""
    reads = Reads()
    x, residual, rows = _summands(reads, args)
    weight, out, total = reads.dense(args["weight"]), *map(dense_output, outputs)
    bias = None if args.get("bias") is None else reads.dense(args["bias"])
    tensors = (x, residual, weight, bias, out, total)
    struct = AddLayerNormArgs(*(None if t is None else t.data_ptr() for t in tensors), *rows, args["eps"])
    return reads.before(library.thunk(name, x.dtype, struct, *(t for t in tensors if t is not None)))


def _summands(reads: Reads, args: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """x, residual, and how the kernel walks the rows of both."""
    x, residual = args["x"], args["residual"]
    rows = rows_alike(x, residual)
    if rows is None:
        x, residual = reads.dense(x), reads.dense(residual)
        rows = rows_alike(x, residual)
    assert rows is not None
    return x, residual, (*rows[0], *rows[1][2:], x.shape[-1])


bind_quantized_rms_norm = functools.partial(bind_rms_norm, name="quantized_rms_norm")
bind_quantized_layer_norm = functools.partial(bind_layer_norm, name="quantized_layer_norm")
bind_quantized_add_rms_norm = functools.partial(bind_add_rms_norm, name="quantized_add_rms_norm")
bind_quantized_add_layer_norm = functools.partial(bind_add_layer_norm, name="quantized_add_layer_norm")
