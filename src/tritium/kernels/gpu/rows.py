"""Quantising rows to fp8 (e4m3) or int8, alone and behind a norm, a sum's norm or an activation.

One program a row, the row in registers: its largest element gives the scale, so a row is read and written once. Or the
scale is given, one for the whole tensor.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu import activations_fp8
from tritium.kernels.gpu.activations import act
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.norms import added, centred, normalised, row_tactic
from tritium.kernels.gpu.programmatic import begin, launch_options
from tritium.kernels.kernel import Thunk

_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away again, it rounds |x| < 2^22, halves to even


@triton.jit
def _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr):
    """The row h in fp32 (zero behind `width`) in 8 bits and its scale; both outputs are dense.

    A row that holds an infinity or a NaN gets the scale NaN: int8 has neither, and a scale of the whole tensor would
    make an infinity the largest number of either format.
    """
    most: tl.constexpr = 127.0 if IS_INT8 else 448.0
    smallest: tl.constexpr = 1e-30 if IS_INT8 else 1e-12  # TINY of ops/quantized.py, SMALLEST_ROW of ops/fp8.py
    if HAS_SCALE:
        scale = tl.load(scale_ptr)
        values = h * (1.0 / scale)
        values = tl.where(values > most, most, tl.where(values < -most, -most, values))  # keeps NaN
    else:
        largest = tl.maximum(tl.max(tl.abs(h), 0), smallest)
        scale = largest / most
        values = h * (most / largest)
    if IS_INT8:
        scale += tl.sum(h * 0.0, 0)
        q = ((values + _TO_EVEN) - _TO_EVEN).to(tl.int32).to(tl.int8)
    else:
        if HAS_SCALE:
            scale += tl.sum(h * 0.0, 0)
        q = values.to(q_ptr.dtype.element_ty)
    tl.store(scales_ptr + row, scale)
    tl.store(q_ptr + row * width + d, q, mask=d < width)


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scales_ptr, scale_ptr, width, stride_x, IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    _store_row(x, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, q_ptr, scales_ptr, scale_ptr, width, stride_x, eps, weight_offset, CAST_BEFORE: tl.constexpr,
    IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)  # does not depend on the kernel in front
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    h = normalised(x, weight, width, eps, weight_offset, CAST_BEFORE, x_ptr.dtype.element_ty)
    _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, q_ptr, scales_ptr, scale_ptr, total_ptr, width, stride_x, stride_residual,
    stride_total, eps, weight_offset, CAST_BEFORE: tl.constexpr, IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    dtype = total_ptr.dtype.element_ty
    total = added(x_ptr, residual_ptr, total_ptr, row, d, width, stride_x, stride_residual, stride_total)
    h = normalised(total, weight, width, eps, weight_offset, CAST_BEFORE, dtype)
    _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr, q_ptr, scales_ptr, scale_ptr, total_ptr, width, stride_x,
    stride_residual, stride_total, eps, HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_in = d < width
    total = tl.load(x_ptr + row * stride_x + d, mask=is_in, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + row * stride_residual + d, mask=is_in, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        total += tl.load(x_bias_ptr + d, mask=is_in, other=0.0).to(tl.float32)
    rounded = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * stride_total + d, rounded, mask=is_in)
    h = centred(rounded.to(tl.float32), weight_ptr, bias_ptr, d, width, eps, HAS_BIAS)
    _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _activation_kernel(
    x_ptr, bias_ptr, q_ptr, scales_ptr, scale_ptr, width, stride_x, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + d, mask=d < width, other=0.0).to(tl.float32)
    h = tl.where(d < width, act(x, KIND), 0.0)
    _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _activation_pair_kernel(
    x_ptr, y_ptr, bias_ptr, q_ptr, scales_ptr, scale_ptr, width, x_width, stride_x, stride_y, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_x, is_y = d < x_width, (d >= x_width) & (d < width)
    x = tl.load(x_ptr + row * stride_x + d, mask=is_x, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * stride_y + d - x_width, mask=is_y, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d - x_width, mask=is_y, other=0.0).to(tl.float32)
    h = tl.where(is_x, x, tl.where(is_y, act(y, KIND), 0.0))
    _store_row(h, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


@triton.jit
def _gated_activation_kernel(
    gate_ptr, up_ptr, q_ptr, scales_ptr, scale_ptr, width, stride_gate, stride_up, KIND: tl.constexpr,
    IS_INT8: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + d, mask=d < width, other=0.0)
    up = tl.load(up_ptr + row * stride_up + d, mask=d < width, other=0.0).to(tl.float32)
    y = act(gate.to(tl.float32), KIND).to(gate.dtype).to(tl.float32) * up
    _store_row(y, q_ptr, scales_ptr, scale_ptr, row, d, width, IS_INT8, HAS_SCALE)


def bind_quantize(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantize_fp8 or _int8: rows into outputs[0], scales into outputs[1]; so do those that follow."""
    x = args["x"]
    need_dense(x=x[0])
    return _bind(_quantize_kernel, args, outputs, (x,), (x.stride(0),))


