"""paged_attention for sequences of one new token: one program per sequence, kv head and part of the context.

Two forms. `dot`: tokens are the rows of S^T = K q^T on the tensor cores, the group's query heads its columns (at least
16). `vector`: no tensor cores; for one query head a kv head, where 15 of 16 columns would be padding.
With SPLITS > 1 a program takes a part of the tiles and leaves a partial result, which a second kernel joins.
Sums in fp32; softmax in base 2, online. ALiBi adds slope * (key's position - query's) to a score.
"""

import triton
import triton.language as tl

from tritium.kernels.gpu.attention_tile import LOG2_E, in_half, key_range, load_tile, scores_in_base_2
from tritium.kernels.gpu.programmatic import begin


@triton.jit
def decode_dot_kernel(
    q_ptr, cache_ptr, out_ptr, partial_ptr, slopes_ptr, table_ptr, cu_seqlens_ptr, context_ptr, counts_ptr,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_table, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    IS_HALF: tl.constexpr, SPLITS: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if s >= tl.load(counts_ptr + 3):
        return
    row = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    context = tl.load(context_ptr + s)
    first, begin, end = key_range(context, split, WINDOW, TILE, SPLITS)
    d, t, g = tl.arange(0, HEAD_BLOCK), tl.arange(0, TILE), tl.arange(0, COLUMNS)
    is_q = (g < GROUP)[None, :] & (d < HEAD_SIZE)[:, None]
    head = h * GROUP + g
    q = tl.load(q_ptr + row * stride_q_token + head[None, :] * stride_q_head + d[:, None], mask=is_q, other=0.0)
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head, mask=g < GROUP, other=0.0) * LOG2_E
    if IS_HALF:
        q, largest = in_half(q, 0)
        scale = (scale * largest)[None, :]
    dtype: tl.constexpr = q.dtype
    m = tl.full([COLUMNS], -float("inf"), tl.float32)
    norm = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, COLUMNS], tl.float32)
    is_d = d < HEAD_SIZE
    for start in range(begin, end, TILE):
        key = start + t
        is_key = (key >= first) & (key < end)
        k, v = load_tile(
            cache_ptr, table_ptr + s * stride_table, start, t, is_key, h, d, is_d, stride_block,
            NUM_KV_HEADS, HEAD_SIZE, PAGE, TILE,
        )  # fmt: skip
        score = tl.dot(k.to(dtype), q, input_precision=PRECISION)
        score = scores_in_base_2(score, scale, SOFTCAP)
        if HAS_SLOPES:
            score += slope[None, :] * (key - context + 1)[:, None]
        score = tl.where(is_key[:, None], score, -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 0))
        p = tl.exp2(score - new_m[None, :])
        alpha = tl.exp2(m - new_m)
        norm = norm * alpha + tl.sum(p, 0)
        acc = acc * alpha[None, :] + tl.dot(tl.trans(v.to(dtype)), p.to(dtype), input_precision=PRECISION)
        m = new_m
    is_out = (g < GROUP)[None, :] & (d < HEAD_SIZE)[:, None]
    if SPLITS > 1:
        place = ((s * NUM_KV_HEADS * GROUP + head) * SPLITS + split) * (HEAD_BLOCK + 2)
        tl.store(partial_ptr + place[None, :] + d[:, None], acc, mask=is_out)
        tl.store(partial_ptr + place + HEAD_BLOCK, m, mask=g < GROUP)
        tl.store(partial_ptr + place + HEAD_BLOCK + 1, norm, mask=g < GROUP)
    else:
        out = (acc / norm[None, :]).to(out_ptr.dtype.element_ty)
        place = row * stride_out_token + head[None, :] * stride_out_head + d[:, None]
        tl.store(out_ptr + place, out, mask=is_out)


@triton.jit
def decode_vector_kernel(
    q_ptr, cache_ptr, out_ptr, partial_ptr, slopes_ptr, table_ptr, cu_seqlens_ptr, context_ptr, counts_ptr,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_table, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    s, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if s >= tl.load(counts_ptr + 3):
        return
    row = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    context = tl.load(context_ptr + s)
    first, begin, end = key_range(context, split, WINDOW, TILE, SPLITS)
    d, t = tl.arange(0, HEAD_BLOCK), tl.arange(0, TILE)
    is_d = d < HEAD_SIZE
    q = tl.load(q_ptr + row * stride_q_token + h * stride_q_head + d, mask=is_d, other=0.0).to(tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + h) * LOG2_E
    m, norm = -float("inf"), 0.0
    acc = tl.zeros([TILE, HEAD_BLOCK], tl.float32)  # rows are summed at the end: no reduction in the loop
    for start in range(begin, end, TILE):
        key = start + t
        is_key = (key >= first) & (key < end)
        k, v = load_tile(
            cache_ptr, table_ptr + s * stride_table, start, t, is_key, h, d, is_d, stride_block,
            NUM_KV_HEADS, HEAD_SIZE, PAGE, TILE,
        )  # fmt: skip
        score = scores_in_base_2(tl.sum(k.to(tl.float32) * q[None, :], 1), scale, SOFTCAP)
        if HAS_SLOPES:
            score += slope * (key - context + 1)
        score = tl.where(is_key, score, -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 0))
        p = tl.exp2(score - new_m)
        alpha = tl.exp2(m - new_m)
        norm = norm * alpha + tl.sum(p, 0)
        acc = acc * alpha + p[:, None] * v.to(tl.float32)
        m = new_m
    total = tl.sum(acc, 0)
    if SPLITS > 1:
        place = ((s * NUM_KV_HEADS + h) * SPLITS + split) * (HEAD_BLOCK + 2)
        tl.store(partial_ptr + place + d, total, mask=is_d)
        tl.store(partial_ptr + place + HEAD_BLOCK, m)
        tl.store(partial_ptr + place + HEAD_BLOCK + 1, norm)
    else:
        out = (total / norm).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_out_token + h * stride_out_head + d, out, mask=is_d)


@triton.jit
def join_splits_kernel(
    partial_ptr, out_ptr, cu_seqlens_ptr, counts_ptr, num_heads, stride_out_token, stride_out_head,
    HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, SPLITS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One program per sequence and query head: its SPLITS partial results as one."""
    begin(IS_EARLY)
    s, n = tl.program_id(0), tl.program_id(1)
    if s >= tl.load(counts_ptr + 3):
        return
    i, d = tl.arange(0, SPLITS), tl.arange(0, HEAD_BLOCK)
    place = partial_ptr + ((s * num_heads + n) * SPLITS + i) * (HEAD_BLOCK + 2)
    m = tl.load(place + HEAD_BLOCK)
    norm = tl.load(place + HEAD_BLOCK + 1)
    share = tl.exp2(m - tl.max(m, 0))
    is_in = (norm > 0.0)[:, None] & (d < HEAD_SIZE)[None, :]
    acc = tl.load(place[:, None] + d[None, :], mask=is_in, other=0.0)
    out = tl.sum(acc * share[:, None], 0) / tl.sum(norm * share, 0)
    place = tl.load(cu_seqlens_ptr + s).to(tl.int64) * stride_out_token + n * stride_out_head + d
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_SIZE)
