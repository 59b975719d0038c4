"""rms_norm, layer_norm: one program a row, the row in registers, statistics in fp32.

Rows are dense in their last dimension. x may have an inner dimension (heads), with a stride of its own.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import Thunk


@triton.jit
def normalised(h, weight, width, eps, weight_offset, CAST_BEFORE: tl.constexpr, dtype: tl.constexpr):
    """A row h in fp32 (zero behind `width`) as rms_norm gives it, in fp32 and not rounded to dtype at the end.

    weight: loaded before the row's sum, which would be waited for else.
    """
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    weight = weight.to(tl.float32) + weight_offset
    if CAST_BEFORE:
        h = h.to(dtype).to(tl.float32)
        weight = weight.to(dtype).to(tl.float32)
    return h * weight


@triton.jit
def centred(x, weight_ptr, bias_ptr, d, width, eps, HAS_BIAS: tl.constexpr):
    """A row x in fp32 (zero behind `width`) as layer_norm gives it, in fp32."""
    is_in = d < width
    h = tl.where(is_in, x - tl.sum(x, 0) / width, 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    h = h * tl.load(weight_ptr + d, mask=is_in, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + d, mask=is_in, other=0.0).to(tl.float32)
    return h


@triton.jit
def added(x_ptr, residual_ptr, total_ptr, row, d, width, stride_x, stride_residual, stride_total):
    """The sum of a row of each, stored in total's dtype; that, in fp32."""
    x = tl.load(x_ptr + row * stride_x + d, mask=d < width, other=0.0).to(tl.float32)
    total = x + tl.load(residual_ptr + row * stride_residual + d, mask=d < width, other=0.0).to(tl.float32)
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * stride_total + d, total, mask=d < width)
    return total.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, width, num_inner, stride_x, stride_x_inner, stride_out, stride_out_inner, eps,
    weight_offset, CAST_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // num_inner, row % num_inner
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)
    x = tl.load(x_ptr + outer * stride_x + inner * stride_x_inner + d, mask=d < width, other=0.0).to(tl.float32)
    h = normalised(x, weight, width, eps, weight_offset, CAST_BEFORE, out_ptr.dtype.element_ty)
    place = out_ptr + outer * stride_out + inner * stride_out_inner + d
    tl.store(place, h.to(out_ptr.dtype.element_ty), mask=d < width)


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, width, num_inner, stride_x, stride_x_inner, stride_out, stride_out_inner, eps,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // num_inner, row % num_inner
    d = tl.arange(0, BLOCK)
    is_in = d < width
    x = tl.load(x_ptr + outer * stride_x + inner * stride_x_inner + d, mask=is_in, other=0.0).to(tl.float32)
    h = centred(x, weight_ptr, bias_ptr, d, width, eps, HAS_BIAS)
    place = out_ptr + outer * stride_out + inner * stride_out_inner + d
    tl.store(place, h.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, width, stride_x, stride_residual, stride_out, stride_total,
    eps, weight_offset, CAST_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)
    total = added(x_ptr, residual_ptr, total_ptr, row, d, width, stride_x, stride_residual, stride_total)
    h = normalised(total, weight, width, eps, weight_offset, CAST_BEFORE, dtype)
    tl.store(out_ptr + row * stride_out + d, h.to(dtype), mask=d < width)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, width, stride_x, stride_residual, stride_out,
    stride_total, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    dtype = out_ptr.dtype.element_ty
    total = added(x_ptr, residual_ptr, total_ptr, row, d, width, stride_x, stride_residual, stride_total)
    h = centred(total, weight_ptr, bias_ptr, d, width, eps, HAS_BIAS)
    tl.store(out_ptr + row * stride_out + d, h.to(dtype), mask=d < width)


def bind_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rms_norm into outputs[0]."""
    x, weight, out = args["x"], args["weight"], outputs[0]
    grid, sizes, tactic = _layout(x, weight, out)
    literals = (args["eps"], args.get("weight_offset", 0.0))
    is_cast = args.get("cast_before_weight", True)
    return partial(_rms_norm_kernel[grid], x, weight, out, *sizes, *literals, CAST_BEFORE=is_cast, **tactic)


def bind_layer_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.layer_norm into outputs[0]."""
    x, weight, bias, out = args["x"], args["weight"], args.get("bias"), outputs[0]
    grid, sizes, tactic = _layout(x, weight, out)
    tensors = (x, weight, weight if bias is None else bias, out)
    return partial(_layer_norm_kernel[grid], *tensors, *sizes, args["eps"], HAS_BIAS=bias is not None, **tactic)


def bind_add_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_rms_norm: the norm into outputs[0], the sum into outputs[1]."""
    tensors = (args["x"], args["residual"], args["weight"], *outputs)
    literals = (args["eps"], args.get("weight_offset", 0.0))
    is_cast = args.get("cast_before_weight", True)
    return _bind_add(_add_rms_norm_kernel, tensors, literals, CAST_BEFORE=is_cast)


def bind_add_layer_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.add_layer_norm: the norm into outputs[0], the sum into outputs[1]."""
    bias = args.get("bias")
    weight = args["weight"]
    tensors = (args["x"], args["residual"], weight, weight if bias is None else bias, *outputs)
    return _bind_add(_add_layer_norm_kernel, tensors, (args["eps"],), HAS_BIAS=bias is not None)


def _bind_add(kernel: Any, tensors: tuple[torch.Tensor, ...], literals: tuple[float, ...], **flags: bool) -> Thunk:
    """tensors: x, residual, parameters, norm, sum, of which all but the parameters are matrices."""
    matrices = [t for t in tensors if t.dim() == 2]
    need_dense(**{f"argument {i}": t if t.dim() == 1 else t[0] for i, t in enumerate(tensors)})
    num_rows, width = matrices[0].shape
    strides = (t.stride(0) for t in matrices)
    return partial(kernel[(num_rows,)], *tensors, width, *strides, *literals, **flags, **row_tactic(width))


def row_tactic(width: int) -> dict[str, int]:
    """A row in registers: 16 elements a thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _layout(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> tuple[Any, ...]:
    """Grid, sizes and strides, tactic."""
    part = (0,) * (x.dim() - 1)
    need_dense(x=x[part], weight=weight, out=out[part])
    inner = x.shape[1] if x.dim() == 3 else 1
    strides = [s for t in (x, out) for s in (t.stride(0), t.stride(1) if t.dim() == 3 else 0)]
    return (x.shape[0] * inner,), (x.shape[-1], inner, *strides), row_tactic(x.shape[-1])
