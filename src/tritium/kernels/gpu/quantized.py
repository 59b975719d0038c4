"""quantized_linear with activations as they are: a GEMM that widens weights of 8 or 4 bits tile by tile.

out^T = W x^T: the weight, which is widened in registers, is the operand that tensor cores take from there. Its integers
are exact in the activations' dtype; a group's sum of products in fp32 times its scale (of 4 bits: its steps) counts.
For few rows, which leave most of a GPU without work, the groups are divided among SPLITS programs, whose sums a second
launch adds in order. One row by 8 bits is faster without tensor cores (on an H200 41 us for 55, by 4 bits 69 for 58).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu import scratch
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.packing import HALF
from tritium.kernels.gpu.scratch import FEW_ROWS, PROGRAMS
from tritium.kernels.kernel import LaunchContext, Thunk

WIDE = 128  # inputs a step of a weight whose outputs have one scale each
_MOST_SPLITS = 16
_SCRATCH_FLOATS = scratch.sums().length  # 64 rows of what is split
ONE_ROW = {"BLOCK_N": 8, "STEP": 512, "num_warps": 4}
_HALF = tl.constexpr(HALF)


# Of four bytes b: the low nibbles as four bf16 in $0 and $1, the high ones in $2 and $3, less 8. 0x4300 | n is 128 + n.
_TO_BF16 = tl.constexpr("""
{
    .reg .b32 pair, one, offset;
    mov.b32 one, 0x3F803F80;
    mov.b32 offset, 0xC308C308;
    prmt.b32 pair, $4, 0, 0x4140;
    lop3.b32 $0, pair, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 pair, pair, 4;
    lop3.b32 $2, pair, 0x000F000F, 0x43004300, 0xEA;
    prmt.b32 pair, $4, 0, 0x4342;
    lop3.b32 $1, pair, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 pair, pair, 4;
    lop3.b32 $3, pair, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
}
""")


@dataclass(frozen=True, kw_only=True)
class QuantizedTactic:
    """Outputs and rows of a tile; SPLITS: programs that share its inputs."""

    BLOCK_N: int
    BLOCK_M: int
    SPLITS: int
    num_warps: int
    num_stages: int


@triton.jit
def _nibbles(both, dtype: tl.constexpr, IS_ASM: tl.constexpr):
    """The low and the high half of each byte, less 8, in dtype. IS_ASM: four bytes at a time, into bf16."""
    if IS_ASM:
        return tl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,=r,=r,r", [both], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return ((both & 15).to(tl.int8) - 8).to(dtype), ((both >> 4).to(tl.int8) - 8).to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_kernel(
    x_ptr, qweight_ptr, scales_ptr, units_ptr, bias_ptr, out_ptr, partial_ptr, num_rows, num_out, num_in, stride_x,
    stride_out, NUM_GROUPS: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr, IS_ASM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_n, is_m = n < num_out, m < num_rows
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_row = x_ptr + m.to(tl.int64)[None, :] * stride_x
    weight_row = qweight_ptr + n.to(tl.int64)[:, None] * (num_in * BITS // 8)
    per_split = tl.cdiv(tl.cdiv(num_in, STEP), SPLITS)
    first = split * per_split
    last = tl.minimum(first + per_split, tl.cdiv(num_in, STEP))
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(first, last):
        start = step * STEP
        if BITS == 8:
            k = start + tl.arange(0, STEP)
            is_k = k < (start + STEP if IS_EVEN else num_in)
            q = tl.load(weight_row + k[None, :], mask=is_n[:, None] & is_k[None, :], other=0)
            x = tl.load(x_row + k[:, None], mask=is_m[None, :] & is_k[:, None], other=0.0)
            if NUM_GROUPS == 1 and PRECISION != "ieee":
                acc = tl.dot(q.to(dtype), x, acc, input_precision=PRECISION)
            else:
                part = tl.dot(q.to(dtype), x, input_precision=PRECISION)
        else:
            j = tl.arange(0, STEP // 2)
            k = start + j // _HALF * (2 * _HALF) + j % _HALF
            both = tl.load(weight_row + (start // 2 + j)[None, :], mask=is_n[:, None], other=136)
            x = tl.load(x_row + k[:, None], mask=is_m[None, :], other=0.0)
            low, high = _nibbles(both, dtype, IS_ASM)
            part = tl.dot(low, x, input_precision=PRECISION)
            x = tl.load(x_row + (k + _HALF)[:, None], mask=is_m[None, :], other=0.0)
            part = tl.dot(high, x, part, input_precision=PRECISION)
        if BITS == 8 and NUM_GROUPS == 1 and PRECISION == "ieee":  # as in matmul.py
            acc -= part
        elif BITS == 4 or NUM_GROUPS > 1:
            scale = tl.load(scales_ptr + n * NUM_GROUPS + step, mask=is_n, other=0).to(tl.float32)
            acc += part * scale[:, None]
    if BITS == 4:
        acc *= tl.load(units_ptr + n, mask=is_n, other=0.0)[:, None]
    elif NUM_GROUPS == 1:
        scale = tl.load(scales_ptr + n, mask=is_n, other=0.0).to(tl.float32)
        acc *= (-scale if PRECISION == "ieee" else scale)[:, None]
    is_in = is_m[:, None] & is_n[None, :]
    if SPLITS == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
        place = out_ptr + m.to(tl.int64)[:, None] * stride_out + n[None, :]
        tl.store(place, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=is_in)
    else:
        place = partial_ptr + (split * num_rows + m)[:, None] * num_out + n[None, :]
        tl.store(place, tl.trans(acc), mask=is_in)


@triton.jit
def _one_row_kernel(
    x_ptr, qweight_ptr, scales_ptr, bias_ptr, out_ptr, num_out, num_in, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """8 bits without tensor cores: STEP inputs of BLOCK_N outputs at a time. 0x4B000000 | i, as fp32, is 2^23 + i."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < num_out
    acc = tl.zeros([BLOCK_N, STEP], tl.float32)
    for start in range(0, num_in, STEP):
        k = start + tl.arange(0, STEP)
        is_in = is_n[:, None] & (k < num_in)[None, :]
        q = tl.load(qweight_ptr + n.to(tl.int64)[:, None] * num_in + k[None, :], mask=is_in, other=0).to(tl.int32)
        x = tl.load(x_ptr + k, mask=k < num_in, other=0.0).to(tl.float32)[None, :]
        term = (((q + 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0) * x
        if NUM_GROUPS > 1:
            place = scales_ptr + n[:, None] * NUM_GROUPS + (k // GROUP)[None, :]
            term *= tl.load(place, mask=is_in, other=0.0).to(tl.float32)
        acc += term
    out = tl.sum(acc, 1)
    if NUM_GROUPS == 1:
        out *= tl.load(scales_ptr + n, mask=is_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=is_n)


@triton.jit(do_not_specialize=["num_rows"])
def _join_kernel(
    partial_ptr, bias_ptr, out_ptr, num_rows, num_out, stride_out, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_n = n < num_out
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + (split * num_rows + m) * num_out + n, mask=is_n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * stride_out + n, total.to(out_ptr.dtype.element_ty), mask=is_n)


def tactic_for(bits: int, num_rows: int, num_out: int, num_steps: int) -> QuantizedTactic:
    """The fastest on an H200 (benchmarks/gpu/tactics.py and tuned.py); few rows are shared by all programs it runs."""
    if num_rows > FEW_ROWS:
        return _many_rows_tactic(bits, num_rows)
    tiles, block_m = triton.cdiv(num_out, 64), max(16, triton.next_power_of_2(num_rows))
    splits = min(_MOST_SPLITS, num_steps, triton.cdiv(PROGRAMS, tiles))
    if block_m == 16 and bits == 4:  # equal shares of a number of steps that is mostly a power of 2
        splits = min(_MOST_SPLITS, num_steps, _power_of_2_in(2 * PROGRAMS // tiles))
        return QuantizedTactic(BLOCK_N=64, BLOCK_M=16, SPLITS=splits, num_warps=4, num_stages=6)
    if block_m == 64 and bits == 8:
        return QuantizedTactic(BLOCK_N=64, BLOCK_M=64, SPLITS=splits, num_warps=4, num_stages=3)
    if block_m > 16:
        return QuantizedTactic(BLOCK_N=128, BLOCK_M=block_m, SPLITS=splits, num_warps=4, num_stages=4)
    return QuantizedTactic(BLOCK_N=64, BLOCK_M=16, SPLITS=splits, num_warps=4, num_stages=4)


def _power_of_2_in(number: int) -> int:
    """The largest that is not larger; 1 at least."""
    return 1 << max(1, number).bit_length() - 1


def _many_rows_tactic(bits: int, num_rows: int) -> QuantizedTactic:
    if bits == 4 and num_rows <= 512:
        return QuantizedTactic(BLOCK_N=128, BLOCK_M=64, SPLITS=1, num_warps=4, num_stages=3)
    if bits == 4:
        return QuantizedTactic(BLOCK_N=128, BLOCK_M=128, SPLITS=1, num_warps=8, num_stages=3)
    if num_rows <= 256:
        return QuantizedTactic(BLOCK_N=64, BLOCK_M=128, SPLITS=1, num_warps=4, num_stages=3)
    return QuantizedTactic(BLOCK_N=128, BLOCK_M=256, SPLITS=1, num_warps=8, num_stages=3)


def bind(
    args: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    context: LaunchContext | None = None,
    *,
    tactic: QuantizedTactic | None = None,
    **numbers: int,
) -> Thunk:
    """ops.quantized_linear without int8 activations into outputs[0]. Weight and scales are packed by packing.py.

    numbers: a tactic's. Inputs are not shared where the sums would not fit into the scratch, nor by more programs than
    there are steps.
    """
    x, qweight, bias, out = args["x"], args["qweight"], args.get("bias"), outputs[0]
    scales, units = args["scales_NG"]
    need_dense(x=x[0], qweight=qweight, scales_NG=scales, out=out[0])
    (num_rows, num_in), (num_out, num_groups) = x.shape, scales.shape
    bits = 8 if qweight.dtype == torch.int8 else 4
    step = WIDE if bits == 8 and num_groups == 1 else num_in // num_groups
    num_steps = triton.cdiv(num_in, step)
    if numbers:
        most = min(num_steps, _SCRATCH_FLOATS // (num_rows * num_out) if num_rows <= FEW_ROWS else 1)
        tactic = QuantizedTactic(**{**numbers, "SPLITS": max(1, min(numbers["SPLITS"], most))})
    if num_rows == 1 and bits == 8 and tactic is None:
        return partial(
            _one_row_kernel[(triton.cdiv(num_out, ONE_ROW["BLOCK_N"]),)],
            *(x, qweight, scales, out if bias is None else bias, out, num_out, num_in),
            NUM_GROUPS=num_groups,
            GROUP=num_in // num_groups,
            HAS_BIAS=bias is not None,
            **ONE_ROW,
        )
    tactic = tactic or tactic_for(bits, num_rows, num_out, num_steps)
    partials = scratch.take(context, scratch.sums(), out.device) if tactic.SPLITS > 1 else out
    given_bias = out if bias is None else bias
    flags = {"HAS_BIAS": bias is not None, "SPLITS": tactic.SPLITS}
    multiply = partial(
        _quantized_kernel[(triton.cdiv(num_rows, tactic.BLOCK_M), triton.cdiv(num_out, tactic.BLOCK_N), tactic.SPLITS)],
        *(
            x,
            qweight,
            scales,
            scales if units is None else units,
            given_bias,
            out,
            partials,
            num_rows,
            num_out,
            num_in,
            x.stride(0),
            out.stride(0),
        ),
        NUM_GROUPS=num_groups,
        STEP=step,
        BITS=bits,
        HAS_BIAS=bias is not None,
        IS_EVEN=num_in % step == 0,
        IS_ASM=x.dtype == torch.bfloat16 and x.is_cuda,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **asdict(tactic),
    )
    if tactic.SPLITS == 1:
        return multiply
    join = partial(
        _join_kernel[(num_rows, triton.cdiv(num_out, 1024))],
        *(partials, given_bias, out, num_rows, num_out, out.stride(0)),
        BLOCK=1024,
        **flags,
    )
    return lambda: (multiply(), join())


def bind_fixed(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """The same by one tactic for all numbers of rows: a row's bits do not depend on how many there are."""
    tactic = QuantizedTactic(BLOCK_N=64, BLOCK_M=64, SPLITS=1, num_warps=4, num_stages=3)
    return bind(args, outputs, tactic=tactic)
