"""Linears of rows and weights in fp8 (e4m3): by cuBLASLt, of few rows by csrc/linear_fp8.cu, of some by Triton.

They take a scale a row of x and a scale a row of the weight (an H200 runs them as fast as per-tensor scales, LOG).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.kernels.gpu import matmul
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.cuda import can_convert_fp8, is_hopper, launcher
from tritium.kernels.kernel import Thunk

FEW_ROWS = 16
_SOME_ROWS = 64  # of a tile of Triton's; cuBLASLt's have 128 (benchmarks/gpu/tuned.py: 5 to 15 % slower on an H200)


def bind_linear(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], *, by: str = "") -> Thunk:
    """ops.linear_fp8 into outputs[0]. by: "own", csrc/linear_fp8.cu, for up to `FEW_ROWS`; "triton"; "cublas", summing
    fast; else what the number of rows decides.

    A bias is added by itself behind cuBLASLt: with row-wise scales it refuses one at some numbers of rows (torch 2.11).
    """
    out, bias = outputs[0], args["bias"]
    x, weight = args["x"], args["weight_NK"].t()
    by = by or _by(x.shape[0], x.device)
    if by == "own":
        return bind_few_rows(args, out)
    if by == "triton":
        return matmul.bind_fixed(args, outputs)
    scales = (args["x_scales"], args["weight_scales"])
    product = partial(torch._scaled_mm, x, weight, *scales, out_dtype=out.dtype, use_fast_accum=True, out=out)
    return product if bias is None else lambda: product().add_(bias)


def _by(num_rows: int, device: torch.device) -> str:
    if num_rows <= FEW_ROWS and can_convert_fp8(device):
        return "own"
    return "triton" if num_rows <= _SOME_ROWS and is_hopper(device) else "cublas"


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
