"""paged_attention whose bits do not depend on the batch: one kernel, one tactic, for prompts, chunks and single tokens.

A program takes some new tokens of a sequence and all query heads of a kv head, and walks the keys alone, in tiles that
are aligned to absolute positions. A tile that a row does not see adds exactly nothing to it, nor does a NaN in one: so
which tokens share a program does not matter. Every tile is masked: a loop without masks would be compiled to others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.errors import KernelError
from tritium.kernels.gpu.attention_tile import LOG2_E, in_half, load_tile, scores_in_base_2, sequence_of, without_nan
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.kernel import LaunchContext, Thunk

_ROWS = 32  # tokens times query heads of a program, at least


@triton.jit
def _fixed_kernel(
    q_ptr, cache_ptr, out_ptr, slopes_ptr, table_ptr, cu_seqlens_ptr, context_ptr, counts_ptr,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_table, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, NUM_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, IS_HALF: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    num_sequences = tl.load(counts_ptr)
    low = sequence_of(tile, cu_seqlens_ptr, 0, num_sequences, NUM_TOKENS)
    if low >= num_sequences:
        return
    q_start = tl.load(cu_seqlens_ptr + low)
    q_len = tl.load(cu_seqlens_ptr + low + 1) - q_start
    first_token = (tile - q_start // NUM_TOKENS - low) * NUM_TOKENS
    if first_token >= q_len:
        return
    context = tl.load(context_ptr + low)
    r, d, t = tl.arange(0, NUM_TOKENS * GROUP_BLOCK), tl.arange(0, HEAD_BLOCK), tl.arange(0, TILE)
    q_token, member = first_token + r // GROUP_BLOCK, r % GROUP_BLOCK
    is_row, is_d = (q_token < q_len) & (member < GROUP), d < HEAD_SIZE
    position = context - q_len + q_token
    head = h * GROUP + member
    row = (q_start + q_token).to(tl.int64)
    q_place = q_ptr + (row * stride_q_token + head * stride_q_head)[:, None] + d[None, :]
    q = tl.load(q_place, mask=is_row[:, None] & is_d[None, :], other=0.0)
    if IS_HALF:
        q, largest = in_half(q, 1)
        scale = (scale * largest)[:, None]
    dtype: tl.constexpr = q.dtype
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head, mask=is_row, other=0.0) * LOG2_E
    m = tl.full([NUM_TOKENS * GROUP_BLOCK], -float("inf"), tl.float32)
    norm = tl.zeros([NUM_TOKENS * GROUP_BLOCK], tl.float32)
    acc = tl.zeros([NUM_TOKENS * GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - q_len + first_token - WINDOW + 1, 0)
    end = tl.minimum(context - q_len + first_token + NUM_TOKENS, context)
    for start in range(first // TILE * TILE, end, TILE):
        key = start + t
        is_key = (key >= first) & (key < end)
        k, v = load_tile(
            cache_ptr, table_ptr + low * stride_table, start, t, is_key, h, d, is_d, stride_block,
            NUM_KV_HEADS, HEAD_SIZE, PAGE, TILE,
        )  # fmt: skip
        v, bad = without_nan(v)
        score = tl.dot(q, tl.trans(k.to(dtype)), input_precision=PRECISION)
        score = scores_in_base_2(score, scale, SOFTCAP) + bad[None, :]
        if HAS_SLOPES:
            score += slope[:, None] * (key[None, :] - position[:, None])
        is_seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(is_seen, score, -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 1))
        safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)  # nothing was seen yet
        p = tl.exp2(score - safe_m[:, None])
        alpha = tl.exp2(m - safe_m)
        norm = norm * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(dtype), v.to(dtype), input_precision=PRECISION)
        m = new_m
    out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
    out_place = out_ptr + (row * stride_out_token + head * stride_out_head)[:, None] + d[None, :]
    tl.store(out_place, out, mask=is_row[:, None] & is_d[None, :])


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext) -> Thunk:
    """ops.paged_attention into outputs[0]; rows past num_tokens stay as they are. Layouts: see `attention.bind`."""
    q, cache, table, out = args["q_TNH"], args["cache_layer"], args["block_table_SB"], outputs[0]
    counters = [args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts")]
    need_dense(q_TNH=q[0, 0], cache_layer=cache[0], block_table_SB=table[0], out=out[0, 0])
    for x in (table, *counters):
        if x.dtype != torch.int32:
            raise KernelError(f"tables and counts of paged_attention are int32, not {x.dtype}")
    slopes, (num_heads, head_size) = args.get("alibi_slopes_N"), q.shape[1:]
    num_kv_heads, page = cache.shape[2:4]
    group = num_heads // num_kv_heads
    group_block = triton.next_power_of_2(group)
    num_tokens = max(1, _ROWS // group_block)
    is_wide = q.dtype == torch.float32 or head_size > 128
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), cache.stride(0), table.stride(0), args["scale"])
    tensors = (q, cache, out, counters[0] if slopes is None else slopes, table, *counters)
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_BLOCK": group_block,
        "NUM_TOKENS": num_tokens,
        "HEAD_SIZE": head_size,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(head_size)),
        "PAGE": page,
        "TILE": 32 if is_wide else 64,
        "WINDOW": args["window"],
        "SOFTCAP": float(args["softcap"]),
        "IS_HALF": cache.dtype == torch.float8_e4m3fn,
        "HAS_SLOPES": slopes is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 1 if q.dtype == torch.float32 else 2,
    }

    def thunk() -> None:
        sequences = context.num_decodes + context.num_prefills
        if sequences:
            tiles = (context.num_decodes + context.num_prefill_tokens) // num_tokens + sequences
            _fixed_kernel[(num_kv_heads, tiles)](*tensors, *strides, **constants)

    return thunk
