"""paged_attention for chunks of prompts: one program per tile of BLOCK_M new tokens of a sequence and query head.

Sequences of one token come first in a batch and are `attention_decode`'s; a program finds its sequence behind them.
Keys are read from the pages, where kv_store has put this step's too. Sums in fp32; softmax in base 2, online.
"""

import triton
import triton.language as tl

from tritium.kernels.gpu.attention_tile import LOG2_E, attended, in_half, load_tile, scores_in_base_2, sequence_of


@triton.jit
def _attend(
    acc, norm, m, q, cache_ptr, table_row_ptr, start, end, first, position, slope, scale, h, stride_block,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys more; not IS_MASKED: every row sees all of them."""
    t, d = tl.arange(0, TILE), tl.arange(0, HEAD_BLOCK)
    key = start + t
    is_key = (key >= first) & (key < end) if IS_MASKED else t < TILE
    k, v = load_tile(
        cache_ptr, table_row_ptr, start, t, is_key, h, d, d < HEAD_SIZE, stride_block,
        NUM_KV_HEADS, HEAD_SIZE, PAGE, TILE,
    )  # fmt: skip
    score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    score = scores_in_base_2(score, scale, SOFTCAP)
    if HAS_SLOPES:
        score += slope * (key[None, :] - position[:, None])
    if IS_MASKED:
        is_seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(is_seen, score, -float("inf"))
    return attended(acc, norm, m, q, score, v, PRECISION)


@triton.jit
def prefill_kernel(
    q_ptr, cache_ptr, out_ptr, slopes_ptr, table_ptr, cu_seqlens_ptr, context_ptr, counts_ptr,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_table, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    IS_HALF: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # a prompt's last tiles, the longest, first
    num_sequences, num_decodes = tl.load(counts_ptr), tl.load(counts_ptr + 3)
    base = tl.load(cu_seqlens_ptr + num_decodes)
    low = sequence_of(tile, cu_seqlens_ptr, num_decodes, num_sequences, BLOCK_M)
    if low >= num_sequences:
        return
    q_start = tl.load(cu_seqlens_ptr + low)
    q_len = tl.load(cu_seqlens_ptr + low + 1) - q_start
    first_row = (tile - (q_start - base) // BLOCK_M - low + num_decodes) * BLOCK_M
    if first_row >= q_len:
        return
    context = tl.load(context_ptr + low)
    h = n // GROUP
    m_index, d = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_BLOCK)
    q_row = first_row + m_index
    is_row, is_d = q_row < q_len, d < HEAD_SIZE
    position = context - q_len + q_row
    token = (q_start + q_row).to(tl.int64)
    q_place = q_ptr + token[:, None] * stride_q_token + n * stride_q_head + d[None, :]
    q = tl.load(q_place, mask=is_row[:, None] & is_d[None, :], other=0.0)
    if IS_HALF:
        q, largest = in_half(q, 1)
        scale = (scale * largest)[:, None]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - q_len + first_row - WINDOW + 1, 0)
    begin = first // TILE * TILE
    end = tl.minimum(context - q_len + first_row + BLOCK_M, context)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + n) * LOG2_E
    table_row_ptr = table_ptr + low * stride_table
    diagonal = begin  # the first tile that some row does not see whole
    if WINDOW == 0:
        diagonal = (context - q_len + first_row + 1) // TILE * TILE
    for start in range(begin, diagonal, TILE):
        acc, norm, m = _attend(
            acc, norm, m, q, cache_ptr, table_row_ptr, start, end, first, position, slope, scale, h,
            stride_block, NUM_KV_HEADS, HEAD_SIZE, HEAD_BLOCK, PAGE, TILE, WINDOW, SOFTCAP, HAS_SLOPES, PRECISION,
            IS_MASKED=False,
        )  # fmt: skip
    for start in range(diagonal, end, TILE):
        acc, norm, m = _attend(
            acc, norm, m, q, cache_ptr, table_row_ptr, start, end, first, position, slope, scale, h,
            stride_block, NUM_KV_HEADS, HEAD_SIZE, HEAD_BLOCK, PAGE, TILE, WINDOW, SOFTCAP, HAS_SLOPES, PRECISION,
            IS_MASKED=True,
        )  # fmt: skip
    out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
    out_place = out_ptr + token[:, None] * stride_out_token + n * stride_out_head + d[None, :]
    tl.store(out_place, out, mask=is_row[:, None] & is_d[None, :])
