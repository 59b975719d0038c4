"""Linears as one Triton GEMM, scales and bias in its epilogue: linear_int8; and, for engines whose bits must not depend
on the batch, linear and linear_fp8.

A program computes a tile of BLOCK_M rows by BLOCK_N outputs and walks K alone, in steps of BLOCK_K: an output's sum has
one order, whatever else is in the batch. Sums of int8 products are exact in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import Thunk

_NARROW = 8192  # outputs: of fewer, tiles of 128 leave SMs without work
_GROUP_M = 8  # tiles of rows that programs near each other share weights by: they find them in the L2


@dataclass(frozen=True, kw_only=True)
class MatmulTactic:
    """Rows, outputs and inputs of a tile."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr, x_scales_ptr, weight_ptr, weight_scales_ptr, bias_ptr, out_ptr, num_rows, num_out, num_in, stride_x,
    stride_out, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_INTEGER: tl.constexpr, IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_out, BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + tile % (GROUP_M * tiles_n) % height
    tile_n = tile % (GROUP_M * tiles_n) // height
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_m, is_n = m < num_rows, n < num_out
    x_place = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight_place = weight_ptr + n.to(tl.int64)[None, :] * num_in + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if IS_INTEGER else tl.float32)
    for start in range(0, num_in, BLOCK_K):
        if IS_EVEN:
            x = tl.load(x_place, mask=is_m[:, None], other=0.0)
            weight = tl.load(weight_place, mask=is_n[None, :], other=0.0)
        else:
            is_k = start + k < num_in
            x = tl.load(x_place, mask=is_m[:, None] & is_k[None, :], other=0.0)
            weight = tl.load(weight_place, mask=is_n[None, :] & is_k[:, None], other=0.0)
        if IS_INTEGER:
            acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        elif PRECISION == "ieee":  # a chain over all of K, which Triton makes of +=, rounds more
            acc -= tl.dot(x, weight, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_place += BLOCK_K
        weight_place += BLOCK_K
    out = -acc if PRECISION == "ieee" and not IS_INTEGER else acc.to(tl.float32)
    if HAS_SCALES:
        out *= tl.load(x_scales_ptr + m, mask=is_m, other=0.0)[:, None]
        out *= tl.load(weight_scales_ptr + n, mask=is_n, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


def int8_tactic(num_rows: int, num_out: int) -> MatmulTactic:
    """By sizes, the fastest on an H200 (benchmarks/gpu/tactics.py): exact sums have the same bits in every tile."""
    if num_rows <= 16 and num_out <= _NARROW:
        return MatmulTactic(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=4)
    if num_rows <= 16:
        return MatmulTactic(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=6)
    if num_rows <= 64:
        return MatmulTactic(BLOCK_M=64, BLOCK_N=64, BLOCK_K=256, num_warps=4, num_stages=3)
    if num_rows <= 256 and num_out <= _NARROW:
        return MatmulTactic(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)
    return MatmulTactic(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=3)


def bind_int8(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], **numbers: int) -> Thunk:
    """ops.linear_int8 into outputs[0]. numbers: a tactic's."""
    num_rows, num_out = args["x"].shape[0], args["weight_NK"].shape[0]
    return bind_tactic(args, outputs, MatmulTactic(**numbers) if numbers else int8_tactic(num_rows, num_out))


def fixed_tactic(dtype: torch.dtype, num_rows: int, num_out: int) -> MatmulTactic:
    """The tactics of a linear, whose sums have the same order: K in steps of one size, tensor cores of one kind.

    That tiles of other sizes give the same bits is what tests/gpu/test_invariance.py finds on the GPU that is there.
    """
    if dtype == torch.float32:
        return MatmulTactic(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    block_k = 128 // dtype.itemsize
    if num_rows <= 64:
        block_n = 64 if num_out <= _NARROW else 128
        return MatmulTactic(BLOCK_M=64, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=4)
    return MatmulTactic(BLOCK_M=128, BLOCK_N=128, BLOCK_K=block_k, num_warps=8, num_stages=3)


def bind_fixed(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear or ops.linear_fp8 into outputs[0]: a row's bits are the same among any number of rows."""
    return bind_tactic(args, outputs, fixed_tactic(args["x"].dtype, *outputs[0].shape))


def bind_tactic(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], tactic: MatmulTactic) -> Thunk:
    """Any of these ops into outputs[0] by a given tactic."""
    x, weight, bias, out = args["x"], args["weight_NK"], args.get("bias"), outputs[0]
    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    has_scales = "x_scales" in args
    scales = (args["x_scales"], args["weight_scales"]) if has_scales else (weight, weight)
    need_dense(x=x[0], weight_NK=weight, out=out[0], **({"x_scales": scales[0]} if has_scales else {}))
    grid = (triton.cdiv(num_rows, tactic.BLOCK_M) * triton.cdiv(num_out, tactic.BLOCK_N),)
    return partial(
        _matmul_kernel[grid],
        *(x, scales[0], weight, scales[1], out if bias is None else bias, out),
        *(num_rows, num_out, num_in, x.stride(0), out.stride(0)),
        HAS_SCALES=has_scales,
        HAS_BIAS=bias is not None,
        IS_INTEGER=x.dtype == torch.int8,
        IS_EVEN=num_in % tactic.BLOCK_K == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        GROUP_M=_GROUP_M,
        **asdict(tactic),
    )