def bind_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rms_norm_fp8 or _int8."""
    x, weight = args["x"], args["weight"]
    need_dense(x=x[0], weight=weight)
    literals = (x.stride(0), args["eps"], args["weight_offset"])
    return _bind(_rms_norm_kernel, args, outputs, (x, weight), literals, CAST_BEFORE=args["cast_before_weight"])


def bind_add_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_rms_norm_fp8 or _int8; the sum into outputs[2]."""
    x, residual, weight, total = args["x"], args["residual"], args["weight"], outputs[2]
    need_dense(x=x[0], residual=residual[0], weight=weight, total=total[0])
    literals = (x.stride(0), residual.stride(0), total.stride(0), args["eps"], args["weight_offset"])
    is_cast = args["cast_before_weight"]
    return _bind(_add_rms_norm_kernel, args, outputs, (x, residual, weight), literals, CAST_BEFORE=is_cast)


def bind_gated_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gated_activation_fp8 or _int8."""
    gate, up = args["gate"], args["up"]
    need_dense(gate=gate[0], up=up[0])
    if activations_fp8.fits(args, gate, up, outputs):
        return activations_fp8.bind(gate, up, outputs, args["kind"])
    strides = (gate.stride(0), up.stride(0))
    return _bind(_gated_activation_kernel, args, outputs, (gate, up), strides, KIND=args["kind"])


def bind_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.activation_fp8 or _int8."""
    x, bias = args["x"], args["bias"]
    need_dense(x=x[0])
    if activations_fp8.fits(args, x, bias, outputs):
        return activations_fp8.bind(x, bias, outputs, args["kind"])
    flags = {"KIND": args["kind"], "HAS_BIAS": bias is not None}
    return _bind(_activation_kernel, args, outputs, (x, x if bias is None else bias), (x.stride(0),), **flags)


def bind_activation_pair(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.activation_pair_fp8 or _int8."""
    x, y, bias = args["x"], args["y"], args["bias"]
    need_dense(x=x[0], y=y[0])
    if activations_fp8.fits(args, y, bias, outputs, first=x):
        return activations_fp8.bind(y, bias, outputs, args["kind"], first=x)
    flags = {"KIND": args["kind"], "HAS_BIAS": bias is not None}
    literals = (x.shape[1], x.stride(0), y.stride(0))
    return _bind(_activation_pair_kernel, args, outputs, (x, y, y if bias is None else bias), literals, **flags)


def bind_add_layer_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_layer_norm_fp8 or _int8; the sum into outputs[2]."""
    x, residual, weight, total = args["x"], args["residual"], args["weight"], outputs[2]
    need_dense(x=x[0], residual=residual[0], weight=weight, total=total[0])
    parameters = (weight if p is None else p for p in (args["x_bias"], weight, args["bias"]))
    literals = (x.stride(0), residual.stride(0), total.stride(0), args["eps"])
    flags = {"HAS_X_BIAS": args["x_bias"] is not None, "HAS_BIAS": args["bias"] is not None}
    return _bind(_add_layer_norm_kernel, args, outputs, (x, residual, *parameters), literals, **flags)


def _bind(
    kernel: Any,
    args: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    literals: Sequence[float],
    **flags: Any,
) -> Thunk:
    """A launch of one program a row. literals: what the kernel takes behind the rows' width."""
    rows, scales, *total = outputs
    need_dense(rows=rows, scales=scales)
    scale, (num_rows, width) = args.get("scale"), rows.shape
    flags |= {"IS_INT8": rows.dtype == torch.int8, "HAS_SCALE": scale is not None}
    tensors = (*inputs, rows, scales, scales if scale is None else scale, *total)
    tactic = row_tactic(width) | launch_options(rows.device)
    return partial(kernel[(num_rows,)], *tensors, width, *literals, **flags, **tactic)
