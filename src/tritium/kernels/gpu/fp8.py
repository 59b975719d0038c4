"""Quantising rows to fp8 (e4m3), alone and behind a norm or a gated activation; linears of such rows by cuBLASLt.

One program a row, the row in registers: its largest element gives the scale, so a row is read and written once.
Linears take a scale a row of x and a scale a row of the weight (an H200 runs them as fast as per-tensor scales, LOG).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.activations import act
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.cuda import can_convert_fp8, launcher
from tritium.kernels.gpu.norms import added, centred, normalised, row_tactic
from tritium.kernels.gpu.programmatic import begin, launch_options
from tritium.kernels.kernel import Thunk

FEW_ROWS = 16


@triton.jit
def _store_row(h, q_ptr, scales_ptr, row, d, width):
    """The row h in fp32 (zero behind `width`) as e4m3 and its scale; both outputs are dense."""
    largest = tl.maximum(tl.max(tl.abs(h), 0), 1e-12)
    tl.store(scales_ptr + row, largest / 448.0)
    tl.store(q_ptr + row * width + d, (h * (448.0 / largest)).to(q_ptr.dtype.element_ty), mask=d < width)


@triton.jit
def _quantize_kernel(x_ptr, q_ptr, scales_ptr, width, stride_x, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    _store_row(x, q_ptr, scales_ptr, row, d, width)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, q_ptr, scales_ptr, width, stride_x, eps, weight_offset, CAST_BEFORE: tl.constexpr,
    BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    h = normalised(x, weight_ptr, d, width, eps, weight_offset, CAST_BEFORE, x_ptr.dtype.element_ty)
    _store_row(h, q_ptr, scales_ptr, row, d, width)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, q_ptr, scales_ptr, total_ptr, width, stride_x, stride_residual, stride_total, eps,
    weight_offset, CAST_BEFORE: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    dtype = total_ptr.dtype.element_ty
    total = added(x_ptr, residual_ptr, total_ptr, row, d, width, stride_x, stride_residual, stride_total)
    h = normalised(total, weight_ptr, d, width, eps, weight_offset, CAST_BEFORE, dtype)
    _store_row(h, q_ptr, scales_ptr, row, d, width)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr, q_ptr, scales_ptr, total_ptr, width, stride_x,
    stride_residual, stride_total, eps, HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
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
    _store_row(h, q_ptr, scales_ptr, row, d, width)


@triton.jit
def _activation_kernel(
    x_ptr, bias_ptr, q_ptr, scales_ptr, width, stride_x, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + d, mask=d < width, other=0.0).to(tl.float32)
    _store_row(tl.where(d < width, act(x, KIND), 0.0), q_ptr, scales_ptr, row, d, width)


@triton.jit
def _gated_activation_kernel(
    gate_ptr,
    up_ptr,
    q_ptr,
    scales_ptr,
    width,
    stride_gate,
    stride_up,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    begin(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + d, mask=d < width, other=0.0)
    up = tl.load(up_ptr + row * stride_up + d, mask=d < width, other=0.0).to(tl.float32)
    y = act(gate.to(tl.float32), KIND).to(gate.dtype).to(tl.float32) * up
    _store_row(y, q_ptr, scales_ptr, row, d, width)


def bind_quantize(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantize_fp8: rows into outputs[0], scales into outputs[1]."""
    x = args["x"]
    need_dense(x=x[0], rows=outputs[0], scales=outputs[1])
    width = x.shape[1]
    return partial(
        _quantize_kernel[(x.shape[0],)],
        x,
        *outputs,
        width,
        x.stride(0),
        **row_tactic(width),
        **launch_options(x.device),
    )


def bind_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rms_norm_fp8: rows into outputs[0], scales into outputs[1]."""
    x, weight = args["x"], args["weight"]
    need_dense(x=x[0], weight=weight, rows=outputs[0], scales=outputs[1])
    literals = (x.shape[1], x.stride(0), args["eps"], args["weight_offset"])
    tactic = row_tactic(x.shape[1]) | launch_options(x.device)
    kernel = _rms_norm_kernel[(x.shape[0],)]
    return partial(kernel, x, weight, *outputs, *literals, CAST_BEFORE=args["cast_before_weight"], **tactic)


def bind_add_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_rms_norm_fp8: rows into outputs[0], scales into outputs[1], the sum into outputs[2]."""
    x, residual, weight, total = args["x"], args["residual"], args["weight"], outputs[2]
    need_dense(x=x[0], residual=residual[0], weight=weight, rows=outputs[0], scales=outputs[1], total=total[0])
    strides = (x.stride(0), residual.stride(0), total.stride(0))
    literals = (x.shape[1], *strides, args["eps"], args["weight_offset"])
    tactic = row_tactic(x.shape[1]) | launch_options(x.device)
    kernel = _add_rms_norm_kernel[(x.shape[0],)]
    return partial(kernel, x, residual, weight, *outputs, *literals, CAST_BEFORE=args["cast_before_weight"], **tactic)


