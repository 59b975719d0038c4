"""varlen_attention: one program per tile of BLOCK_M tokens of a packed sequence and query head, over all its keys.

q, k and v lie as the merged projection leaves them, side by side: strided in tokens and heads. Tiles of keys begin at
the sequence's first token and are walked in order, so a row's bits depend on its sequence alone. Only the last tile of
keys is masked. Sums in fp32; softmax in base 2, online.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.errors import KernelError
from tritium.kernels.gpu.attention_tile import attended, scores_in_base_2, sequence_of
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import LaunchContext, Thunk


@dataclass(frozen=True, kw_only=True)
class VarlenTactic:
    """block_m: tokens a program; tile: keys a step."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def varlen_tactic(head_size: int, dtype: torch.dtype) -> VarlenTactic:
    """One for every batch: another would give other bits. fp32 and wide heads take small tiles to fit."""
    if dtype == torch.float32:
        return VarlenTactic(block_m=32, tile=32, num_warps=4, num_stages=1)
    if head_size > 128:
        return VarlenTactic(block_m=64, tile=32, num_warps=4, num_stages=2)
    if head_size > 64:
        return VarlenTactic(block_m=128, tile=64, num_warps=8, num_stages=2)
    return VarlenTactic(block_m=64, tile=64, num_warps=4, num_stages=3)


@triton.jit
def _attend(
    acc, norm, m, q, k_ptr, v_ptr, start, length, scale, stride_k_token, stride_v_token,
    HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The keys from `start` on; not IS_MASKED: all of the tile belong to the sequence."""
    t, d = tl.arange(0, TILE), tl.arange(0, HEAD_BLOCK)
    key = start + t
    k_place = k_ptr + key[:, None] * stride_k_token + d[None, :]
    v_place = v_ptr + key[:, None] * stride_v_token + d[None, :]
    if IS_MASKED or HEAD_SIZE < HEAD_BLOCK:
        is_in = (key[:, None] < length) & (d[None, :] < HEAD_SIZE)
        k = tl.load(k_place, mask=is_in, other=0.0)
        v = tl.load(v_place, mask=is_in, other=0.0)
    else:
        k, v = tl.load(k_place), tl.load(v_place)
    score = scores_in_base_2(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, SOFTCAP)
    if IS_MASKED:
        score = tl.where(key[None, :] < length, score, -float("inf"))
    return attended(acc, norm, m, q, score, v, PRECISION)


@triton.jit
def varlen_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, counts_ptr, stride_q_token, stride_q_head, stride_k_token,
    stride_k_head, stride_v_token, stride_v_head, stride_out_token, stride_out_head, scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, tile = tl.program_id(0), tl.program_id(1)
    num_sequences = tl.load(counts_ptr)
    low = sequence_of(tile, cu_seqlens_ptr, 0, num_sequences, BLOCK_M)
    if low >= num_sequences:
        return
    first = tl.load(cu_seqlens_ptr + low)
    length = tl.load(cu_seqlens_ptr + low + 1) - first
    first_row = (tile - first // BLOCK_M - low) * BLOCK_M
    if first_row >= length:
        return
    h = n // GROUP
    row, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_BLOCK)
    is_in = (row[:, None] < length) & (d[None, :] < HEAD_SIZE)
    start = first.to(tl.int64)  # offsets within a sequence fit in 32 bits, those of a batch may not
    q_ptr += start * stride_q_token + n * stride_q_head
    k_ptr += start * stride_k_token + h * stride_k_head
    v_ptr += start * stride_v_token + h * stride_v_head
    out_ptr += start * stride_out_token + n * stride_out_head
    q = tl.load(q_ptr + row[:, None] * stride_q_token + d[None, :], mask=is_in, other=0.0)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    whole = length // TILE * TILE
    for key in range(0, whole, TILE):
        acc, norm, m = _attend(
            acc, norm, m, q, k_ptr, v_ptr, key, length, scale, stride_k_token, stride_v_token,
            HEAD_SIZE, HEAD_BLOCK, TILE, SOFTCAP, PRECISION, IS_MASKED=False,
        )  # fmt: skip
    if whole < length:
        acc, norm, m = _attend(
            acc, norm, m, q, k_ptr, v_ptr, whole, length, scale, stride_k_token, stride_v_token,
            HEAD_SIZE, HEAD_BLOCK, TILE, SOFTCAP, PRECISION, IS_MASKED=True,
        )  # fmt: skip
    out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * stride_out_token + d[None, :], out, mask=is_in)


def bind(
    args: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    context: LaunchContext,
    tactic: VarlenTactic | None = None,
) -> Thunk:
    """ops.varlen_attention into outputs[0]; its rows past batch_counts[1] stay as they are."""
    tensors = check_layout(args, outputs[0])
    q, k = tensors[:2]
    (num_heads, head_size), dtype = q.shape[1:], q.dtype
    tactic = tactic or varlen_tactic(head_size, dtype)
    strides = (t.stride(dim) for t in tensors[:4] for dim in (0, 1))
    constants = {
        "GROUP": num_heads // k.shape[1],
        "HEAD_SIZE": head_size,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_M": tactic.block_m,
        "TILE": tactic.tile,
        "SOFTCAP": float(args["softcap"]),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tactic.num_warps,
        "num_stages": tactic.num_stages,
    }
    values = (*tensors, *strides, args["scale"])

    def thunk() -> None:
        if context.num_prefills:
            tiles = context.num_prefill_tokens // tactic.block_m + context.num_prefills
            varlen_kernel[(num_heads, tiles)](*values, **constants)

    return thunk


def check_layout(args: Mapping[str, Any], out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v, out and the counters. Raises `KernelError` for one whose layout or dtype no kernel here reads."""
    q, k, v, starts, counts = (args[name] for name in ("q_TNH", "k_TKH", "v_TKH", "cu_seqlens_q", "batch_counts"))
    need_dense(q_TNH=q[0, 0], k_TKH=k[0, 0], v_TKH=v[0, 0], out=out[0, 0])
    for x in (starts, counts):
        if x.dtype != torch.int32:
            raise KernelError(f"counts of varlen_attention are int32, not {x.dtype}")
    return q, k, v, out, starts, counts