def bind_gated_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gated_activation_fp8: rows into outputs[0], scales into outputs[1]."""
    gate, up = args["gate"], args["up"]
    need_dense(gate=gate[0], up=up[0], rows=outputs[0], scales=outputs[1])
    sizes = (gate.shape[1], gate.stride(0), up.stride(0))
    tactic = row_tactic(gate.shape[1]) | launch_options(gate.device)
    kernel = _gated_activation_kernel[(gate.shape[0],)]
    return partial(kernel, gate, up, *outputs, *sizes, KIND=args["kind"], **tactic)


def bind_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.activation_fp8: rows into outputs[0], scales into outputs[1]."""
    x, bias = args["x"], args["bias"]
    need_dense(x=x[0], rows=outputs[0], scales=outputs[1])
    tensors = (x, x if bias is None else bias, *outputs)
    flags = {"KIND": args["kind"], "HAS_BIAS": bias is not None}
    return partial(
        _activation_kernel[(x.shape[0],)],
        *tensors,
        x.shape[1],
        x.stride(0),
        **flags,
        **row_tactic(x.shape[1]),
        **launch_options(x.device),
    )


def bind_add_layer_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_layer_norm_fp8: rows into outputs[0], scales into outputs[1], the sum into outputs[2]."""
    x, residual, weight, total = args["x"], args["residual"], args["weight"], outputs[2]
    need_dense(x=x[0], residual=residual[0], weight=weight, rows=outputs[0], scales=outputs[1], total=total[0])
    parameters = [weight if p is None else p for p in (args["x_bias"], weight, args["bias"])]
    sizes = (x.shape[1], x.stride(0), residual.stride(0), total.stride(0), args["eps"])
    flags = {"HAS_X_BIAS": args["x_bias"] is not None, "HAS_BIAS": args["bias"] is not None}
    kernel = _add_layer_norm_kernel[(x.shape[0],)]
    return partial(
        kernel,
        x,
        residual,
        *parameters,
        *outputs,
        *sizes,
        **flags,
        **row_tactic(x.shape[1]),
        **launch_options(x.device),
    )


def bind_linear(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear_fp8 into outputs[0]: up to `FEW_ROWS` rows by csrc/linear_fp8.cu, more by cuBLASLt, summing fast.

    A bias is added by itself behind cuBLASLt: with row-wise scales it refuses one at some numbers of rows (torch 2.11).
    """
    out, bias = outputs[0], args["bias"]
    x, weight = args["x"], args["weight_NK"].t()
    if x.shape[0] <= FEW_ROWS and can_convert_fp8(x.device):
        return bind_few_rows(args, out)
    scales = (args["x_scales"], args["weight_scales"])
    product = partial(torch._scaled_mm, x, weight, *scales, out_dtype=out.dtype, use_fast_accum=True, out=out)
    return product if bias is None else lambda: product().add_(bias)


def bind_few_rows(args: Mapping[str, Any], out: torch.Tensor, *, warps: int = 0, depth: int = 4) -> Thunk:
    """ops.linear_fp8 for up to 16 rows. warps: that share the sums of 16 outputs; depth: chunks each has in flight.

    Reads the weight at the memory's rate, where cuBLASLt takes tiles of 128 rows (H200: 0.6-2.2 TB/s).
    """
    x, weight, bias = args["x"], args["weight_NK"], args["bias"]
    need_dense(x=x[0], weight_NK=weight, out=out[0])
    num_rows, num_k = x.shape
    warps = warps or (16 if num_rows <= 8 else 8)  # the fastest on an H200 (benchmarks/gpu/linears.py)
    constants = {
        "IS_BF16": out.dtype == torch.bfloat16,
        "TILES": -(-num_rows // 8),
        "WARPS": warps,
        "DEPTH": min(depth, -(-num_k // (64 * warps))),
        "HAS_BIAS": bias is not None,
    }
    tensors = (x, args["x_scales"], weight, args["weight_scales"], out if bias is None else bias, out)
    sizes = (x.stride(0), out.stride(0), num_rows, num_k)
    run = launcher("linear_fp8", constants, (*tensors, *sizes), threads=32 * warps)
    return partial(run, weight.shape[0] // 16)
